from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from r2kit.data.datamodule import DataModule
from r2kit.data.leaks import find_leaks, without_leaks
from r2kit.data.splits import Split
from r2kit.errors import DataError
from r2kit.recipe import AugmentSpec, DataSpec

NONE = np.empty(0, dtype=np.int64)


def source(count: int = 6, **columns) -> SimpleNamespace:
    """A source of `count` images that differ in everything that is not given."""
    contents = {"pixels": [f"p{i}" for i in range(count)], "flat": False, "low": None, "crs": None, "bounds": None}
    contents = pd.DataFrame(contents | {k: v for k, v in columns.items() if k in contents})
    manifest = {"path": [f"{i}.tif" for i in range(count)], "label": [i % 2 for i in range(count)], "group": None}
    return SimpleNamespace(manifest=pd.DataFrame(manifest | {k: v for k, v in columns.items() if k == "group"}),
                           contents=contents)  # fmt: skip


def split(train, val, test=NONE) -> Split:
    return Split(np.array(train), np.array(val), np.array(test, dtype=np.int64), "own")


def found(*args) -> dict[str, list[list[int]]]:
    return {finding.kind: finding.pairs.tolist() for finding in find_leaks(*args)}


def boxes(*lefts: float, size: float = 10.0) -> list[tuple[float, ...]]:
    return [(left, 0.0, left + size, size) for left in lefts]


def test_nothing_is_found_where_nothing_leaks() -> None:
    inside = source(group=["a", "a", None, "b", "c", None], pixels=list("xxyzuv"))
    assert found(inside, split([0, 1, 2], [3], [4, 5])) == {}


def test_duplicates_and_groups_name_the_image_that_gives_way() -> None:
    parts = split([0, 1, 2], [3], [4, 5])
    assert found(source(pixels=list("abcaba")), parts) == {"duplicates": [[0, 5], [1, 4], [3, 5]]}
    assert found(source(group=["g", None, "h", "h", None, "g"]), parts) == {"groups": [[0, 5], [2, 3]]}
    assert found(source(pixels=list("abcaba"), flat=[True, False, False, True, False, True]), parts) == {
        "duplicates": [[1, 4]]  # images of one colour are equal by nature
    }
    message = find_leaks(source(pixels=list("abcaba")), parts)[0].text
    assert message == "3 image(s) with the same pixels in two parts, e.g. 0.tif (train) and 5.tif (test)"


def test_footprints_overlap_but_neighbours_do_not() -> None:
    parts = split([0, 1, 2], [3], [4, 5])
    utm = ["EPSG:32633"] * 6
    neighbours = source(crs=utm, bounds=boxes(0, 10, 20, 30, 40, 50))
    assert found(neighbours, parts) == {}
    assert found(source(crs=utm, bounds=boxes(0, 10, 25, 30, 40, 48)), parts) == {"footprints": [[2, 3]]}
    # A small tile inside a large one, and an image without georeference.
    small = [*boxes(0, 100, size=1000.0), None, *boxes(500, 5000, 9000, size=5.0)]
    crs = [*utm[:2], None, *utm[:3]]
    assert found(source(crs=crs, bounds=small), parts) == {"footprints": [[0, 3], [1, 3]]}


def test_footprints_in_two_coordinate_systems() -> None:
    # The same kilometre, once in UTM 33 and once in degrees (centre 15 E on the zone's meridian).
    bounds = [(500_000.0, 5_000_000.0, 501_000.0, 5_001_000.0), (15.0, 45.15, 15.013, 45.165), (16.0, 45.0, 16.1, 45.1)]
    parts = split([0], [1, 2])
    assert found(source(3, crs=["EPSG:32633", "EPSG:4326", "EPSG:4326"], bounds=bounds), parts) == {
        "footprints": [[0, 1]]
    }


@pytest.mark.parametrize("seed", range(3))
def test_footprints_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 100, (60, 2))
    bounds = np.concatenate([low, low + rng.uniform(1, 12, (60, 2))], axis=1)
    rank = rng.integers(0, 3, 60)
    data = source(60, crs=["EPSG:32633"] * 60, bounds=list(map(tuple, bounds)))
    got = found(data, split(*(np.flatnonzero(rank == r) for r in range(3)))).get("footprints", [])

    def overlap(a: int, b: int) -> bool:
        sides = np.minimum(bounds[a, 2:], bounds[b, 2:]) - np.maximum(bounds[a, :2], bounds[b, :2])
        areas = [(bounds[i, 2:] - bounds[i, :2]).prod() for i in (a, b)]
        return (sides > 0).all() and sides.prod() > 0.01 * min(areas)

    expected = {a for a in range(60) for b in range(60) if rank[a] < rank[b] and overlap(a, b)}
    assert {a for a, _ in got} == expected
    assert all(overlap(a, b) and rank[a] < rank[b] for a, b in got)


def test_dropping_keeps_held_out_images_and_refuses_to_empty_a_class() -> None:
    data, parts = source(8, pixels=list("abcdefga")), split([0, 1, 2, 3], [4, 5], [6, 7])
    left = without_leaks(parts, find_leaks(data, parts), data.manifest, ("x", "y"))
    assert (left.train.tolist(), left.val.tolist(), left.test.tolist()) == ([1, 2, 3], [4, 5], [6, 7])
    assert left.warnings == ("1 image(s) that give held-out images away were left out (duplicates)",)
    data = source(8, pixels=list("abacefga"))
    with pytest.raises(DataError, match=r"data\.on_leak=drop leaves no train image of 'x'"):
        without_leaks(parts, find_leaks(data, parts), data.manifest, ("x", "y"))


def test_training_refuses_a_leaking_split_before_it_starts(make_folder) -> None:
    root: Path = make_folder({"train/a": 4, "train/b": 4, "test/a": 3, "test/b": 3})
    (root / "test" / "a" / "001.png").write_bytes((root / "train" / "a" / "000.png").read_bytes())

    def module(**options) -> DataModule:
        made = DataModule(
            DataSpec(root=str(root), workers=1, image_size=32, **options), AugmentSpec(), seed=0, batch_size=2
        )
        made.setup()
        return made

    with pytest.raises(DataError, match=r"000\.png \((train|val)\) and .*/001\.png \(test\): the result would"):
        module()
    made = module(on_leak="drop")
    assert len(made.split.train) + len(made.split.val) == 7
    assert any("left out (duplicates)" in warning for warning in made.split.warnings)
    # Divided anew, copies stay on one side.
    assert module(split="stratified").split.kind == "stratified"
