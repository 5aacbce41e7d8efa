import math

import numpy as np
import pytest

from r2kit.objects.coco import PrecisionOf, average_precision, count_sizes, match, pack_mask, unpack_mask


def precision_of(matches):
    return tuple(PrecisionOf(matches)(np.ones((1, len(matches))))[0])


def scene(rng, classes=3, crowd=False, masks=False):
    """True boxes, and detections that are near them, elsewhere or of another class."""
    count = int(rng.integers(0, 8))
    corner = rng.uniform(0, 70, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(4, 50, (count, 2))], axis=1)
    labels = rng.integers(1, classes + 1, count)
    kept = rng.random(count) < 0.85
    near = boxes[kept] + rng.normal(0, 2.5, (int(kept.sum()), 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    stray = rng.uniform(0, 60, (int(rng.integers(0, 4)), 2))
    stray = np.concatenate([stray, stray + 15], axis=1)
    found = np.concatenate([near, stray])
    truth = {"boxes": boxes, "labels": labels, "crowd": (rng.random(count) < 0.3) & crowd}
    result = {
        "boxes": found,
        "scores": rng.choice(np.linspace(0.1, 1, 12), len(found)),  # with ties
        "labels": np.concatenate([labels[kept], rng.integers(1, classes + 1, len(stray))]),
    }
    if masks:
        for item in (truth, result):
            item["masks"] = []
            for box in item["boxes"]:
                mask = np.zeros((100, 128), dtype=bool)
                x0, y0, x1, y1 = np.clip(box, 0, 128).astype(int)
                mask[y0:y1, x0:x1] = True
                item["masks"].append(pack_mask(mask))
                np.testing.assert_array_equal(unpack_mask(item["masks"][-1]), mask)
    return result, truth


@pytest.mark.parametrize(
    ("crowd", "masks", "most"), [(False, False, 100), (True, False, 100), (True, True, 100), (False, False, 2)]
)
def test_matches_give_what_the_library_gives(crowd, masks, most):
    rng = np.random.default_rng(1)
    found, truth = zip(*(scene(rng, crowd=crowd, masks=masks) for _ in range(12)), strict=True)
    # torchmetrics wants three different limits; the last one counts.
    most = max(most, 3)
    figures = average_precision(found, truth, 3, outlines=masks, max_detections=most)
    matches = [match(f, t, 3, outlines=masks, max_detections=most) for f, t in zip(found, truth, strict=True)]
    ours = precision_of(matches)
    np.testing.assert_allclose(ours, [figures["map"], figures["map_50"], figures["map_75"]], atol=1e-6)
    assert 0.05 < ours[0] < 0.95
    np.testing.assert_allclose(np.nanmean(figures["per_class"]), figures["map"], atol=1e-6)


def test_perfect_detections():
    truth = {"boxes": np.array([[0, 0, 10, 10], [20, 20, 80, 80.0]]), "labels": np.array([1, 3]), "crowd": np.zeros(2)}
    found = {"boxes": truth["boxes"], "labels": truth["labels"], "scores": np.array([0.9, 0.8])}
    figures = average_precision([found], [truth], 4)
    assert figures["map"] == figures["map_50"] == figures["map_75"] == pytest.approx(1.0)
    assert figures["map_small"] == figures["map_medium"] == pytest.approx(1.0)
    assert math.isnan(figures["map_large"])
    assert count_sizes([truth, truth]) == {"small": 2, "medium": 2, "large": 0}
    assert figures["recall"] == pytest.approx(1.0)
    assert figures["per_class"][0] == pytest.approx(1.0)
    assert figures["per_class"][2] == pytest.approx(1.0)
    assert math.isnan(figures["per_class"][1])
    assert math.isnan(figures["per_class"][3])
    assert precision_of([match(found, truth, 4)]) == pytest.approx((1.0, 1.0, 1.0))


def nothing(**more):
    return {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), **{key: np.zeros(0) for key in more}}


def test_images_without_objects_or_detections():
    rng = np.random.default_rng(3)
    found, truth = scene(rng, masks=True)
    empty_truth, empty_found = {**nothing(crowd=1), "masks": []}, {**nothing(scores=1), "masks": []}
    # What is found where nothing is lowers the figure of masks too.
    for masks in (False, True):
        best = {**truth, "scores": np.linspace(1, 0.5, len(truth["labels"]))}
        surer = {**best, "scores": best["scores"] + 1}
        assert average_precision([best], [truth], 3, outlines=masks)["map"] == pytest.approx(1.0)
        wrong = average_precision([best, surer], [truth, empty_truth], 3, outlines=masks)["map"]
        assert wrong == pytest.approx(precision_of([match(best, truth, 3), match(surer, empty_truth, 3)])[0])
        assert wrong < 0.8
    # A detection where nothing is lowers the figure; an empty image without one does not change it.
    alone = average_precision([found], [truth], 3)["map"]
    assert average_precision([found, empty_found], [truth, empty_truth], 3)["map"] == pytest.approx(alone)
    assert math.isnan(average_precision([empty_found], [empty_truth], 3)["map"])
    assert math.isnan(precision_of([match(empty_found, empty_truth, 3)])[0])
    assert average_precision([empty_found], [truth], 3)["map"] == 0.0
    assert precision_of([match(empty_found, truth, 3)])[0] == 0.0
    assert math.isnan(average_precision([found], [empty_truth], 3)["map"])


def test_a_missing_extra_is_named(monkeypatch):
    import importlib.util

    from r2kit.errors import MissingExtraError

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "faster_coco" in name else real(name))
    with pytest.raises(MissingExtraError, match=r"r2kit\[det\]"):
        average_precision([nothing(scores=1)], [nothing(crowd=1)], 2)


def test_an_image_that_counts_twice_counts_as_two():
    rng = np.random.default_rng(2)
    found, truth = zip(*(scene(rng, crowd=True) for _ in range(9)), strict=True)
    for item in found:
        item["scores"] = rng.random(len(item["scores"]))
    matches = [match(f, t, 3) for f, t in zip(found, truth, strict=True)]
    some = PrecisionOf(matches)(np.array([[1, 0, 1, 1, 0, 0, 1, 1, 1.0]]))[0]
    np.testing.assert_allclose(some, precision_of([matches[i] for i in (0, 2, 3, 6, 7, 8)]))
    twice = PrecisionOf(matches)(np.full((1, 9), 2.0))[0]
    np.testing.assert_allclose(twice, precision_of(matches + matches), atol=0.02)
