"""The evaluated result of a segmentation: from stored counts to figures, and from figures to plain sentences.

The table of counts is the only source of every figure. It has one row an image, with the columns ``id``, ``path``,
``confusion`` (K * K pixels by true and predicted class), ``boundary`` (K * 4, see `dense.metrics.boundary_counts`),
the baselines' ``confusion_majority`` and ``confusion_logistic`` where they could be had, ``group``, ``lon``, ``lat``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from r2kit import metrics
from r2kit.dense.metrics import boundary_f1, class_iou, mean_iou, pixel_accuracy
from r2kit.result import Result, groups, images_of, percent, with_interval

BASELINES = {
    "majority": "the class of most training pixels, everywhere",
    "logistic": "logistic regression on the bands of single pixels",
}
"""Names of the baselines and what they are."""


def counts(table: pd.DataFrame, column: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return a column of counts as (N, *shape)."""
    return np.array([np.asarray(row) for row in table[column]], dtype=np.int64).reshape(len(table), *shape)


def compute(
    table: pd.DataFrame,
    classes: Sequence[str],
    *,
    split: str,
    tolerance: float,
    seed: int = 0,
    group_word: str = "spatial block",
) -> Result:
    """Compute every figure of a result from the table of counts.

    Args:
        table: One row an image, see the module's docstring.
        classes: Names of the classes, K of them.
        split: What the images are: ``test``, ``val``, or the name of another set.
        tolerance: Of the boundaries, in pixels.
        seed: Seed of the bootstrap.
        group_word: What a person calls a group of images that were held out together.

    Returns:
        JSON primitives. Intervals are `metrics.Interval.to_dict`; shares are in [0, 1]; a figure that the data cannot
        give is None.
    """
    count, group = len(classes), groups(table)
    confusion = counts(table, "confusion", (count, count))
    boundary = counts(table, "boundary", (count, 4))

    def interval(values: NDArray[np.int64], statistic: Any, bounds: tuple[float, float] = (0.0, 1.0)) -> dict[str, Any]:
        flat = values.reshape(len(values), -1)
        return metrics.bootstrap_interval(flat, group, statistic=statistic, bounds=bounds, seed=seed).to_dict()

    def matrices(sums: NDArray[Any]) -> NDArray[Any]:
        return sums.reshape(len(sums), -1, count, count)

    whole, edges = confusion.sum(0), boundary.sum(0)
    iou, edge = class_iou(whole), boundary_f1(edges)
    truth, said, hit = whole.sum(1), whole.sum(0), np.diag(whole)
    per_class = [
        {
            "class": name,
            "pixels": int(truth[i]),
            "iou": interval(confusion, lambda sums, i=i: class_iou(matrices(sums)[:, 0])[:, i])
            if np.isfinite(iou[i])
            else {"value": None, "low": None, "high": None, "level": 0.95},
            "recall": _quotient(hit[i], truth[i]),
            "precision": _quotient(hit[i], said[i]),
            "boundary_f1": _finite(edge[i]),
        }
        for i, name in enumerate(classes)
    ]
    each = mean_iou(confusion)
    seen = [i for i in range(count) if truth[i]]
    result: Result = {
        "task": "segmentation",
        "split": split,
        "images": len(table),
        "groups": None if group is None else len(pd.unique(pd.Series(group).dropna())),
        "group_word": group_word,
        "classes": list(classes),
        "pixels": int(whole.sum()),
        "miou": interval(confusion, lambda sums: mean_iou(matrices(sums)[:, 0])),
        "pixel_accuracy": interval(confusion, lambda sums: pixel_accuracy(matrices(sums)[:, 0])),
        "miou_per_image": _finite(float(np.nanmean(each))) if np.isfinite(each).any() else None,
        "boundary_f1": {
            "value": _finite(float(np.nanmean(edge))) if np.isfinite(edge).any() else None,
            "tolerance": tolerance,
        },
        "per_class": per_class,
        "worst_classes": [classes[i] for i in sorted(seen, key=lambda i: (iou[i], i))[:3]],
        "confusion": whole.tolist(),
        "baselines": {},
        "difference": {},
    }
    for name, what in BASELINES.items():
        if f"confusion_{name}" not in table:
            continue
        other = counts(table, f"confusion_{name}", (count, count))
        both = np.stack([confusion, other], axis=1)
        result["baselines"][name] = {
            "what": what,
            "miou": interval(other, lambda sums: mean_iou(matrices(sums)[:, 0])),
        }
        result["difference"][name] = interval(
            both,
            lambda sums: mean_iou(matrices(sums)[:, 0]) - mean_iou(matrices(sums)[:, 1]),
            (-1.0, 1.0),
        )
    return result


