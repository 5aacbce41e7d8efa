"""Transforms of albumentations that may show an image smaller, made to average over what they leave out.

albumentations reads such an image at single points, between which fine texture falls through or becomes coarse false
texture. Here an image that is resized gets the pixels that `Preprocess` gives a validation image, and one that is moved
is smoothed before by as much: not at all where it keeps its size or grows, nor where the recipe asks for the nearest
pixel.
"""

from __future__ import annotations

from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.augmentations.geometric.functional import resize

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


class RandomResizedCrop(A.RandomResizedCrop):
    """`A.RandomResizedCrop`."""

    def apply(self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Return the resized window."""
        return _resize(_cut(img, crop_coords), self.size, self.interpolation)


class RandomSizedCrop(A.RandomSizedCrop):
    """`A.RandomSizedCrop`."""

    def apply(self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Return the resized window."""
        return _resize(_cut(img, crop_coords), self.size, self.interpolation)


class RandomSizedBBoxSafeCrop(A.RandomSizedBBoxSafeCrop):
    """`A.RandomSizedBBoxSafeCrop`."""

    def apply(self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Return the resized window."""
        return _resize(_cut(img, crop_coords), (self.height, self.width), self.interpolation)


class Resize(A.Resize):
    """`A.Resize`."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Return the resized image."""
        return _resize(img, (self.height, self.width), self.interpolation)


class RandomScale(A.RandomScale):
    """`A.RandomScale`."""

    def apply(self, img: np.ndarray, scale: float, **params: Any) -> np.ndarray:
        """Return the resized image."""
        height, width = img.shape[:2]
        return _resize(img, (int(height * scale), int(width * scale)), self.interpolation)  # rounded as masks are


class _ToSide:
    """What resizes an image by one of its sides."""

    def apply(self, img: np.ndarray, scale: float, **params: Any) -> np.ndarray:
        """Return the resized image."""
        size = (max(1, round(img.shape[0] * scale)), max(1, round(img.shape[1] * scale)))
        return _resize(img, size, self.interpolation)  # type: ignore[attr-defined]


class LongestMaxSize(_ToSide, A.LongestMaxSize):
    """`A.LongestMaxSize`."""


class SmallestMaxSize(_ToSide, A.SmallestMaxSize):
    """`A.SmallestMaxSize`."""


class CropAndPad(A.CropAndPad):
    """`A.CropAndPad`."""

    def apply(self, img: np.ndarray, result_shape: tuple[int, int], **params: Any) -> np.ndarray:
        """Return the cut or filled up image, as large as before where `keep_size`."""
        if self.keep_size:
            scale = (img.shape[0] / result_shape[0], img.shape[1] / result_shape[1])
            img = _smooth(img, scale, self.interpolation)
        changed: np.ndarray = super().apply(img, **params)
        return changed


_RESIZING = (
    *(LongestMaxSize, RandomResizedCrop, RandomScale, RandomSizedBBoxSafeCrop, RandomSizedCrop, Resize),
    SmallestMaxSize,
)
SHRINKING: dict[str, Any] = {
    kind.__name__: kind for kind in (*_RESIZING, Affine, CropAndPad, SafeRotate, ShiftScaleRotate)
}
"""By the names that they have in albumentations."""


def _cut(img: np.ndarray, corners: tuple[int, int, int, int]) -> np.ndarray:
    """Cut a window (left, top, right, bottom) out of (H, W, C)."""
    left, top, right, bottom = corners
    return img[top:bottom, left:right]


def _resize(img: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """Resize (H, W, C) to (h, w); what only grows is albumentations' own."""
    mode = {cv2.INTER_LINEAR: "bilinear", cv2.INTER_CUBIC: "bicubic"}.get(interpolation)
    height, width = img.shape[:2]
    if mode is None or (size[0] >= height and size[1] >= width):
        resized: np.ndarray = resize(np.ascontiguousarray(img), size, interpolation)
        return resized
    given = torch.from_numpy(np.ascontiguousarray(img)).permute(2, 0, 1)[None]
    shown = torch.nn.functional.interpolate(given, size, mode=mode, antialias=True, align_corners=False)
    return np.ascontiguousarray(shown[0].permute(1, 2, 0).numpy())


def _smooth(img: np.ndarray, scale: tuple[float, float], interpolation: int) -> np.ndarray:
    """Smooth (H, W, C) for showing it at a scale (of rows, of columns)."""
    if interpolation == cv2.INTER_NEAREST or min(scale) > _LEAST:
        return img
    rows, columns = (_kernel(s) for s in scale)
    smooth: np.ndarray = cv2.sepFilter2D(img, -1, columns, rows)
    return smooth.reshape(img.shape)


def _kernel(scale: float) -> np.ndarray:
    """Weights of a pixel and its neighbours along one axis.

    The antialiased bilinear kernel at scale s is a triangle of variance 1 / (6 s^2); interpolation brings 1/6 of it.
    """
    variance = (1 / scale**2 - 1) / 6 if scale <= _LEAST else 0.0
    if variance < 0.5:  # too narrow for samples of a Gaussian to have its variance
        return np.array([variance / 2, 1 - variance, variance / 2])
    size = 2 * int(np.ceil(3 * variance**0.5)) + 1
    kernel: np.ndarray = cv2.getGaussianKernel(size, variance**0.5).ravel()
    return kernel
