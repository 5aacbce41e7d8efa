from itertools import pairwise

import numpy as np
import pytest

from r2kit.data.placement import cut_boxes
from r2kit.data.tiles import cut_by_tile, merge_tiles, tile_windows


@pytest.mark.parametrize("shape", [(100, 100), (64, 64), (37, 300), (501, 333), (65, 64), (20, 20)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_tiles_cover_every_pixel_with_the_overlap(shape, overlap):
    windows = tile_windows(shape, (64, 64), overlap)
    seen = np.zeros(shape, dtype=int)
    for top, left, height, width in windows:
        assert height == min(64, shape[0])
        assert width == min(64, shape[1])
        assert top + height <= shape[0]
        assert left + width <= shape[1]
        seen[top : top + height, left : left + width] += 1
    assert seen.min() == 1 or overlap > 0
    assert len(set(windows)) == len(windows)
    for axis in (0, 1):
        starts = sorted({window[axis] for window in windows})
        assert all(b - a <= 64 * (1 - overlap) for a, b in pairwise(starts))


def test_an_image_of_one_tile_is_itself():
    assert tile_windows((64, 64), (64, 64), 0.5) == [(0, 0, 64, 64)]
    assert tile_windows((10, 30), (64, 64), 0.5) == [(0, 0, 10, 30)]


def found_in_tiles(boxes, shape, tile, overlap):
    """A detector that finds whatever it sees of every box, and is surer of small pieces."""
    rows = []
    for window in tile_windows(shape, (tile, tile), overlap):
        inside, kept = cut_boxes(boxes, window, 0.05)
        placed = inside + np.array([window[1], window[0]] * 2, dtype=np.float32)
        cut = cut_by_tile(placed, window, shape)
        rows += [(box, 0.9 if c else 0.6, 1 + k % 2, c) for box, c, k in zip(placed, cut, kept, strict=True)]
    columns = zip(*rows, strict=True)
    types = (np.float32, np.float32, np.int64, bool)
    return [np.array(column, dtype=kind) for column, kind in zip(columns, types, strict=True)]


def test_an_object_seen_by_several_tiles_is_one_object():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cells = [(x, y) for x in range(0, 280, 40) for y in range(0, 200, 40)]
        corner = np.array(cells) + rng.uniform(0, 18, (len(cells), 2))
        boxes = np.concatenate([corner, corner + rng.uniform(8, 20, corner.shape)], axis=1).astype(np.float32)
        found, scores, labels, cut = found_in_tiles(boxes, (200, 280), 96, 0.3)
        assert len(found) > len(boxes)
        kept = merge_tiles(found, scores, labels, cut, 0.5)
        order = np.lexsort(found[kept][:, :2].T)
        np.testing.assert_allclose(found[kept][order], boxes[np.lexsort(boxes[:, :2].T)], atol=1e-3)
        assert not cut[kept].any()


def test_touching_objects_and_other_classes_are_not_merged():
    boxes = np.array([[0, 0, 10, 10], [10, 0, 20, 10], [1, 0, 11, 10], [0, 0, 10, 10]], dtype=np.float32)
    scores = np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32)
    labels = np.array([1, 1, 1, 2])
    assert merge_tiles(boxes, scores, labels, np.zeros(4, dtype=bool), 0.5).tolist() == [0, 1, 3]


def test_an_object_larger_than_the_overlap_keeps_its_pieces():
    boxes = np.array([[0, 0, 60, 10], [40, 0, 100, 10]], dtype=np.float32)
    kept = merge_tiles(boxes, np.array([0.5, 0.9], np.float32), np.array([1, 1]), np.array([True, True]), 0.5)
    assert kept.tolist() == [1, 0]


def test_nothing_found_is_nothing():
    empty = np.zeros((0, 4), dtype=np.float32)
    assert merge_tiles(empty, empty[:, 0], np.zeros(0, np.int64), np.zeros(0, bool), 0.5).tolist() == []
