"""Where an image lies in the network's input: boxes and masks of objects there and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from r2kit.data.preprocess import Preprocess, centre_window, inner_size

Window = tuple[int, int, int, int]
"""top, left, height, width in pixels."""


@dataclass(frozen=True)
class Placement:
    """How `Preprocess.fit` puts an image of one shape into the network's input."""

    shape: tuple[int, int]
    """(H, W) of the image."""
    source: Window
    """The part of the image that is used."""
    target: Window
    """Where in the input it lies, after resizing."""
    canvas: tuple[int, int]
    """(H, W) of the input."""

    @classmethod
    def of(cls, preprocess: Preprocess, shape: Sequence[int]) -> Placement:
        """Return the placement of an image of `shape` (H, W), which for ``resize='tile'`` is at most a tile."""
        height, width = int(shape[0]), int(shape[1])
        source, target = (0, 0, height, width), (0, 0, *preprocess.size)
        if preprocess.resize == "crop":
            rows, columns = centre_window((height, width), preprocess.size)
            source = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        elif preprocess.resize == "pad":
            h, w = inner_size((height, width), preprocess.size)
            target = ((preprocess.size[0] - h) // 2, (preprocess.size[1] - w) // 2, h, w)
        elif preprocess.resize == "tile":
            target = ((preprocess.size[0] - height) // 2, (preprocess.size[1] - width) // 2, height, width)
        return cls((height, width), source, target, preprocess.size)

    def into(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move boxes (N, 4), x0 y0 x1 y1 in pixels of the image, into the input; they may reach out of it."""
        return _moved(boxes, self.source, self.target)

    def back(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move boxes (N, 4) of the input into pixels of the image, cut at its border."""
        return clipped(_moved(boxes, self.target, self.source), self.shape)

    def masks_into(self, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Move masks (N, H, W) of the image into the input: (N, h, w)."""
        top, left, height, width = self.source
        part = torch.from_numpy(np.ascontiguousarray(masks[:, top : top + height, left : left + width]))
        top, left, height, width = self.target
        result = np.zeros((len(masks), *self.canvas), dtype=bool)
        if len(masks):
            # Half of the covered area decides, so that a small object does not vanish between two sampled pixels.
            share = F.interpolate(part[:, None].float(), (height, width), mode="bilinear", antialias=True)[:, 0]
            result[:, top : top + height, left : left + width] = (share >= 0.5).numpy()
        return result

    def masks_back(self, masks: Tensor) -> NDArray[np.bool_]:
        """Move masks (N, h, w) of the input, as probabilities, into pixels of the image: (N, H, W), half or more."""
        top, left, height, width = self.target
        part = masks[:, top : top + height, left : left + width].float().cpu()
        top, left, height, width = self.source
        result = np.zeros((len(masks), *self.shape), dtype=bool)
        if len(masks):
            share = F.interpolate(part[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
            result[:, top : top + height, left : left + width] = (share >= 0.5).numpy()
        return result


def clipped(boxes: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    """Cut boxes (N, 4) at the border of an image of `shape` (H, W)."""
    limit = np.array([shape[1], shape[0], shape[1], shape[0]], dtype=np.float32)
    return np.clip(boxes, 0.0, limit).astype(np.float32)


def box_area(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Area of boxes (N, 4); zero where a side is not positive."""
    sides = np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None)
    area: NDArray[np.float32] = sides[:, 0] * sides[:, 1]
    return area


def cut_boxes(
    boxes: NDArray[np.float32], window: Window, min_visible: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Bring boxes into a window of their image.

    Args:
        boxes: (N, 4) in pixels of the image.
        window: The part that is kept.
        min_visible: A box of which less than this share of the area lies in the window is left out; the others end at
            its border.

    Returns:
        (M, 4) in pixels of the window, and (M,) which boxes these are.
    """
    top, left, height, width = window
    inside = clipped(boxes - np.array([left, top, left, top], dtype=np.float32), (height, width))
    share = box_area(inside) / np.maximum(box_area(boxes), 1e-6)
    sides = np.minimum(inside[:, 2] - inside[:, 0], inside[:, 3] - inside[:, 1])
    kept = np.flatnonzero((share >= min_visible) & (share > 0) & (sides >= 1.0))
    return inside[kept], kept


def _moved(boxes: NDArray[np.float32], source: Window, target: Window) -> NDArray[np.float32]:
    """Move boxes from one window to another by shift and scale."""
    scale = np.array([target[3] / source[3], target[2] / source[2]] * 2)
    start, end = np.array([source[1], source[0]] * 2), np.array([target[1], target[0]] * 2)
    return ((np.asarray(boxes, dtype=np.float64).reshape(-1, 4) - start) * scale + end).astype(np.float32)
