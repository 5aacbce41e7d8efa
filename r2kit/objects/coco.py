"""COCO's average precision of detections: the figures through torchmetrics, and which box is which for intervals.

An image's detections and truth are dicts of arrays: `boxes` (N, 4) in pixels, `labels` (N,) from 1, and `scores` (N,)
or `crowd` (N,); with outlines also `masks`, a list of N run lengths as `pack_mask` makes them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from r2kit.errors import require

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Intersections over union above which a detection is right; `map` is the mean over them."""
_RECALLS = np.linspace(0.0, 1.0, 101)
_SIZES = ("all", "small", "medium", "large")
SIZE_WORDS = {"small": "up to 32 x 32 pixels", "medium": "up to 96 x 96 pixels", "large": "above"}

Objects = dict[str, Any]


def pack_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Pack a mask (H, W) into COCO's run lengths: `size` [H, W] and `counts`, a text.

    Raises:
        MissingExtraError: If faster-coco-eval is not installed.
    """
    require("faster_coco_eval", "faster-coco-eval", "det", "an outline of an object")
    from faster_coco_eval.core import mask as coco_mask

    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in packed["size"]], "counts": packed["counts"].decode()}


def unpack_mask(packed: dict[str, Any]) -> NDArray[np.bool_]:
    """Return what `pack_mask` was given."""
    from faster_coco_eval.core import mask as coco_mask

    return np.asarray(coco_mask.decode(packed)).astype(bool)


def average_precision(
    found: Sequence[Objects],
    truth: Sequence[Objects],
    num_classes: int,
    *,
    outlines: bool = False,
    max_detections: int = 100,
) -> dict[str, Any]:
    """Return COCO's figures over images.

    Args:
        found: Detections of each image.
        truth: What is in each image; a crowd neither rewards nor punishes the detections that lie in it.
        num_classes: K.
        outlines: Whether intersections are those of the masks instead of the boxes.
        max_detections: Detections of one class in one image that count, the surest ones; COCO has 100.

    Returns:
        `map` (mean over the thresholds 0.5 to 0.95), `map_50`, `map_75`, `map_small`, `map_medium`, `map_large` (area
        of the true box or mask, limits 32 and 96 pixels squared), `recall` (mean largest recall over the
        thresholds) and `per_class` (K values of `map`). Means over the classes that occur; NaN where none does.

    Raises:
        MissingExtraError: If faster-coco-eval is not installed.
    """
    require("faster_coco_eval", "faster-coco-eval", "det", "COCO's average precision")
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(
        # Boxes go along with masks: with masks alone, torchmetrics leaves images without an object out, and with them
        # whatever was found there.
        iou_type=("bbox", "segm") if outlines else "bbox",
        # COCO's own, in float64; the defaults are rounded to float32, which moves a recall that just reaches one.
        iou_thresholds=THRESHOLDS.tolist(),
        rec_thresholds=_RECALLS.tolist(),
        max_detection_thresholds=[1, 10, max_detections] if max_detections > 10 else [1, 2, max(3, max_detections)],
        extended_summary=True,
        backend="faster_coco_eval",
        sync_on_compute=False,  # whoever calls has gathered the images of all processes
        compute_with_cache=False,
    )
    metric.warn_on_many_detections = False
    for ours, theirs in zip(found, truth, strict=True):  # one by one: their masks are unpacked
        metric.update(
            [_tensors(ours, ("boxes", "scores", "labels"), outlines)],
            [{**_tensors(theirs, ("boxes", "labels"), outlines), "iscrowd": _crowd(theirs)}],
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a set without any object makes means of nothing
        figures = metric.compute()
    prefix = "segm_" if outlines else ""
    precision = figures[f"{prefix}precision"].numpy()  # (T, R, K', A, M); -1 where a class does not occur
    recall = figures[f"{prefix}recall"].numpy()  # (T, K', A, M)
    classes = np.atleast_1d(figures["classes"].numpy())
    per_class = np.full(num_classes, np.nan)
    for position, label in enumerate(classes[: precision.shape[2]]):
        per_class[label - 1] = _mean(precision[:, :, position, 0, -1])
    result: dict[str, Any] = {
        "map": _mean(precision[:, :, :, 0, -1]),
        "map_50": _mean(precision[0, :, :, 0, -1]),
        "map_75": _mean(precision[5, :, :, 0, -1]),
    }
    for area, name in enumerate(_SIZES[1:], 1):
        result[f"map_{name}"] = _mean(precision[:, :, :, area, -1])
    return {**result, "recall": _mean(recall[:, :, 0, -1]), "per_class": per_class.tolist()}


def count_sizes(truth: Sequence[Objects], *, outlines: bool = False) -> dict[str, int]:
    """Return how many objects are small, medium and large, crowds apart, by the area of their boxes or masks."""
    counts = dict.fromkeys(SIZE_WORDS, 0)
    for item in truth:
        boxes = np.asarray(item["boxes"], dtype=np.float64).reshape(-1, 4)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if outlines:
            areas = np.array([unpack_mask(mask).sum() for mask in item["masks"]])
        for area in areas[~np.asarray(item["crowd"], dtype=bool)]:
            counts["small" if area <= 32**2 else "medium" if area <= 96**2 else "large"] += 1
    return counts


@dataclass(frozen=True)
class Matches:
    """What became of the detections and the objects of one class in one image."""

    scores: NDArray[np.float64]
    """(D,) falling."""
    right: NDArray[np.bool_]
    """(T, D) whether the detection is an object, at each threshold."""
    ignored: NDArray[np.bool_]
    """(T, D) whether it lies in a crowd and counts neither way."""
    objects: int
    """How many there are, crowds apart."""
    taken: NDArray[np.int64]
    """(D,) which object of its class, crowds counted last, a detection is at the lowest threshold; -1 for none."""


def match(
    found: Objects, truth: Objects, num_classes: int, *, outlines: bool = False, max_detections: int = 100
) -> list[Matches]:
    """Give each detection of an image to an object as COCO does: the surest first, each to the one it overlaps most.

    Args:
        found: Detections.
        truth: What is there.
        num_classes: K.
        outlines: As of `average_precision`.
        max_detections: As of `average_precision`.

    Returns:
        One for each class.
    """
    require("faster_coco_eval", "faster-coco-eval", "det", "COCO's average precision")
    result = []
    for label in range(1, num_classes + 1):
        theirs, ours = np.flatnonzero(truth["labels"] == label), np.flatnonzero(found["labels"] == label)
        ours = ours[np.argsort(-found["scores"][ours], kind="mergesort")][:max_detections]
        crowd = truth["crowd"][theirs].astype(bool)
        theirs, crowd = theirs[np.argsort(crowd, kind="mergesort")], np.sort(crowd)
        overlap = _overlap(found, ours, truth, theirs, crowd, outlines)
        right, ignored, taken = _assign(overlap, crowd)
        result.append(Matches(found["scores"][ours].astype(np.float64), right, ignored, int((~crowd).sum()), taken))
    return result


class PrecisionOf:
    """Average precision as a function of how often each image counts, as when images are drawn with replacement.

    Args:
        matches: `match` of each image.
    """

    def __init__(self, matches: Sequence[Sequence[Matches]]) -> None:
        self._classes: list[_Curve] = []
        for of_class in zip(*matches, strict=True):
            if any(item.objects for item in of_class):
                self._classes.append(_Curve.of(of_class))

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (R, 3) `map`, `map_50` and `map_75` for (R, N) weights of the images; NaN where no class occurs."""
        result = np.full((len(weights), 3), np.nan)
        for row, weight in enumerate(weights):
            each = [curve.precision(weight) for curve in self._classes if curve.objects @ weight > 0]
            if each:
                means = np.mean(each, axis=0)  # (T,)
                result[row] = means.mean(), means[0], means[5]
        return result


