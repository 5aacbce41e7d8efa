"""What belongs to the places of an image: the class of every pixel."""

from __future__ import annotations

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
