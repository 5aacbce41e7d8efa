"""What belongs to the places of an image: the class of every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE = 255
"""The value of a pixel whose class is not known: outside the image, without a measurement, or not labelled."""


@dataclass(frozen=True)
class MaskTarget:
    """A class for every pixel."""

    mask: np.ndarray
    """(H, W) uint8 like the image: positions in the source's classes, `IGNORE` where the class is not known."""
