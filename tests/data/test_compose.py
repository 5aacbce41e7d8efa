"""Mosaic and copy-paste: every box lies on the pixels it was drawn around."""

import numpy as np
import pytest

from r2kit.data.compose import copy_paste, mosaic
from r2kit.data.targets import BoxTarget


def picture(seed, shape=(60, 80), masks=False, count=5, side=9):
    """A grey image with rectangles that do not touch; the value of object i of image s is 100 * s + i + 1."""
    rng = np.random.default_rng(seed)
    image = np.full((*shape, 2), 7, dtype=np.uint16)
    cells = [(x, y) for x in range(0, shape[1] - side, side + 3) for y in range(0, shape[0] - side, side + 3)]
    boxes = []
    for value, cell in enumerate(rng.permutation(len(cells))[:count]):
        (x, y), (w, h) = cells[cell], rng.integers(4, side + 1, 2)
        image[y : y + h, x : x + w] = 100 * (seed + 1) + value + 1
        boxes.append([x, y, x + w, y + h])
    target = BoxTarget(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        rng.integers(1, 4, count),
        np.zeros(count, dtype=bool),
        np.stack([image[..., 0] == 100 * (seed + 1) + i + 1 for i in range(count)]) if masks and count else None,
    )
    return image, target


def check(image, target, masks):
    """Each box holds one object and nothing else, and each mask is exactly the object."""
    for index, (x0, y0, x1, y1) in enumerate(target.boxes.astype(int)):
        inside = np.unique(image[y0:y1, x0:x1, 0])
        assert len(inside) == 1
        assert inside[0] > 100
        if masks:
            np.testing.assert_array_equal(target.masks[index], image[..., 0] == inside[0])


@pytest.mark.parametrize("masks", [False, True])
def test_mosaic_keeps_boxes_on_their_objects(masks):
    fill = np.array([7.0, 7.0])
    kept = 0
    for seed in range(20):
        samples = [picture(4 * seed + i, masks=masks, shape=(60 + 5 * i, 80 - 7 * i)) for i in range(4)]
        image, target = mosaic(samples, fill, 0.5, np.random.default_rng(seed))
        assert image.shape == samples[0][0].shape
        assert image.dtype == np.uint16
        check(image, target, masks)
        assert (target.masks is not None) == masks
        kept += len(target.boxes)
        # What is left in the picture and has no box is less than half of an object.
        seen = {int(image[int(y0), int(x0), 0]) for x0, y0, _, _ in target.boxes}
        for sample, (_, source) in zip(samples, samples, strict=True):
            for x0, y0, x1, y1 in source.boxes.astype(int):
                value = int(sample[0][y0, x0, 0])
                if value not in seen:
                    assert (image[..., 0] == value).sum() < 0.5 * (x1 - x0) * (y1 - y0)
    assert kept > 100


def test_mosaic_fills_where_images_are_smaller_than_their_window():
    big, small = picture(0, shape=(90, 90)), picture(1, shape=(12, 12), count=0)
    image, target = mosaic([small, big, big, big], np.array([3.2, 5.7]), 0.5, np.random.default_rng(0))
    assert image.shape == (12, 12, 2)
    image, target = mosaic([big, small, small, small], np.array([3.2, 5.7]), 0.5, np.random.default_rng(0))
    assert (image[-1, -1] == (3, 5)).all()
    assert target.labels.dtype == np.int64


@pytest.mark.parametrize("masks", [False, True])
def test_copy_paste_hides_nothing_and_boxes_what_it_adds(masks):
    added = 0
    for seed in range(20):
        sample, donor = picture(2 * seed, masks=masks), picture(2 * seed + 1, masks=masks, shape=(50, 70))
        before = sample[0].copy()
        image, target = copy_paste(sample, donor, np.random.default_rng(seed))
        assert (sample[0] == before).all()
        check(image, target, masks)
        count = len(sample[1].boxes)
        np.testing.assert_array_equal(target.boxes[:count], sample[1].boxes)
        added += len(target.boxes) - count
        # Nothing but the added objects has changed.
        changed = (image != before).any(axis=2)
        for x0, y0, x1, y1 in target.boxes[count:].astype(int):
            changed[y0:y1, x0:x1] = False
        assert not changed.any()
        # Classes go along.
        for box, label in zip(target.boxes[count:], target.labels[count:], strict=True):
            value = int(image[int(box[1]), int(box[0]), 0]) - 100 * (2 * seed + 2) - 1
            assert label == donor[1].labels[value]
    assert added > 20


def test_copy_paste_only_pastes_what_fits_and_no_crowds():
    tiny, donor = picture(0, shape=(5, 5), count=0), picture(1)
    image, target = copy_paste(tiny, donor, np.random.default_rng(0))
    assert len(target.boxes) == (image != tiny[0]).any()
    crowd = BoxTarget(donor[1].boxes, donor[1].labels, np.ones(5, dtype=bool))
    image, target = copy_paste(picture(2), (donor[0], crowd), np.random.default_rng(0))
    assert len(target.boxes) == 5


def test_equal_generators_make_equal_images():
    samples = [picture(i) for i in range(4)]

    def make():
        whole = mosaic(samples, np.zeros(2), 0.3, np.random.default_rng(5))
        return copy_paste(whole, samples[1], np.random.default_rng(6))

    (a, first), (b, second) = make(), make()
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.boxes, second.boxes)
