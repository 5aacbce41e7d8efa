import numpy as np
import pytest

from r2kit.errors import DataError
from r2kit.objects.anchors import LEVELS, RATIOS, fit_anchors, standard_anchors


def best_overlap(anchors, sides):
    """Intersection over union of each box with the anchor that fits best, both around one centre."""
    both = np.minimum(np.asarray(sides)[:, None], anchors.boxes[None]).prod(axis=2)
    union = np.asarray(sides).prod(axis=1)[:, None] + anchors.boxes.prod(axis=1)[None] - both
    return (both / union).max(axis=1)


def boxes(count=400, side=14.0, ratio=2.5, seed=0):
    rng = np.random.default_rng(seed)
    size = side * np.exp(rng.normal(0, 0.2, count))
    shape = ratio ** np.sign(rng.normal(size=count))
    return np.stack([size / np.sqrt(shape), size * np.sqrt(shape)], axis=1)


def test_standard_anchors():
    assert standard_anchors("faster_rcnn", "natural").sizes == ((32,), (64,), (128,), (256,), (512,))
    assert standard_anchors("faster_rcnn", "small").sizes == ((8,), (16,), (32,), (64,), (128,))
    retina = standard_anchors("retinanet", "natural").sizes  # of torchvision, which rounds down to whole pixels
    assert [[int(side) for side in level] for level in retina[:2]] == [[32, 40, 50], [64, 80, 101]]
    assert standard_anchors("retinanet", "small").sizes[0][0] == 16


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_anchors_follow_the_data(kind):
    sides = boxes()
    fitted = fit_anchors(kind, sides)
    standard = standard_anchors(kind, "small")
    assert len(fitted.sizes) == len(LEVELS[kind])
    assert {len(level) for level in fitted.sizes} == {len(level) for level in standard.sizes}
    assert len(fitted.ratios) == len(RATIOS)
    flat = [side for level in fitted.sizes for side in level]
    assert flat == sorted(flat)
    assert best_overlap(fitted, sides).mean() > best_overlap(standard, sides).mean() + 0.03
    assert best_overlap(fitted, sides).mean() > 0.75
    assert fitted == fit_anchors(kind, sides)


def test_boxes_of_one_size_still_give_every_level_an_anchor():
    fitted = fit_anchors("retinanet", np.full((60, 2), 20.0))
    flat = [side for level in fitted.sizes for side in level]
    assert flat[0] == pytest.approx(20.0)
    assert len(set(flat)) == 15
    assert fitted.ratios[0] == pytest.approx(1.0)


def test_too_few_boxes_measure_nothing():
    with pytest.raises(DataError, match="at least 50 training boxes, and there are 3"):
        fit_anchors("faster_rcnn", boxes(3))
