import numpy as np
import pytest
import torch

from r2kit.data.placement import Placement, box_area, cut_boxes
from r2kit.data.preprocess import Preprocess


def preprocess(size, resize) -> Preprocess:
    return Preprocess(("a",), (0.0,), (1.0,), 1.0, size, resize, "bilinear", ("x",))


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_boxes_follow_the_pixels(resize):
    """A bright rectangle is where its box says, after any resize, and the box comes back."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        shape = tuple(int(n) for n in rng.integers(30, 90, 2))
        size = tuple(int(n) for n in rng.integers(30, 90, 2))
        x0, y0 = (int(rng.integers(0, n - 14)) for n in shape[::-1])
        box = np.array([[x0, y0, x0 + rng.integers(6, 14), y0 + rng.integers(6, 14)]], dtype=np.float32)
        raw = np.zeros((*shape, 1), dtype=np.float32)
        a, b, c, d = box[0].astype(int)
        raw[b:d, a:c] = 1.0
        pre = preprocess(size, resize)
        placement = Placement.of(pre, shape)
        image = pre.fit(raw)[0].numpy()
        moved = placement.into(box)
        back = placement.back(moved)
        inside = cut_boxes(moved, (0, 0, *size), 0.99)[0]
        if len(inside):  # a centre crop may have lost it
            ys, xs = np.nonzero(image > 0.5)
            found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose(inside[0], found, atol=1.01)
            np.testing.assert_allclose(back, box, atol=1e-3)
        # Boxes and masks tell the same story.
        masks = placement.masks_into(raw[None, ..., 0] > 0.5)
        if len(inside) and masks.any():
            ys, xs = np.nonzero(masks[0])
            np.testing.assert_allclose(inside[0], [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.01)
            again = placement.masks_back(torch.from_numpy(masks).float())
            union = (again[0] | (raw[..., 0] > 0.5)).sum()
            assert (again[0] & (raw[..., 0] > 0.5)).sum() / union > 0.5


def test_boxes_come_back_cut_at_the_border_of_the_image():
    placement = Placement.of(preprocess((100, 100), "pad"), (50, 100))
    assert placement.target == (25, 0, 50, 100)
    assert placement.back(np.array([[-5, 0, 120, 90]], dtype=np.float32)).tolist() == [[0, 0, 100, 50]]
    assert placement.back(np.zeros((0, 4), dtype=np.float32)).shape == (0, 4)
    assert placement.masks_into(np.zeros((0, 50, 100), dtype=bool)).shape == (0, 100, 100)
    assert placement.masks_back(torch.zeros(0, 100, 100)).shape == (0, 50, 100)


def test_a_box_stays_by_its_visible_share():
    boxes = np.array([[0, 0, 10, 10], [18, 0, 28, 10], [30, 30, 40, 40], [15, 15, 25, 25]], dtype=np.float32)
    inside, kept = cut_boxes(boxes, (0, 0, 20, 20), 0.25)
    assert kept.tolist() == [0, 3]
    assert inside.tolist() == [[0, 0, 10, 10], [15, 15, 20, 20]]
    inside, kept = cut_boxes(boxes, (0, 0, 20, 20), 0.2)
    assert kept.tolist() == [0, 1, 3]
    moved, kept = cut_boxes(boxes, (10, 10, 20, 20), 0.0)  # nothing of a box outside is ever kept
    assert kept.tolist() == [3]
    assert moved.tolist() == [[5, 5, 15, 15]]


def test_area_of_boxes():
    assert box_area(np.array([[0, 0, 2, 3], [5, 5, 4, 9]], dtype=np.float32)).tolist() == [6, 0]
