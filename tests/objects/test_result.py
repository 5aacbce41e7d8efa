import json

import numpy as np
import pandas as pd
import pytest

from r2kit.objects.coco import average_precision
from r2kit.result.detection import best_score, compute, make_table, read_objects, summary_lines
from tests.objects.test_coco import scene

CLASSES = ("car", "bus", "ship")


def stored(count=8, masks=False, groups=None, seed=0):
    rng = np.random.default_rng(seed)
    found, truth = zip(*(scene(rng, crowd=True, masks=masks) for _ in range(count)), strict=True)
    images = pd.DataFrame(
        {
            "id": [f"{i}.png" for i in range(count)],
            "path": [f"d/{i}.png" for i in range(count)],
            "height": 100,
            "width": 128,
            "group": [None] * count if groups is None else groups,
            "lon": np.nan,
            "lat": np.nan,
        }
    )
    return make_table(images, found, truth, CLASSES), found, truth


@pytest.mark.parametrize("masks", [False, True])
def test_the_table_keeps_everything(tmp_path, masks):
    table, found, truth = stored(masks=masks)
    table.to_parquet(tmp_path / "t.parquet", index=False)
    images, ours, theirs = read_objects(pd.read_parquet(tmp_path / "t.parquet"), CLASSES)
    assert len(images) == 8
    for before, after in ((found, ours), (truth, theirs)):
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new["boxes"], old["boxes"].astype(np.float32))
            np.testing.assert_array_equal(new["labels"], old["labels"])
            for key in ("scores", "crowd"):
                if key in old:
                    np.testing.assert_array_equal(new[key], old[key])
            if masks:
                assert new["masks"] == old["masks"]


def test_the_figures_are_the_librarys_with_intervals_around_them():
    table, found, truth = stored(24)
    result = compute(table, CLASSES, split="test")
    library = average_precision(found, truth, 3)
    for name in ("map", "map_50", "map_75"):
        interval = result[name]
        assert interval["value"] == pytest.approx(library[name], abs=1e-6)
        assert interval["low"] < interval["value"] < interval["high"]
        assert interval["units"] == "images"
    assert result["map_small"] == pytest.approx(library["map_small"])
    assert [row["map"] for row in result["per_class"]] == pytest.approx(library["per_class"])
    assert sum(row["objects"] for row in result["per_class"]) == result["objects"]
    assert sum(result["objects_by_size"].values()) == result["objects"]
    json.dumps(result, allow_nan=False)
    assert result == compute(table, CLASSES, split="test")
    said = "\n".join(summary_lines(result))
    assert "95 % interval" in said
    assert "by class: car" in said
    assert (
        f"small (up to 32 x 32 pixels) {100 * result['map_small']:.1f} % ({result['objects_by_size']['small']})" in said
    )


def test_groups_are_drawn_whole():
    table, *_ = stored(24, groups=[f"g{i // 4}" for i in range(24)])
    result = compute(table, CLASSES, split="test")
    assert result["map"]["units"] == "groups"
    assert result["map"]["n"] == 6


def test_masks_have_figures_beside_their_boxes():
    table, found, truth = stored(6, masks=True)
    result = compute(table, CLASSES, split="val", outlines=True)
    assert result["task"] == "instance"
    assert result["map"]["value"] == pytest.approx(average_precision(found, truth, 3, outlines=True)["map"], abs=1e-6)
    assert result["boxes"]["map"]["value"] == pytest.approx(average_precision(found, truth, 3)["map"], abs=1e-6)
    assert "average precision of boxes" in summary_lines(result)[-1] or "note" in summary_lines(result)[-1]


def test_nothing_found_is_zero_and_no_object_is_unknown():
    table, _, _truth = stored(5)
    none = table[table["kind"] != "found"]
    result = compute(none, CLASSES, split="test")
    assert result["map"]["value"] == 0.0
    assert result["best_score"] is None
    result = compute(table[table["kind"] != "truth"], CLASSES, split="test")
    assert result["map"]["value"] is None
    assert result["empty_images"] == 5
    assert "not known" in "\n".join(summary_lines(result))
    json.dumps(result, allow_nan=False)


def test_best_score_against_every_threshold():
    _, found, truth = stored(10, seed=3)
    best = best_score(found, truth, 3)
    assert best is not None
    from r2kit.objects.coco import match

    for threshold in np.unique(np.concatenate([f["scores"] for f in found])):
        hits = taken = objects = 0
        for ours, theirs in zip(found, truth, strict=True):
            for item in match(ours, theirs, 3):
                chosen = (item.scores >= threshold) & ~item.ignored[0]
                hits += int(item.right[0][chosen].sum())
                taken += int(chosen.sum())
                objects += item.objects
        f1 = 2 * hits / (taken + objects)
        assert f1 <= best["f1"] + 1e-12
        if threshold == best["score"]:
            assert f1 == pytest.approx(best["f1"])
            assert best["recall"] == pytest.approx(hits / objects)
