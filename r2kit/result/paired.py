"""The headline figure of each kind of task as a function of sums over images, so that two networks compare in pairs.

Accuracy, mean IoU and the largest F-measure are functions of sums of what is stored of every image. An average
precision is none, but it is a function of how often each image was drawn; both are what `metrics.bootstrap_interval`
takes. Drawing the images of two networks together gives the interval of their difference on the same images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray

from r2kit import metrics
from r2kit.dense.metrics import mean_iou
from r2kit.errors import RunError
from r2kit.objects import coco
from r2kit.result import detection, groups, probabilities, segmentation
from r2kit.result.multilabel import held_labels
from r2kit.run import Run

FIGURES = {
    "classification": "accuracy",
    "multilabel": "mean average precision",
    "segmentation": "mean IoU",
    "saliency": "largest F-measure",
    "detection": "mean average precision of boxes",
    "instance": "mean average precision of masks",
}
"""The headline figure of each kind of task, in words; all are shares in [0, 1], the larger the better."""


@dataclass(frozen=True)
class Judged:
    """What a network said of N images, as far as the headline figure needs it.

    Attributes:
        ids: (N,) names of the images.
        truth: (N,) texts that say what an image was judged by; equal texts, equal truth.
        group: (N,) what was held out together; None without.
        sums: (N, P), dense or sparse.
        statistic: From (R, P) sums over drawn images to the figure (R,).
        redraws: Times that images are drawn for an interval: fewer where the figure is costly.
    """

    ids: NDArray[np.object_]
    truth: NDArray[np.object_]
    group: NDArray[np.object_] | None
    sums: Any
    statistic: metrics.Statistic
    redraws: int = 2000

    def at(self, order: NDArray[np.int64]) -> Judged:
        """The same of some of the images, in another order."""
        group = None if self.group is None else self.group[order]
        return replace(self, ids=self.ids[order], truth=self.truth[order], group=group, sums=self.sums[order])

    @property
    def value(self) -> float:
        """The figure on all the images."""
        return float(self.statistic(np.asarray(self.sums.sum(axis=0), dtype=np.float64).reshape(1, -1))[0])


def interval(judged: Judged, *, seed: int = 0) -> metrics.Interval:
    """Return the figure with its bootstrap interval over images, or over groups where there are any."""
    return metrics.bootstrap_interval(
        judged.sums, judged.group, statistic=judged.statistic, n=judged.redraws, seed=seed
    )


def difference(base: Judged, other: Judged, *, seed: int = 0) -> metrics.Interval:
    """Return the figure of `other` minus that of `base`, both of the same images in the same order.

    Raises:
        ValueError: If the images differ.
    """
    if list(base.ids) != list(other.ids):
        raise ValueError("base and other judge different images, or in another order")
    columns = base.sums.shape[1]

    def minus(sums: metrics.FloatArray) -> metrics.FloatArray:
        return other.statistic(sums[:, columns:]) - base.statistic(sums[:, :columns])

    both = (
        scipy.sparse.csr_array(scipy.sparse.hstack([base.sums, other.sums]))
        if scipy.sparse.issparse(base.sums)
        else np.concatenate([base.sums, other.sums], axis=1)
    )
    redraws = min(base.redraws, other.redraws)
    return metrics.bootstrap_interval(both, base.group, statistic=minus, bounds=(-1.0, 1.0), n=redraws, seed=seed)


def judge(kind: str, table: pd.DataFrame, classes: Sequence[str], *, max_detections: int = 100) -> Judged:
    """Return what a table of stored predictions says, see the modules of `r2kit.result` for its columns.

    Args:
        kind: Of the task, a key of `FIGURES`.
        table: One row an image; for objects one row an object, too.
        classes: Names of the classes.
        max_detections: Detections of one class in one image that count.
    """
    if kind in ("detection", "instance"):
        return _objects(table, classes, kind == "instance", max_detections)
    ids, group = table["id"].to_numpy(object), groups(table)
    if kind == "classification":
        right = np.asarray(table["label"] == table["pred"], dtype=np.float64)
        return Judged(ids, table["label"].to_numpy(object), group, _counted(right[:, None]), _mean)
    if kind == "multilabel":
        held, probs = held_labels(table, "label", classes), probabilities(table, classes)
        statistic = metrics.redrawn_mean_average_precision(probs, held)
        return Judged(ids, table["label"].to_numpy(object), group, _once(len(ids)), statistic, 500)
    if kind == "saliency":
        curves = np.array([np.asarray(row) for row in table["f_curve"]], dtype=np.float64)
        truth = np.array([f"{value:.9g}" for value in table["f_everything"]], dtype=object)
        return Judged(ids, truth, group, _counted(curves), _largest_mean)
    count = len(classes)
    confusion = segmentation.counts(table, "confusion", (count, count))
    truth = np.array([str(pixels.tolist()) for pixels in confusion.sum(axis=2)], dtype=object)

    def miou(sums: metrics.FloatArray) -> metrics.FloatArray:
        found: metrics.FloatArray = mean_iou(sums.reshape(len(sums), count, count))
        return found

    return Judged(ids, truth, group, confusion.reshape(len(ids), -1), miou)


def judge_run(run: Run) -> Judged:
    """Return what a run's network said of the images that its result is reported on.

    Raises:
        RunError: If the run has no stored predictions.
    """
    table = stored_predictions(run)
    limit = run.recipe.objects.max_detections if run.recipe.task.kind in ("detection", "instance") else 100
    return judge(run.recipe.task.kind, table, run.preprocess.classes, max_detections=limit)


def reported_split(run: Run) -> str:
    """Return the split that a run's result is of.

    Raises:
        RunError: If the run is not evaluated.
    """
    try:
        split = json.loads(run.metrics_json.read_text(encoding="utf-8"))["split"]
    except (OSError, ValueError, KeyError, TypeError):
        raise _not_evaluated(run) from None
    return str(split)


def stored_predictions(run: Run) -> pd.DataFrame:
    """Return the table of predictions of the split that a run's result is of.

    Raises:
        RunError: If there is none.
    """
    try:
        return pd.read_parquet(run.predictions(reported_split(run)))
    except (OSError, ValueError):
        raise _not_evaluated(run) from None


def _not_evaluated(run: Run) -> RunError:
    return RunError(f"{run.path}: has no stored predictions; run r2kit evaluate {run.path}")


def _objects(table: pd.DataFrame, classes: Sequence[str], outlines: bool, max_detections: int) -> Judged:
    """What a detector found."""
    images, found, truth = detection.read_objects(table, classes)
    matches = [
        coco.match(f, t, len(classes), outlines=outlines, max_detections=max_detections)
        for f, t in zip(found, truth, strict=True)
    ]
    precision = coco.PrecisionOf(matches)

    def overall(drawn: metrics.FloatArray) -> metrics.FloatArray:
        return precision(np.ascontiguousarray(drawn))[:, 0]

    texts = [
        str([t["labels"].tolist(), np.asarray(t["boxes"], dtype=np.float64).round(2).tolist(), t["crowd"].tolist()])
        for t in truth
    ]
    return Judged(
        images["id"].to_numpy(object),
        np.array(texts, dtype=object),
        groups(images),
        _once(len(images)),
        overall,
        detection.REDRAWS,
    )


def _once(count: int) -> Any:
    """One column an image: what is summed over a draw is how often each image came."""
    return scipy.sparse.csr_array(scipy.sparse.identity(count, format="csr"))


def _counted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values (N, P) with a last column of ones, so that sums know how many they are of."""
    return np.concatenate([values, np.ones((len(values), 1))], axis=1)


def _mean(sums: metrics.FloatArray) -> metrics.FloatArray:
    """The mean of the first column."""
    found: metrics.FloatArray = sums[:, 0] / sums[:, -1]
    return found


def _largest_mean(sums: metrics.FloatArray) -> metrics.FloatArray:
    """The largest of the mean columns."""
    found: metrics.FloatArray = (sums[:, :-1] / sums[:, -1:]).max(axis=1)
    return found
