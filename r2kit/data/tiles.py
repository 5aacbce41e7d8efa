"""Large images as overlapping tiles, and what was found in the tiles as one answer for the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

from r2kit.data.placement import Placement, Window
from r2kit.data.preprocess import Preprocess

_COVERED = 0.6  # share of a cut box's area inside another of its class above which it is a piece of that one
_AT_BORDER = 2.0  # pixels from a tile's inner border within which a box counts as cut by it


@dataclass(frozen=True)
class Piece:
    """A part of an image that the network sees at once: a tile, or all of it."""

    window: Window
    """Which part of the image."""
    placement: Placement
    """Where that part lies in the network's input."""
    shape: tuple[int, int]
    """(H, W) of the image."""

    def cut(self, raw: NDArray) -> NDArray:
        """Return the part of raw pixels (H, W, C)."""
        top, left, height, width = self.window
        return raw[top : top + height, left : left + width]

    def back(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move boxes (N, 4) of the network's input into pixels of the image."""
        return self.placement.back(boxes) + np.array([self.window[1], self.window[0]] * 2, dtype=np.float32)

    def mask_back(self, mask: Tensor) -> NDArray[np.bool_]:
        """Move a mask (h, w) of the network's input, as probabilities, into pixels of the image: (H, W)."""
        top, left, height, width = self.window
        whole = np.zeros(self.shape, dtype=bool)
        whole[top : top + height, left : left + width] = self.placement.masks_back(mask[None])[0]
        return whole


def pieces_of(preprocess: Preprocess, shape: Sequence[int], overlap: float) -> list[Piece]:
    """Return the pieces in which the network sees an image: overlapping tiles with ``resize='tile'``, else one.

    Args:
        preprocess: Size of the network's input, and how images reach it.
        shape: (H, W) of the image.
        overlap: As of `tile_windows`.
    """
    whole = (int(shape[0]), int(shape[1]))
    if preprocess.resize != "tile":
        return [Piece((0, 0, *whole), Placement.of(preprocess, whole), whole)]
    windows = tile_windows(whole, preprocess.size, overlap)
    return [Piece(window, Placement.of(preprocess, window[2:]), whole) for window in windows]


def tile_windows(shape: Sequence[int], tile: Sequence[int], overlap: float) -> list[Window]:
    """Cut an image into tiles of one size that cover it.

    The last tile of a row or column is moved back to end at the border, so that no tile holds invented pixels; tiles
    lie evenly. An image that is smaller than a tile in one direction is cut in the other only.

    Args:
        shape: (H, W) of the image.
        tile: (H, W) of a tile in pixels.
        overlap: Smallest share of a tile's side that it shares with its neighbour, in [0, 1).

    Returns:
        Windows in reading order.
    """
    rows, columns = (_starts(int(length), side, overlap) for length, side in zip(shape[:2], tile, strict=True))
    height, width = min(tile[0], int(shape[0])), min(tile[1], int(shape[1]))
    return [(top, left, height, width) for top in rows for left in columns]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where the tiles of one direction begin."""
    if length <= tile:
        return [0]
    step = max(1, int(tile * (1.0 - overlap)))
    count = -(-(length - tile) // step) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def cut_by_tile(boxes: NDArray[np.float32], window: Window, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Tell which boxes touch a border of their tile that is no border of the image.

    Args:
        boxes: (N, 4) in pixels of the image.
        window: The tile.
        shape: (H, W) of the image.
    """
    top, left, height, width = window
    inner = np.zeros(len(boxes), dtype=bool)
    if left > 0:
        inner |= boxes[:, 0] < left + _AT_BORDER
    if top > 0:
        inner |= boxes[:, 1] < top + _AT_BORDER
    if left + width < shape[1]:
        inner |= boxes[:, 2] > left + width - _AT_BORDER
    if top + height < shape[0]:
        inner |= boxes[:, 3] > top + height - _AT_BORDER
    return inner


def merge_tiles(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    cut: NDArray[np.bool_],
    iou: float,
) -> NDArray[np.int64]:
    """Choose among boxes found in overlapping tiles, so that an object seen by several tiles is one object.

    Class by class: non-maximum suppression among the boxes that no tile border cuts. A cut box is then left out where
    most of it lies inside a box that stays, whatever their scores: it is a piece of that object. The rest of the cut
    boxes, of objects larger than the overlap, goes through non-maximum suppression too, larger pieces first.

    Args:
        boxes: (N, 4) in pixels of the image.
        scores: (N,).
        labels: (N,).
        cut: (N,) as `cut_by_tile` says.
        iou: Intersection over union above which the lower-scored of two boxes of one class is left out.

    Returns:
        Positions of the boxes that stay, by falling score.
    """
    kept: list[int] = []
    for label in np.unique(labels):
        of_class = labels == label
        whole, pieces = np.flatnonzero(of_class & ~cut), np.flatnonzero(of_class & cut)
        stay = [int(whole[i]) for i in _nms(boxes[whole], scores[whole], iou)]
        area = (boxes[pieces, 2] - boxes[pieces, 0]) * (boxes[pieces, 3] - boxes[pieces, 1])
        for at in pieces[np.argsort(-area, kind="stable")]:
            if not stay or _covered(boxes[at], boxes[stay]) < _COVERED:
                stay.append(int(at))
        kept += [stay[i] for i in _nms(boxes[stay], scores[stay], iou)] if len(pieces) else stay
    chosen = np.array(kept, dtype=np.int64)
    return chosen[np.argsort(-scores[chosen], kind="stable")]


def _nms(boxes: NDArray[np.float32], scores: NDArray[np.float32], iou: float) -> list[int]:
    """Positions that survive non-maximum suppression."""
    return nms(torch.from_numpy(boxes), torch.from_numpy(scores), iou).tolist()


def _covered(box: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Largest share of a box's area that lies in one of the others."""
    corner = np.concatenate([np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])], axis=1)
    sides = np.clip(corner[:, 2:] - corner[:, :2], 0.0, None)
    area = max(float((box[2] - box[0]) * (box[3] - box[1])), 1e-6)
    return float((sides[:, 0] * sides[:, 1]).max() / area)
