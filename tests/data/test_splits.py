from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from r2kit.data.bluemarble import BlueMarble
from r2kit.data.splits import PARTS, Split, block_names, group_names, make_split
from r2kit.errors import DataError
from r2kit.recipe import DataSpec

CLASSES = ("a", "b", "c")


def manifest(labels: np.ndarray, lon=None, lat=None, split=None, group=None) -> pd.DataFrame:
    labels = np.asarray(labels)
    nan = np.full(len(labels), np.nan)
    return pd.DataFrame(
        {
            "id": [f"i{i:05d}" for i in range(len(labels))],
            "path": [f"/x/i{i:05d}.png" for i in range(len(labels))],
            "label": labels,
            "split": pd.Series([None] * len(labels) if split is None else split, dtype=object),
            "group": pd.Series([None] * len(labels) if group is None else group, dtype=object),
            "lon": nan if lon is None else lon,
            "lat": nan if lat is None else lat,
        }
    )


def world(count: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Images whose class depends on where they are, as land cover does."""
    rng = np.random.default_rng(seed)
    lon, lat = rng.uniform(-180, 180, count), rng.uniform(-85, 85, count)
    label = (np.sin(lon / 40) + lat / 60 > 0).astype(int) + (lat > 55)
    return manifest(label, lon, lat)


def parts_of(split: Split, size: int) -> np.ndarray:
    part = np.full(size, "", dtype=object)
    for name in PARTS:
        assert (part[split.rows(name)] == "").all(), "a row is in two parts"
        part[split.rows(name)] = name
    return part


# Stratified ----------------------------------------------------------------------------------------------------------


def test_stratified_keeps_fractions_in_every_class() -> None:
    frame = manifest(np.repeat([0, 1, 2], [400, 100, 7]))
    split = make_split(frame, CLASSES, DataSpec(val_fraction=0.2, test_fraction=0.1), seed=1)
    assert split.kind == "stratified"
    assert split.blocks is None
    part = parts_of(split, len(frame))
    assert (part != "").all()
    for label, expected in ((0, [280, 80, 40]), (1, [70, 20, 10]), (2, [5, 1, 1])):
        assert [(part[frame["label"] == label] == name).sum() for name in PARTS] == expected


def test_split_is_a_function_of_the_seed() -> None:
    for frame in (manifest(np.repeat([0, 1, 2], 50)), world()):
        first, again, other = (make_split(frame, CLASSES, DataSpec(), seed=s) for s in (3, 3, 4))
        for name in PARTS:
            np.testing.assert_array_equal(first.rows(name), again.rows(name))
        assert set(first.test) != set(other.test)


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_tiny_classes_have_one_image_in_every_part(count: int) -> None:
    frame = manifest(np.repeat([0, 1, 2], [50, 50, count]))
    part = parts_of(make_split(frame, CLASSES, DataSpec(val_fraction=0.4, test_fraction=0.4), seed=0), len(frame))
    assert all((part[frame["label"] == 2] == name).any() for name in PARTS)


def test_a_class_too_small_to_split_is_an_error() -> None:
    frame = manifest(np.repeat([0, 1, 2], [50, 50, 2]))
    with pytest.raises(DataError, match=r"class 'c' has 2 image\(s\), and 3 parts \(train, val, test\) need at least"):
        make_split(frame, CLASSES, DataSpec(), seed=0)
    split = make_split(frame, CLASSES, DataSpec(test_fraction=0.0), seed=0)
    assert len(split.test) == 0
    assert "results are on the validation images" in split.warnings[0]


# Blocks --------------------------------------------------------------------------------------------------------------


def test_blocks_are_never_shared_between_parts_and_fractions_are_honest() -> None:
    frame = world()
    for seed in range(5):
        split = make_split(frame, CLASSES, DataSpec(), seed=seed)
        assert split.kind == "blocks"
        part = parts_of(split, len(frame))
        blocks = pd.DataFrame({"block": split.blocks, "part": part})
        assert (blocks.groupby("block")["part"].nunique() == 1).all()
        for label in range(3):
            share = [(part[frame["label"] == label] == name).mean() for name in PARTS]
            np.testing.assert_allclose(share, [0.7, 0.15, 0.15], atol=0.02)
        assert split.warnings == ()


def test_blocks_that_a_group_reaches_over_stay_together() -> None:
    frame = world()
    plain = make_split(frame, CLASSES, DataSpec(split="blocks"), seed=0)
    rng = np.random.default_rng(1)
    frame["group"] = np.where(rng.random(len(frame)) < 0.02, rng.integers(0, 30, len(frame)).astype(str), None)
    split = make_split(frame, CLASSES, DataSpec(split="blocks"), seed=0)
    part = parts_of(split, len(frame))
    held = frame.assign(part=part, block=split.blocks)
    assert (held.groupby("block")["part"].nunique() == 1).all()
    assert (held[held["group"].notna()].groupby("group")["part"].nunique() == 1).all()
    assert len(np.unique(split.blocks)) == len(np.unique(plain.blocks)), "blocks keep their own names"
    assert any("reach over the borders of blocks" in note for note in split.warnings)
    inside = frame.assign(group=["in " + name for name in plain.blocks])  # a group for each block joins nothing
    same = make_split(inside, CLASSES, DataSpec(split="blocks"), seed=0)
    assert (parts_of(same, len(frame)) == parts_of(plain, len(frame))).all()
    assert not any("reach over" in note for note in same.warnings)


def test_block_names_are_their_south_west_corner() -> None:
    frame = manifest([0, 0, 0, 0], lon=[-180.0, -0.1, 0.0, 179.9], lat=[-90.0, 5.0, 10.0, 89.9])
    assert block_names(frame, 10.0).tolist() == ["lat-90_lon-180", "lat+0_lon-10", "lat+10_lon+0", "lat+80_lon+170"]
    assert block_names(frame, 0.5)[3] == "lat+89.5_lon+179.5"


def test_a_class_in_two_blocks_is_in_training_and_validation() -> None:
    # Class c fills two blocks only: one must train, one validate; that none is left for the test is said.
    common = world(2000)
    common["label"] = common["label"].clip(upper=1)
    rare = manifest([2] * 40, lon=[5.0] * 30 + [95.0] * 10, lat=[5.0] * 40)
    frame = pd.concat([common, rare], ignore_index=True)
    frame["id"] = [str(i) for i in range(len(frame))]
    split = make_split(frame, CLASSES, DataSpec(), seed=0)
    label = frame["label"].to_numpy()
    assert (label[split.train] == 2).sum() == 30
    assert (label[split.val] == 2).sum() == 10
    assert split.warnings == ("no test image of c: too few spatial blocks of it; try a smaller block_degrees",)


def test_too_few_blocks_say_what_to_set() -> None:
    frame = manifest([0, 1, 2] * 20, lon=np.linspace(10.0, 10.8, 60), lat=np.full(60, 45.0))
    with pytest.raises(DataError, match=r"lie in 1 spatial block.* set data\.block_degrees=0\.1 or data\.split=strat"):
        make_split(frame, CLASSES, DataSpec(), seed=0)
    assert make_split(frame, CLASSES, DataSpec(block_degrees=0.05), seed=0).kind == "blocks"


def test_blocks_need_coordinates() -> None:
    frame = world(100)
    frame.loc[7, "lon"] = np.nan
    with pytest.raises(DataError, match=r"1 of 100 images have none, e\.g\. /x/i00007\.png"):
        make_split(frame, CLASSES, DataSpec(split="blocks"), seed=0)
    assert make_split(world(400), CLASSES, DataSpec(split="stratified"), seed=0).kind == "stratified"
    assert make_split(frame, CLASSES[:3], DataSpec(test_fraction=0.0), seed=0).kind == "stratified"


def test_buffer_leaves_out_training_images_near_held_out_ones() -> None:
    frame = world(1500)
    plain = make_split(frame, CLASSES, DataSpec(), seed=0)
    split = make_split(frame, CLASSES, DataSpec(buffer_degrees=5.0), seed=0)
    np.testing.assert_array_equal(split.val, plain.val)
    np.testing.assert_array_equal(np.sort(np.concatenate([split.train, split.buffered])), plain.train)
    assert len(split.buffered) > 50
    place = frame[["lon", "lat"]].to_numpy()
    held_out = np.concatenate([split.val, split.test])

    def nearest(rows: np.ndarray) -> np.ndarray:  # plain, with the date line crossed
        apart = np.abs(place[rows][:, None] - place[held_out][None])
        apart[..., 0] = np.minimum(apart[..., 0], 360 - apart[..., 0])
        return apart.max(-1).min(1)

    assert nearest(split.train).min() > 5.0
    assert nearest(split.buffered).max() <= 5.0


def test_a_buffer_that_takes_everything_is_an_error() -> None:
    with pytest.raises(DataError, match=r"buffer_degrees=45 leaves no training image of 'a'"):
        make_split(world(500), CLASSES, DataSpec(buffer_degrees=45.0), seed=0)


def test_real_tiles_are_balanced_over_blocks(tiles: BlueMarble) -> None:
    split = make_split(tiles.manifest, tiles.classes, DataSpec(), seed=0)
    assert split.kind == "blocks"
    label = tiles.manifest["label"].to_numpy()
    for name, low, high in (("train", 0.6, 0.8), ("val", 0.08, 0.22), ("test", 0.08, 0.22)):
        share = np.bincount(label[split.rows(name)], minlength=6) / np.bincount(label)
        assert share.min() > low
        assert share.max() < high
    blocks = [set(split.blocks[split.rows(name)]) for name in PARTS]
    assert not blocks[0] & blocks[1]
    assert not blocks[0] & blocks[2]
    assert not blocks[1] & blocks[2]


# The folder's own parts ----------------------------------------------------------------------------------------------


def test_own_parts_are_kept() -> None:
    own = ["train", "train", "val", "test"] * 6
    frame = manifest(np.repeat([0, 1, 2], 8), split=own)
    split = make_split(frame, CLASSES, DataSpec(), seed=0)
    assert split.kind == "own"
    assert parts_of(split, 24).tolist() == own
    assert split.warnings == ()


def test_missing_validation_is_taken_from_training_only() -> None:
    frame = manifest(np.repeat([0, 1, 2], 20), split=(["train"] * 15 + ["test"] * 5) * 3)
    split = make_split(frame, CLASSES, DataSpec(val_fraction=0.2), seed=0)
    assert (frame["split"].to_numpy()[split.val] == "train").all()
    assert (len(split.train), len(split.val), len(split.test)) == (36, 9, 15)
    assert "no val part" in split.warnings[0]


def test_own_parts_without_test_say_so() -> None:
    frame = manifest(np.repeat([0, 1, 2], 4), split=["train", "train", "val", "val"] * 3)
    assert make_split(frame, CLASSES, DataSpec(), seed=0).warnings == (
        "the data has no test part of its own; results are on the validation images",
    )


def test_own_parts_lacking_a_class_are_refused() -> None:
    frame = manifest([0, 1, 2, 0, 1], split=["train", "train", "train", "val", "val"])
    with pytest.raises(DataError, match="class 'c' has no validation image"):
        make_split(frame, CLASSES, DataSpec(), seed=0)


# Groups --------------------------------------------------------------------------------------------------------------


def grouped(count: int = 600, groups: int = 40, seed: int = 0, **columns) -> pd.DataFrame:
    """Images of unequal groups; every tenth image has none."""
    rng = np.random.default_rng(seed)
    group = [None if i % 10 == 0 else f"flight{g}" for i, g in enumerate((rng.random(count) ** 2 * groups).astype(int))]
    return manifest(rng.integers(0, 3, count), group=group, **columns)


def test_auto_never_lets_a_group_into_two_parts() -> None:
    lon = np.linspace(-100, 100, 600)
    for frame in (grouped(), grouped(lon=lon, lat=lon / 2)):
        for seed in range(3):
            split = make_split(frame, CLASSES, DataSpec(), seed=seed)
            assert (split.kind, split.blocks, split.warnings) == ("group", None, ())
            part = pd.Series(parts_of(split, len(frame)))
            assert (part.groupby(frame["group"]).nunique() == 1).all()
            for label in range(3):
                share = [(part[frame["label"] == label] == name).mean() for name in PARTS]
                np.testing.assert_allclose(share, [0.7, 0.15, 0.15], atol=0.05)


def test_an_image_without_a_group_is_its_own() -> None:
    frame = manifest([0, 0, 1], group=["i00001", None, "i00001"])
    assert len(set(group_names(frame))) == 2


def test_groups_that_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"data\.split=group needs a table with a column group"):
        make_split(world(50), CLASSES, DataSpec(split="group"), seed=0)
    frame = manifest([0, 1, 2] * 4, group=["a"] * 6 + ["b"] * 6)
    with pytest.raises(DataError, match=r"the images are of 2 group\(s\), and 3 parts need .*; name more groups"):
        make_split(frame, CLASSES, DataSpec(), seed=0)
    frame = manifest([0] * 9 + [1] * 9 + [2] * 2, group=[f"g{i // 3}" for i in range(18)] + ["rare"] * 2)
    split = make_split(frame, CLASSES, DataSpec(), seed=0)
    assert any("image of c: too few groups of it" in note for note in split.warnings)


def test_validation_taken_from_own_training_keeps_groups_whole() -> None:
    frame = grouped()
    frame["split"] = ["test" if str(g) in ("flight0", "flight1", "flight2") else "train" for g in frame["group"]]
    split = make_split(frame, CLASSES, DataSpec(), seed=0)
    part = pd.Series(parts_of(split, len(frame)))
    assert split.kind == "own"
    assert (part.groupby(frame["group"]).nunique() == 1).all()


def test_images_with_the_same_pixels_stay_together_in_a_stratified_split() -> None:
    frame = manifest(np.repeat([0, 1, 2], 60))
    contents = pd.DataFrame({"pixels": [f"p{i // 4}" for i in range(180)]})
    for spec in (DataSpec(), DataSpec(folds=3)):
        part = pd.Series(parts_of(make_split(frame, CLASSES, spec, seed=0, contents=contents), 180))
        assert (part.groupby(contents["pixels"]).nunique() == 1).all()
    alone = make_split(frame, CLASSES, DataSpec(), 0, pd.DataFrame({"pixels": [f"p{i}" for i in range(180)]}))
    np.testing.assert_array_equal(alone.train, make_split(frame, CLASSES, DataSpec(), 0).train)


# Several labels an image ---------------------------------------------------------------------------------------------


def tagged(count: int = 900, seed: int = 0, **columns) -> pd.DataFrame:
    """Images with none to three of three labels, the third of them rare and only beside the first."""
    rng = np.random.default_rng(seed)
    held = rng.random((count, 3)) < [0.5, 0.2, 0.03]
    held[:, 2] &= held[:, 0]
    frame = manifest(np.zeros(count, dtype=int), **columns)
    frame["labels"] = [tuple(np.flatnonzero(row).tolist()) for row in held]
    frame["label"] = [max(labels, default=0) for labels in frame["labels"]]
    return frame


def shares(frame: pd.DataFrame, part: np.ndarray, names=PARTS) -> np.ndarray:
    """(parts, K): the share of the images of each label in each part."""
    held = np.array([[label in labels for label in range(3)] for labels in frame["labels"]])
    return np.array([held[part == name].sum(axis=0) for name in names]) / held.sum(axis=0)


def test_every_label_keeps_its_share_in_every_part() -> None:
    frame = tagged()
    for seed in range(3):
        part = parts_of(make_split(frame, CLASSES, DataSpec(), seed=seed), len(frame))
        np.testing.assert_allclose(shares(frame, part)[:, :2], [[0.7] * 2, [0.15] * 2, [0.15] * 2], atol=0.01)
        np.testing.assert_allclose(shares(frame, part)[:, 2], [0.7, 0.15, 0.15], atol=0.08)
        bare = np.array([not labels for labels in frame["labels"]])
        np.testing.assert_allclose([(part[bare] == name).mean() for name in PARTS], [0.7, 0.15, 0.15], atol=0.02)
    again, other = (make_split(frame, CLASSES, DataSpec(), seed=s) for s in (2, 3))
    assert set(np.flatnonzero(part == "test")) == set(again.test) != set(other.test)


def test_labels_of_whole_groups_and_blocks() -> None:
    group = [f"flight{i % 60}" for i in range(900)]
    lon = np.random.default_rng(1).uniform(-170, 170, 900)
    for frame, kind in ((tagged(group=group), "group"), (tagged(lon=lon, lat=lon / 3), "blocks")):
        split = make_split(frame, CLASSES, DataSpec(), seed=0)
        assert split.kind == kind
        part = parts_of(split, len(frame))
        units = group_names(frame) if kind == "group" else split.blocks
        assert (pd.Series(part).groupby(units).nunique() == 1).all()
        np.testing.assert_allclose(shares(frame, part)[:, :2], [[0.7] * 2, [0.15] * 2, [0.15] * 2], atol=0.06)
        assert (shares(frame, part)[:, 2] > 0).all()


@pytest.mark.parametrize("kind", ["stratified", "group"])
def test_folds_of_several_labels(kind: str) -> None:
    frame = tagged(group=[f"flight{i % 60}" for i in range(900)])
    fold = make_split(frame, CLASSES, DataSpec(folds=4, split=kind), seed=0).folds
    tolerance = {"stratified": 0.01, "group": 0.06}[kind]
    np.testing.assert_allclose(shares(frame, fold, range(4))[:, :2], 0.25, atol=tolerance)
    for number in range(4):
        split = make_split(frame, CLASSES, DataSpec(folds=4, split=kind, fold=number), seed=0)
        np.testing.assert_array_equal(split.test, np.flatnonzero(fold == number))
        if kind == "group":
            assert (pd.Series(parts_of(split, 900)).groupby(frame["group"]).nunique() == 1).all()


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_rare_label_is_in_every_part(count: int) -> None:
    frame = tagged()
    frame["labels"] = [
        (0, 2) if row < count else tuple(set(labels) - {2}) for row, labels in enumerate(frame["labels"])
    ]
    for seed in range(5):
        part = parts_of(make_split(frame, CLASSES, DataSpec(), seed=seed), len(frame))
        assert set(part[:count]) == set(PARTS)
    with pytest.raises(DataError, match=r"class 'c' has 0 image\(s\), and 3 parts"):
        make_split(frame.assign(labels=[(0, 1)] * 900), CLASSES, DataSpec(), seed=0)


# Folds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stratified", "group", "blocks"])
def test_every_image_is_tested_once_over_the_folds(kind: str) -> None:
    frame = grouped() if kind == "group" else world(600)
    if kind == "stratified":
        frame[["lon", "lat"]] = np.nan
    tested = np.zeros(len(frame), dtype=int)
    for fold in range(4):
        split = make_split(frame, CLASSES, DataSpec(folds=4, fold=fold), seed=0)
        assert split.kind == kind
        part = parts_of(split, len(frame))
        assert (part != "").all()
        tested[split.test] += 1
        np.testing.assert_array_equal(np.flatnonzero(split.folds == fold), split.test)
        assert 0.15 < (part == "test").mean() < 0.35
        assert 0.10 < (part == "val").mean() < 0.20
        units = {"group": group_names(frame), "blocks": split.blocks}.get(kind)
        if units is not None:
            assert (pd.Series(part).groupby(units).nunique() == 1).all()
        assert split.described.endswith(f", fold {fold} of 0 to 3")
    assert (tested == 1).all()


def test_folds_that_cannot_be_made() -> None:
    for frame, message in (
        (manifest([0] * 9 + [1] * 9 + [2] * 3), r"class 'c' has 3 image\(s\), and each fold needs .*at most 3 folds"),
        (manifest([0, 1, 2] * 9, group=[f"g{i // 9}" for i in range(27)]), r"lie in 3 group\(s\)"),
        (manifest([0, 1, 2] * 9, split=["train"] * 27), r"the data has its own train, val and test; .*set data\.split"),
    ):
        with pytest.raises(DataError, match=message):
            make_split(frame, CLASSES, DataSpec(folds=4), seed=0)


# Limit ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [9, 10, 60, 100, 399])
def test_limit_is_exact_balanced_and_a_subset(limit: int) -> None:
    frame = world()
    whole = make_split(frame, CLASSES, DataSpec(), seed=0)
    split = make_split(frame, CLASSES, DataSpec(limit=limit), seed=0)
    assert sum(len(split.rows(name)) for name in PARTS) == limit
    for name in PARTS:
        assert set(split.rows(name)) <= set(whole.rows(name))
        counts = np.bincount(frame["label"].to_numpy()[split.rows(name)], minlength=3)
        assert counts.max() - counts.min() <= 1
        assert counts.min() >= 1


def test_limit_takes_from_large_classes_what_small_ones_lack() -> None:
    frame = manifest(np.repeat([0, 1, 2], [500, 500, 10]))
    split = make_split(frame, CLASSES, DataSpec(limit=200), seed=0)
    counts = np.bincount(frame["label"].to_numpy()[split.train], minlength=3)
    assert counts.sum() + len(split.val) + len(split.test) == 200
    assert counts[2] == 6  # all of them
    assert abs(counts[0] - counts[1]) <= 1


def test_limit_above_the_data_changes_nothing_and_below_the_classes_is_an_error() -> None:
    frame = world(300)
    np.testing.assert_array_equal(
        make_split(frame, CLASSES, DataSpec(limit=10_000), seed=0).train,
        make_split(frame, CLASSES, DataSpec(), seed=0).train,
    )
    with pytest.raises(DataError, match=r"data\.limit=8 is too small for 3 classes in 3 parts .* at least 9"):
        make_split(frame, CLASSES, DataSpec(limit=8), seed=0)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_saved_split_comes_back_for_another_order_of_rows(tmp_path: Path) -> None:
    frame = world(500)
    split = make_split(frame, CLASSES, DataSpec(limit=300), seed=0)
    split.save(tmp_path / "split.parquet", frame)
    shuffled = frame.sample(frac=1.0, random_state=0).reset_index(drop=True)
    loaded = Split.load(tmp_path / "split.parquet", shuffled)
    assert loaded.kind == "file"
    for name in PARTS:
        assert set(shuffled["id"][loaded.rows(name)]) == set(frame["id"][split.rows(name)])
    used = np.concatenate([loaded.train, loaded.val, loaded.test])
    np.testing.assert_array_equal(loaded.blocks[used], block_names(shuffled, 10.0)[used])


def test_split_files_that_do_not_fit(tmp_path: Path) -> None:
    frame = world(100)
    path = tmp_path / "split.parquet"
    make_split(frame, CLASSES, DataSpec(), seed=0).save(path, frame)
    with pytest.raises(DataError, match=r"50 of 100 images are not in the data, e\.g\. 'i00050'; the data has changed"):
        Split.load(path, frame.iloc[:50])
    table = pd.read_parquet(path)
    pd.concat([table, table.iloc[:1]]).to_parquet(path)
    with pytest.raises(DataError, match="id 'i00000' appears twice"):
        Split.load(path, frame)
    table.assign(split="dev").to_parquet(path)
    with pytest.raises(DataError, match="split 'dev' is unknown; allowed are train, val and test"):
        Split.load(path, frame)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"split\.parquet: cannot be read as a split"):
        Split.load(path, frame)


def test_a_split_file_of_the_recipe(tmp_path: Path) -> None:
    frame = world(400)
    made = make_split(frame, CLASSES, DataSpec(folds=5, fold=2), seed=0)
    table = made.table(frame)
    assert list(table.columns) == ["id", "path", "split", "block", "fold"]
    path = tmp_path / "split.csv"
    table.to_csv(path, index=False)
    spec = DataSpec(split_file=str(path))
    split = make_split(frame, CLASSES, spec, seed=9)
    assert (split.kind, split.warnings) == ("file", ())
    for name in PARTS:
        np.testing.assert_array_equal(split.rows(name), made.rows(name))
    np.testing.assert_array_equal(split.blocks, made.blocks)

    table[table["split"] != "test"].to_csv(path, index=False)
    first, second = make_split(frame, CLASSES, spec, seed=9).warnings
    assert "of 400 images are not in" in first
    assert "has no test part" in second
    assert len(make_split(frame, CLASSES, DataSpec(split_file=str(path), limit=60), seed=0).train) < 60

    table.assign(split=table["split"].replace("val", "train")).to_csv(path, index=False)
    with pytest.raises(DataError, match="class 'a' has no validation image"):
        make_split(frame, CLASSES, spec, seed=0)
    table.rename(columns={"split": "Split"}).to_csv(path, index=False)
    with pytest.raises(DataError, match=r"no column 'split'; .*did you mean 'Split'"):
        make_split(frame, CLASSES, spec, seed=0)


def test_all_test() -> None:
    split = Split.all_test(world(10))
    assert (len(split.train), len(split.val), split.test.tolist()) == (0, 0, list(range(10)))