def headline(result: Result) -> str:
    """Return the result, its interval and the baselines as one plain sentence."""
    sentence = f"The mean IoU is {with_interval(result['miou'])} on {images_of(result)}"
    words = {
        "majority": "one class everywhere gives",
        "logistic": "the colour of single pixels (logistic regression) gives",
    }
    parts = [
        f"{words[name]} {percent(base['miou']['value'])}" for name, base in result["baselines"].items() if name in words
    ]
    return sentence + (f"; {' and '.join(parts)}" if parts else "") + "."


def verdict(result: Result) -> str | None:
    """Return whether the network beats the colour of single pixels, as one sentence; None without that baseline."""
    difference = result["difference"].get("logistic")
    if difference is None or difference["value"] is None:
        return None
    points, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    span = f"{100 * difference['level']:.0f} % interval of the difference on the same images {low:+.1f} to {high:+.1f}"
    if low > 0:
        return f"The network is better than colour alone by {points:.1f} points of mean IoU ({span})."
    if high < 0:
        return f"The network is worse than colour alone by {-points:.1f} points of mean IoU ({span})."
    return f"It is not shown that the network is better than colour alone: {points:+.1f} points of mean IoU ({span})."


def caveats(result: Result) -> list[str]:
    """Return what to keep in mind when reading the figures, one sentence each."""
    found = []
    if result["split"] == "val":
        found.append("These images also chose the best epoch: expect a little less on new ones.")
    if result["miou"]["reason"]:
        found.append(f"About the interval: {result['miou']['reason']}.")
    if result.get("baselines_left_out"):
        found.append(f"No baselines beside it: {result['baselines_left_out']}")
    empty = [row["class"] for row in result["per_class"] if row["pixels"] == 0]
    if empty:
        names = ", ".join(f"'{name}'" for name in empty[:5])
        found.append(f"No pixel of {names} is in this set, so nothing is known about that class.")
    if result["pixels"] == 0:
        found.append("No pixel of these images is labelled.")
    return found


def summary_lines(result: Result) -> list[str]:
    """Return the result as a few lines for a terminal."""
    averaged = ", averaged over eight orientations" if result.get("tta") else ""
    lines = [f"{result['split']} mean IoU {with_interval(result['miou'])} on {images_of(result)}{averaged}"]
    for name, base in result["baselines"].items():
        lines.append(f"  {base['what']}: {with_interval(base['miou'])}")
        if name == "logistic":
            lines.append(f"  {verdict(result)}")
    edge = result["boundary_f1"]
    lines.append(
        f"pixel accuracy {with_interval(result['pixel_accuracy'])}, mean IoU of single images "
        f"{percent(result['miou_per_image'])}, boundary F1 within {edge['tolerance']:g} pixels {percent(edge['value'])}"
    )
    for row in result["per_class"][:12]:
        lines.append(f"  {row['class']}: IoU {with_interval(row['iou'])}, boundary F1 {percent(row['boundary_f1'])}")
    if len(result["per_class"]) > 12:
        lines.append(f"  and {len(result['per_class']) - 12} more classes")
    return lines + [f"note: {note}" for note in caveats(result)]


def _quotient(part: Any, whole: Any) -> float | None:
    """The quotient, None where there is nothing to divide by."""
    return float(part / whole) if whole else None


def _finite(value: Any) -> float | None:
    """None for NaN, which JSON has no word for."""
    return float(value) if np.isfinite(value) else None
