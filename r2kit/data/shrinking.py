"""Transforms of albumentations that may show an image smaller, made to average over what they leave out.

albumentations reads such an image at single points, between which fine texture falls through or becomes coarse false
texture. Here the image is smoothed before, as much as `Preprocess` smooths it on its way to the network: not at all
where it keeps its size or grows, nor where the recipe asks for the nearest pixel.
"""

from __future__ import annotations

from typing import Any

import albumentations as A
import cv2
import numpy as np

_LEAST = 0.999  # a scale above it is rounding


class _ByMatrix:
    """What moves pixels by a matrix."""

    def apply(self, img: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        """Return the moved image."""
        along_x, along_y = np.linalg.norm(matrix[:2, :2], axis=0)  # what a step in the image becomes
        img = _smooth(img, (along_y, along_x), self.interpolation)  # type: ignore[attr-defined]
        moved: np.ndarray = super().apply(img, matrix=matrix, **params)  # type: ignore[misc]
        return moved


class Affine(_ByMatrix, A.Affine):
    """`A.Affine`."""


class SafeRotate(_ByMatrix, A.SafeRotate):
    """`A.SafeRotate`."""


class ShiftScaleRotate(_ByMatrix, A.ShiftScaleRotate):
    """`A.ShiftScaleRotate`."""


class RandomSizedBBoxSafeCrop(A.RandomSizedBBoxSafeCrop):
    """`A.RandomSizedBBoxSafeCrop`."""

    def apply(self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Return the resized window."""
        left, top, right, bottom = crop_coords
        scale = (self.height / max(bottom - top, 1), self.width / max(right - left, 1))
        cut: np.ndarray = super().apply(_smooth(img, scale, self.interpolation), crop_coords=crop_coords, **params)
        return cut


class CropAndPad(A.CropAndPad):
    """`A.CropAndPad`."""

    def apply(self, img: np.ndarray, result_shape: tuple[int, int], **params: Any) -> np.ndarray:
        """Return the cut or filled up image, as large as before where `keep_size`."""
        if self.keep_size:
            scale = (img.shape[0] / result_shape[0], img.shape[1] / result_shape[1])
            img = _smooth(img, scale, self.interpolation)
        changed: np.ndarray = super().apply(img, **params)
        return changed


SHRINKING: dict[str, Any] = {
    kind.__name__: kind for kind in (Affine, CropAndPad, RandomSizedBBoxSafeCrop, SafeRotate, ShiftScaleRotate)
}
"""By the names that they have in albumentations."""


def _smooth(img: np.ndarray, scale: tuple[float, float], interpolation: int) -> np.ndarray:
    """Smooth (H, W, C) for showing it at a scale (of rows, of columns)."""
    if interpolation == cv2.INTER_NEAREST or min(scale) > _LEAST:
        return img
    # The antialiased bilinear kernel at scale s is a triangle of variance 1 / (6 s^2); interpolation brings 1/6 of it.
    rows, columns = (((1 / s**2 - 1) / 6) ** 0.5 if s <= _LEAST else 0.0 for s in scale)
    sizes = tuple(2 * int(np.ceil(3 * sigma)) + 1 for sigma in (columns, rows))  # a size of 1 leaves an axis as it is
    smooth: np.ndarray = cv2.GaussianBlur(img, sizes, sigmaX=columns or 1.0, sigmaY=rows or 1.0)
    return smooth.reshape(img.shape)
