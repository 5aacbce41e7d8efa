"""What belongs to the places of an image: the class of every pixel, or the objects in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORE = 255
"""The value of a pixel whose class is not known: outside the image, without a measurement, or not labelled."""

CLASS_COLOURS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (120, 94, 240),
    (97, 156, 80),
    (150, 110, 70),
    (180, 180, 180),
    (60, 60, 60),
)
"""Red, green and blue of the classes in pictures of masks, those of Okabe and Ito first; beyond twelve they repeat."""


@dataclass(frozen=True)
class MaskTarget:
    """A class for every pixel."""

    mask: np.ndarray
    """(H, W) uint8 like the image: positions in the source's classes, `IGNORE` where the class is not known."""


@dataclass(frozen=True)
class BoxTarget:
    """The objects in an image."""

    boxes: np.ndarray
    """(N, 4) float32, x0 y0 x1 y1 of the edges in pixels."""
    labels: np.ndarray
    """(N,) int64, position in the source's classes plus one; 0 is the background."""
    crowd: np.ndarray
    """(N,) bool, whether it marks a group of objects that were not separated."""
    masks: np.ndarray | None = None
    """(N, H, W) bool, where each object is; None where only boxes are known."""

    @classmethod
    def join(cls, parts: Sequence[BoxTarget]) -> BoxTarget:
        """Return the objects of several targets of one image together; with masks only where all have them."""
        masks = [part.masks for part in parts if part.masks is not None]
        return cls(
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.crowd for part in parts]),
            np.concatenate(masks) if len(masks) == len(parts) else None,
        )

    def take(self, kept: np.ndarray, boxes: np.ndarray | None = None, masks: np.ndarray | None = None) -> BoxTarget:
        """Return some of the objects, with other boxes and masks for them where given.

        Args:
            kept: (M,) positions, or (N,) bool.
            boxes: (M, 4).
            masks: (M, h, w).
        """
        if masks is None and self.masks is not None:
            masks = self.masks[kept]
        return BoxTarget(self.boxes[kept] if boxes is None else boxes, self.labels[kept], self.crowd[kept], masks)