@dataclass(frozen=True)
class _Curve:
    """All detections of one class, the surest first."""

    image: NDArray[np.int64]
    """(D,) the image of each."""
    right: NDArray[np.bool_]
    """(T, D)."""
    counted: NDArray[np.bool_]
    """(T, D)."""
    objects: NDArray[np.int64]
    """(N,) objects in each image."""

    @classmethod
    def of(cls, items: Sequence[Matches]) -> _Curve:
        order = np.argsort(-np.concatenate([item.scores for item in items]), kind="mergesort")
        counted = ~np.concatenate([item.ignored for item in items], axis=1)[:, order]
        right = np.concatenate([item.right for item in items], axis=1)[:, order] & counted
        image = np.repeat(np.arange(len(items)), [len(item.scores) for item in items])[order]
        return cls(image, right, counted, np.array([item.objects for item in items]))

    def precision(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """Average precision (T,) over 101 recalls, for (N,) weights of the images."""
        each = weight[self.image]
        seen = np.flatnonzero(each)
        hits, total = ((part[:, seen] * each[seen]).cumsum(axis=1) for part in (self.right, self.counted))
        precision = hits / np.maximum(total, np.spacing(1.0))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # never rises with recall
        result = np.zeros(len(THRESHOLDS))
        for at, (curve, reached) in enumerate(zip(precision, hits / (self.objects @ weight), strict=True)):
            where = np.searchsorted(reached, _RECALLS, side="left")
            result[at] = np.append(curve, 0.0)[where].mean()
        return result


def _overlap(
    found: Objects,
    ours: NDArray[np.intp],
    truth: Objects,
    theirs: NDArray[np.intp],
    crowd: NDArray[np.bool_],
    outlines: bool,
) -> NDArray[np.float64]:
    """Intersection over union (D, G); over the detection's own area for a crowd."""
    if not len(ours) or not len(theirs):
        return np.zeros((len(ours), len(theirs)))
    from faster_coco_eval.core import mask as coco_mask

    if outlines:
        packed = [[side["masks"][i] for i in chosen] for side, chosen in ((found, ours), (truth, theirs))]
        return np.asarray(coco_mask.iou(packed[0], packed[1], crowd.astype(int).tolist()), dtype=np.float64)
    corners = [np.asarray(side["boxes"][chosen], dtype=np.float64) for side, chosen in ((found, ours), (truth, theirs))]
    boxes = [np.concatenate([c[:, :2], c[:, 2:] - c[:, :2]], axis=1) for c in corners]
    return np.asarray(coco_mask.iou(boxes[0], boxes[1], crowd.astype(int).tolist()), dtype=np.float64)


def _assign(
    overlap: NDArray[np.float64], crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """COCO's greedy assignment: `right`, `ignored` and `taken`. Crowds stand last and take any number of detections."""
    count = len(overlap)
    right, ignored = (np.zeros((len(THRESHOLDS), count), dtype=bool) for _ in range(2))
    taken = np.full(count, -1, dtype=np.int64)
    largest = overlap.max(axis=1, initial=0.0)
    alone = int((~crowd).sum())
    for at, threshold in enumerate(THRESHOLDS):
        free = np.ones(alone, dtype=bool)
        for detection in np.flatnonzero(largest >= min(threshold, 1.0 - 1e-10)):
            row = np.where(free, overlap[detection, :alone], -1.0)
            # The last of equal overlaps, as COCO's loop keeps it.
            best = alone - 1 - int(np.argmax(row[::-1])) if alone else -1
            if best >= 0 and row[best] >= min(threshold, 1.0 - 1e-10):
                free[best] = False
                right[at, detection] = True
                if at == 0:
                    taken[detection] = best
            elif len(crowd) > alone and overlap[detection, alone:].max() >= min(threshold, 1.0 - 1e-10):
                ignored[at, detection] = True
    return right, ignored, taken


def _tensors(item: Objects, names: Sequence[str], outlines: bool) -> dict[str, torch.Tensor]:
    """The arrays as torchmetrics wants them."""
    kinds = {"boxes": torch.float32, "scores": torch.float32, "labels": torch.int64}
    tensors = {name: torch.tensor(np.asarray(item[name]), dtype=kinds[name]) for name in names}
    tensors["boxes"] = tensors["boxes"].reshape(-1, 4)
    if outlines:
        masks = [torch.from_numpy(unpack_mask(mask)) for mask in item["masks"]]
        tensors["masks"] = torch.stack(masks) if masks else torch.zeros(0, 1, 1, dtype=torch.bool)
    return tensors


def _crowd(item: Objects) -> torch.Tensor:
    """Crowd flags as integers."""
    return torch.as_tensor(np.asarray(item["crowd"]).astype(np.int64))


def _mean(values: NDArray[Any]) -> float:
    """Mean of what is known: COCO writes -1 where a class does not occur."""
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan
