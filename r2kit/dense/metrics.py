"""Metrics of maps of classes: counts per image that add up, and figures from their sums.

A figure that the data cannot give (the IoU of a class that neither occurs nor is predicted) is NaN, and class means
leave it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from r2kit.data.targets import IGNORE

FloatArray = NDArray[np.float64]


def confusion_counts(pred: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each true class (rows) by predicted class (columns), image by image.

    Args:
        pred: (B, H, W) int64 in [0, K).
        mask: (B, H, W) int64 in [0, K), or `IGNORE`, which is not counted.
        num_classes: K.

    Returns:
        (B, K, K) int64.
    """
    batch = torch.arange(len(mask), device=mask.device)[:, None, None]
    known = mask != IGNORE
    code = (batch * num_classes + mask) * num_classes + pred
    counts = torch.bincount(code[known], minlength=len(mask) * num_classes**2)
    return counts.view(len(mask), num_classes, num_classes)


def class_iou(confusion: NDArray[Any]) -> FloatArray:
    """Return the intersection over union of each class.

    Args:
        confusion: (..., K, K) pixels by true class (rows) and predicted class (columns).

    Returns:
        (..., K), NaN for a class that neither occurs nor is predicted.
    """
    matrix = np.asarray(confusion, dtype=np.float64)
    hit = np.diagonal(matrix, axis1=-2, axis2=-1)
    return _ratio(hit, matrix.sum(-1) + matrix.sum(-2) - hit)


def mean_iou(confusion: NDArray[Any]) -> FloatArray:
    """Return the mean of `class_iou` over the classes that occur or are predicted, (...,) for (..., K, K)."""
    iou = class_iou(confusion)
    known = ~np.isnan(iou)
    return _ratio(np.where(known, iou, 0.0).sum(-1), known.sum(-1))


def pixel_accuracy(confusion: NDArray[Any]) -> FloatArray:
    """Return the share of labelled pixels on the diagonal, (...,) for (..., K, K)."""
    matrix = np.asarray(confusion, dtype=np.float64)
    return _ratio(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum((-2, -1)))


def boundary_counts(
    pred: NDArray[Any], mask: NDArray[Any], num_classes: int, tolerance: float = 2.0
) -> NDArray[np.int64]:
    """Count the boundary pixels of each class that have a boundary pixel of the other map nearby.

    A boundary pixel of a class belongs to it and has one of its four neighbours in another class; the border of the
    image and unlabelled neighbours make no boundary. Unlabelled pixels are taken out of both maps.

    Args:
        pred: (H, W) integers in [0, K).
        mask: (H, W) integers in [0, K), or `IGNORE`.
        num_classes: K.
        tolerance: Largest distance in pixels that counts as nearby.

    Returns:
        (K, 4) int64: matched and all boundary pixels of the prediction, matched and all of the truth. The counts of
        several images add up.

    Source: Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?", sec. 3.2.
    """
    mask = np.asarray(mask)
    pred = np.where(mask == IGNORE, IGNORE, pred)
    counts = np.zeros((num_classes, 4), dtype=np.int64)
    for value in range(num_classes):
        ours, theirs = boundary_of(pred, value), boundary_of(mask, value)
        counts[value] = _near(ours, theirs, tolerance), ours.sum(), _near(theirs, ours, tolerance), theirs.sum()
    return counts


def boundary_of(labels: NDArray[Any], value: int) -> NDArray[np.bool_]:
    """Return where a map (H, W) is `value` next to a pixel of another class, (H, W) bool."""
    inside, edge = labels == value, np.zeros(labels.shape, dtype=bool)
    other = ~inside & (labels != IGNORE)
    edge[1:] |= other[:-1]
    edge[:-1] |= other[1:]
    edge[:, 1:] |= other[:, :-1]
    edge[:, :-1] |= other[:, 1:]
    return inside & edge


def _near(points: NDArray[np.bool_], others: NDArray[np.bool_], tolerance: float) -> int:
    """Number of points with one of the others within the tolerance."""
    if not points.any() or not others.any():
        return 0
    return int((distance_transform_edt(~others)[points] <= tolerance).sum())


def boundary_f1(counts: NDArray[Any]) -> FloatArray:
    """Return the F1 of the boundaries of each class.

    Args:
        counts: (..., K, 4), see `boundary_counts`.

    Returns:
        (..., K): NaN for a class without a boundary in either map, 0 where only one of them has one.
    """
    counts = np.asarray(counts, dtype=np.float64)
    precision, recall = _ratio(counts[..., 0], counts[..., 1]), _ratio(counts[..., 2], counts[..., 3])
    nothing = (counts[..., 1] == 0) & (counts[..., 3] == 0)
    both = np.nan_to_num(precision) + np.nan_to_num(recall)
    f1 = np.where(both > 0, 2 * np.nan_to_num(precision) * np.nan_to_num(recall) / np.where(both > 0, both, 1.0), 0.0)
    return np.where(nothing, np.nan, f1)


def _ratio(part: Any, whole: Any) -> FloatArray:
    """Quotient, NaN where whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)
