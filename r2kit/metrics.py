"""Metrics of a classification, from labels, predictions and probabilities: pure numpy, nothing stored, nothing global.

All functions take whole arrays at once, so a result never depends on batches or on the number of processes. Classes
are integers ``0..K-1``. A figure that the data cannot give (the recall of a class without images) is NaN, never a
made-up zero, and the class means leave it out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse
import scipy.stats
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
FloatArray = NDArray[np.float64]
Statistic = Callable[[FloatArray], FloatArray]

_CHUNK = 4_000_000  # resampling weights held at once; 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: The estimate on all the data.
        low: Lower end.
        high: Upper end.
        level: Nominal coverage, for example 0.95.
        units: What was resampled: ``images`` or ``groups``.
        n: How many of them there are.
        reason: Why the interval is not the ordinary bootstrap, or should be read with care; None when all is well.
    """

    value: float
    low: float
    high: float
    level: float
    units: str
    n: int
    reason: str | None = None

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Return JSON primitives; NaN becomes None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Interval:
        """Read what `to_dict` gave."""
        value, low, high = (math.nan if found[end] is None else float(found[end]) for end in ("value", "low", "high"))
        return cls(value, low, high, found["level"], found["units"], found["n"], found["reason"])


@dataclass(frozen=True)
class PerClass:
    """Precision, recall, F1 and number of images of each class, all (K,)."""

    precision: FloatArray
    recall: FloatArray
    f1: FloatArray
    support: NDArray[np.int64]


@dataclass(frozen=True)
class Reliability:
    """Confidence bins of equal width, all (bins,); an empty bin has NaN confidence and accuracy."""

    edges: FloatArray
    count: NDArray[np.int64]
    confidence: FloatArray
    accuracy: FloatArray


def confusion_matrix(label: ArrayLike, pred: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Count the images of each true class (rows) by predicted class (columns).

    Args:
        label: (N,) integers in [0, num_classes).
        pred: (N,) integers in [0, num_classes).
        num_classes: K.

    Returns:
        (K, K) counts.

    Raises:
        ValueError: If the lengths differ or a value is no class.
    """
    label, pred = _classes(label, num_classes, "label"), _classes(pred, num_classes, "pred")
    if label.shape != pred.shape:
        raise ValueError(f"label has {label.size} entries and pred {pred.size}; they must be the same images")
    return np.bincount(label * num_classes + pred, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(confusion: ArrayLike) -> float:
    """Return the share of images on the diagonal of a (K, K) confusion matrix; NaN without images."""
    matrix = np.asarray(confusion)
    return float(_ratio(np.trace(matrix), matrix.sum()))


def per_class(confusion: ArrayLike) -> PerClass:
    """Return precision, recall, F1 and support of each class of a (K, K) confusion matrix.

    Recall is NaN for a class without images, precision for a class never predicted, and F1 for a class with neither.
    """
    matrix = np.asarray(confusion, dtype=np.int64)
    hit, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    return PerClass(_ratio(hit, predicted), _ratio(hit, support), _ratio(2 * hit, support + predicted), support)


def balanced_accuracy(confusion: ArrayLike) -> float:
    """Return the mean recall over the classes that have images; NaN without images."""
    return _mean_of_known(per_class(confusion).recall)


def macro_f1(confusion: ArrayLike) -> float:
    """Return the mean F1 over the classes that have images or predictions; NaN without images."""
    return _mean_of_known(per_class(confusion).f1)


def log_loss(probs: ArrayLike, label: ArrayLike) -> float:
    """Return the mean of -ln(probability of the true class), in nats.

    Args:
        probs: (N, K), rows sum to 1. A zero counts as the smallest positive float32, so that the mean stays finite.
        label: (N,) integers in [0, K).
    """
    losses = log_losses(probs, label)
    return float(losses.mean()) if losses.size else math.nan


def log_losses(probs: ArrayLike, label: ArrayLike) -> FloatArray:
    """Return (N,) values of -ln(probability of the true class); see `log_loss`."""
    table, label = _probabilities(probs, label)
    return -np.log(np.maximum(table[np.arange(label.size), label], np.finfo(np.float32).tiny))


def reliability(probs: ArrayLike, label: ArrayLike, bins: int = 15) -> Reliability:
    """Compare stated confidence with accuracy, in bins of equal width over (0, 1].

    Args:
        probs: (N, K), rows sum to 1; the confidence of an image is its largest probability.
        label: (N,) integers in [0, K).
        bins: Number of bins.
    """
    table, label = _probabilities(probs, label)
    confidence = table.max(axis=1) if label.size else np.zeros(0)
    right = table.argmax(axis=1) == label if label.size else np.zeros(0, dtype=bool)
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    mean_confidence = _ratio(np.bincount(which, weights=confidence, minlength=bins), count)
    return Reliability(edges, count, mean_confidence, _ratio(np.bincount(which, weights=right, minlength=bins), count))


def calibration_error(probs: ArrayLike, label: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| over the bins, weighted by images.

    Args:
        probs: (N, K), rows sum to 1.
        label: (N,) integers in [0, K).
        bins: Number of bins of equal width.

    Source: Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning"; Guo et al. 2017,
    arXiv:1706.04599, eq. 3.
    """
    table = reliability(probs, label, bins)
    filled = table.count > 0
    if not filled.any():
        return math.nan
    gap = np.abs(table.accuracy[filled] - table.confidence[filled])
    return float(np.average(gap, weights=table.count[filled]))


def confusion_pairs(confusion: ArrayLike) -> list[tuple[int, int, int]]:
    """Return (true class, predicted class, images) of every kind of mistake, the most frequent first."""
    matrix = np.array(confusion, dtype=np.int64)
    np.fill_diagonal(matrix, 0)
    rows, columns = np.nonzero(matrix)
    order = np.lexsort((columns, rows, -matrix[rows, columns]))  # ties in the order of the classes
    return [(int(rows[i]), int(columns[i]), int(matrix[rows[i], columns[i]])) for i in order]


def average_precision(score: ArrayLike, held: ArrayLike, weight: ArrayLike | None = None) -> FloatArray:
    """Return the area under the precision-recall steps of one label.

    Args:
        score: (N,) the larger the more likely; equal ones are accepted together.
        held: (N,) bool, whether the image has the label.
        weight: (R, N) how often each image counts in each of R redraws; None for once, R = 1.

    Returns:
        (R,), NaN where no image that counts has the label.

    Source: sum over thresholds of (recall - recall before) x precision, as scikit-learn's average_precision_score.
    """
    score, held = np.asarray(score, dtype=np.float64), np.asarray(held, dtype=bool)
    weights = np.ones((1, score.size)) if weight is None else np.asarray(weight, dtype=np.float64)
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    last = np.searchsorted(-ordered, -ordered, side="right") - 1  # of the images of one score
    counted = weights[:, order]
    right = counted * held[order]
    precision = _ratio(np.cumsum(right, axis=1), np.cumsum(counted, axis=1))[:, last]
    return _ratio(np.where(right > 0, right * precision, 0.0).sum(axis=1), right.sum(axis=1))


def mean_average_precision(probs: ArrayLike, held: ArrayLike) -> float:
    """Return the mean `average_precision` over the labels that occur; NaN if none does.

    Args:
        probs: (N, K).
        held: (N, K) bool.
    """
    probs, held = np.asarray(probs), np.asarray(held, dtype=bool)
    return _mean_of_known(np.array([average_precision(p, h)[0] for p, h in zip(probs.T, held.T, strict=True)]))


def mean_average_precision_interval(
    probs: ArrayLike, held: ArrayLike, groups: ArrayLike | None = None, *, n: int = 500, seed: int = 0
) -> Interval:
    """Return `mean_average_precision` with its `bootstrap_interval`.

    Args:
        probs: (N, K).
        held: (N, K) bool.
        groups: (N,) what is redrawn together, see `bootstrap_interval`.
        n: Number of redraws.
        seed: Seed of the redraws.
    """
    # One column an image: what is summed over a redraw is how often each image came.
    once = scipy.sparse.csr_array(scipy.sparse.identity(len(np.asarray(probs)), format="csr"))
    return bootstrap_interval(once, groups, statistic=redrawn_mean_average_precision(probs, held), n=n, seed=seed)


def redrawn_mean_average_precision(probs: ArrayLike, held: ArrayLike) -> Statistic:
    """Return the function from (R, N), how often each image was drawn, to `mean_average_precision` (R,).

    Args:
        probs: (N, K).
        held: (N, K) bool.
    """
    scores, labels = np.asarray(probs, dtype=np.float64), np.asarray(held, dtype=bool)

    def redrawn(weight: FloatArray) -> FloatArray:
        each = [average_precision(p, h, weight) for p, h in zip(scores.T, labels.T, strict=True)]
        return _rows_mean_of_known(np.stack(each, axis=1))

    return redrawn


def f1_of_labels(held: ArrayLike, given: ArrayLike) -> tuple[float, float]:
    """Return F1 as the mean over the labels that occur or are given (macro), and over all decisions (micro).

    Args:
        held: (N, K) bool, the labels of each image.
        given: (N, K) bool, the labels that it was given. Without any label on either side both are 1: nothing is wrong.
    """
    sums = label_counts(held, given).sum(axis=0)[None]
    macro, micro = _macro_f1_from_counts(sums)[0], micro_f1_from_counts(sums)[0]
    return (1.0 if math.isnan(macro) else float(macro)), (1.0 if math.isnan(micro) else float(micro))


def label_counts(held: ArrayLike, given: ArrayLike) -> FloatArray:
    """Return (N, 3K): one column each for right, true and given labels of an image."""
    held, given = np.asarray(held, dtype=bool), np.asarray(given, dtype=bool)
    return np.concatenate([held & given, held, given], axis=1).astype(np.float64)


def micro_f1_from_counts(sums: FloatArray) -> FloatArray:
    """Return micro F1 (R,) from (R, 3K) sums of `label_counts`."""
    hit, support, predicted = (part.sum(axis=1) for part in np.split(sums, 3, axis=1))
    return _ratio(2 * hit, support + predicted)


def labels_f1_interval(
    held: ArrayLike, given: ArrayLike, groups: ArrayLike | None = None, *, micro: bool, seed: int = 0
) -> Interval:
    """Return one of the two `f1_of_labels` with its `bootstrap_interval`."""
    statistic = micro_f1_from_counts if micro else _macro_f1_from_counts
    return bootstrap_interval(label_counts(held, given), groups, statistic=statistic, seed=seed)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share; (0, 1) without observations.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n == 0:
        return 0.0, 1.0
    interval = scipy.stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    values: ArrayLike | scipy.sparse.csr_array,
    groups: ArrayLike | None = None,
    *,
    statistic: Statistic | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return a bootstrap interval of a mean, or of any function of sums over images.

    Images are drawn with replacement; where `groups` are given, whole groups are, because neighbouring images are
    alike and say less than as many independent ones. The interval holds the percentiles of the redrawn statistic, a
    little wider than nominal for few units: Hesterberg's expanded percentiles, which for a mean have the width of a
    t interval.

    Where the redrawn statistic cannot vary the percentiles would claim certainty; the defined fallbacks, each with its
    reason in the result, are:

    - every unit the same (all right): Wilson's bound for a share that was never seen among that many units;
    - one group: images are drawn instead;
    - no images: NaN.

    Args:
        values: (N,) one number an image, for example 1 for right and 0 for wrong; or (N, P), dense or sparse, P
            quantities an image, whose sums `statistic` takes.
        groups: (N,) any labels; None draws images. A missing label (None or NaN) is a group of its own.
        statistic: Maps (R, P) sums, and for R = 1 the sums over the data themselves, to (R,) results; None is the
            mean of `values`. NaN results are left out of the percentiles.
        bounds: Smallest and largest possible result, for the fallback and to clip.
        n: Number of redraws.
        seed: Seed of the redraws; equal input gives an equal interval.
        level: Coverage, in (0, 1).

    Raises:
        ValueError: If `values` and `groups` differ in length, or 2-d values come without a statistic.

    Source: Hesterberg 2015, "What teachers should know about the bootstrap", The American Statistician 69, sec. 4.3.
    """
    table, compute = _additive(values, statistic)
    total = table.shape[0]
    units, reason = "images", None
    if total == 0:
        return Interval(math.nan, math.nan, math.nan, level, units, 0, "there are no images")
    point = float(compute(_sum_rows(table))[0])

    if groups is not None:
        code = _group_codes(groups)
        if code.size != total:
            raise ValueError(f"{total} values and {code.size} groups; there must be one group an image")
        count = int(code.max()) + 1
        if count > 1:
            units = "groups"
            member = scipy.sparse.csr_array((np.ones(total), (code, np.arange(total))), shape=(count, total))
            table = member @ table
        else:
            reason = "all images lie in one group, so images were redrawn; if they are alike this is too narrow"
    observed = table.shape[0]
    rows, multiplicity = _distinct(table)

    if rows.shape[0] > 1 and observed > 1 and math.isfinite(point):
        drawn = _redraw(rows, multiplicity, compute, n, np.random.default_rng(seed))
        drawn = drawn[np.isfinite(drawn)]
        if drawn.size and np.ptp(drawn) > 0:
            tail = _expanded_tail(observed, level)
            low, high = np.quantile(drawn, [tail, 1.0 - tail])
            if units == "groups" and observed < 10:
                reason = f"only {observed} groups: read the interval as rough"
            return Interval(
                point, max(float(low), bounds[0]), min(float(high), bounds[1]), level, units, observed, reason
            )

    missed = 1.0 - wilson_interval(observed, observed, level)[0]
    low, high = point - missed * (point - bounds[0]), point + missed * (bounds[1] - point)
    same = f"all {observed} {units} give the same value, so Wilson's bound stands in for the bootstrap"
    return Interval(point, low, high, level, units, observed, f"{reason}; {same}" if reason else same)


def balanced_accuracy_interval(
    label: ArrayLike, pred: ArrayLike, num_classes: int, groups: ArrayLike | None = None, *, seed: int = 0
) -> Interval:
    """Return `balanced_accuracy` with its `bootstrap_interval`; label and pred are (N,) in [0, num_classes)."""
    return bootstrap_interval(
        _class_counts(label, pred, num_classes), groups, statistic=_balanced_from_counts, seed=seed
    )


def macro_f1_interval(
    label: ArrayLike, pred: ArrayLike, num_classes: int, groups: ArrayLike | None = None, *, seed: int = 0
) -> Interval:
    """Return `macro_f1` with its `bootstrap_interval`; label and pred are (N,) in [0, num_classes)."""
    return bootstrap_interval(
        _class_counts(label, pred, num_classes), groups, statistic=_macro_f1_from_counts, seed=seed
    )


def _class_counts(label: ArrayLike, pred: ArrayLike, num_classes: int) -> scipy.sparse.csr_array:
    """(N, 3K) sparse: one column each for hit, true and predicted class of an image."""
    label, pred = _classes(label, num_classes, "label"), _classes(pred, num_classes, "pred")
    rows = np.arange(label.size)
    hit = rows[label == pred]
    row = np.concatenate([hit, rows, rows])
    column = np.concatenate([label[hit], num_classes + label, 2 * num_classes + pred])
    return scipy.sparse.csr_array((np.ones(row.size), (row, column)), shape=(label.size, 3 * num_classes))


def _balanced_from_counts(sums: FloatArray) -> FloatArray:
    """Balanced accuracy from (R, 3K) class counts."""
    hit, support, _ = np.split(sums, 3, axis=1)
    return _rows_mean_of_known(_ratio(hit, support))


def _macro_f1_from_counts(sums: FloatArray) -> FloatArray:
    """Macro F1 from (R, 3K) class counts."""
    hit, support, predicted = np.split(sums, 3, axis=1)
    return _rows_mean_of_known(_ratio(2 * hit, support + predicted))


def _additive(values: Any, statistic: Statistic | None) -> tuple[Any, Statistic]:
    """Bring values to (N, P) float and the statistic to a function of sums; a mean is sum / count."""
    if statistic is not None:
        if scipy.sparse.issparse(values):
            return scipy.sparse.csr_array(values, dtype=np.float64), statistic
        table = np.asarray(values, dtype=np.float64)
        return (table[:, None] if table.ndim == 1 else table), statistic
    flat = np.asarray(values, dtype=np.float64)
    if flat.ndim != 1:
        raise ValueError(f"values of shape {flat.shape} need a statistic; only (N,) values have a plain mean")
    return np.stack([flat, np.ones_like(flat)], axis=1), lambda sums: sums[:, 0] / sums[:, 1]


def _sum_rows(table: Any) -> FloatArray:
    """(1, P) sums of a dense or sparse table."""
    return np.asarray(table.sum(axis=0), dtype=np.float64).reshape(1, -1)


def _distinct(table: Any) -> tuple[Any, NDArray[np.int64]]:
    """Distinct rows and how often each occurs: redrawing them by multiplicity is the same experiment, but smaller."""
    if scipy.sparse.issparse(table):
        table.sum_duplicates()
        first: dict[tuple[bytes, bytes], int] = {}
        count: Counter[tuple[bytes, bytes]] = Counter()
        for row, (a, b) in enumerate(pairwise(table.indptr)):
            key = (table.indices[a:b].tobytes(), table.data[a:b].tobytes())
            first.setdefault(key, row)  # order of first appearance, so that equal input draws equally
            count[key] += 1
        return table[list(first.values())], np.array([count[key] for key in first])
    rows, multiplicity = np.unique(table, axis=0, return_counts=True)
    return rows, multiplicity


def _redraw(
    rows: Any, multiplicity: NDArray[np.int64], compute: Statistic, n: int, rng: np.random.Generator
) -> FloatArray:
    """The statistic of n redraws, (n,), in chunks of bounded memory."""
    observed = int(multiplicity.sum())
    chance = multiplicity / observed
    step = max(1, _CHUNK // len(multiplicity))
    drawn = []
    for start in range(0, n, step):
        weight = rng.multinomial(observed, chance, size=min(step, n - start)).astype(np.float64)
        drawn.append(compute(np.asarray(weight @ rows)))
    return np.concatenate(drawn)


def _expanded_tail(n: int, level: float) -> float:
    """Hesterberg's tail probability for n units: the normal tail at the t quantile, widened by n / (n - 1)."""
    t = scipy.stats.t.ppf((1.0 - level) / 2.0, n - 1)
    return float(scipy.stats.norm.cdf(t * math.sqrt(n / (n - 1))))


def _group_codes(groups: ArrayLike) -> NDArray[np.int64]:
    """(N,) integers 0..G-1; each missing label is a group of its own."""
    labels = np.asarray(groups, dtype=object)
    missing = np.array([g is None or g != g for g in labels], dtype=bool)
    names = np.array([str(g) for g in labels[~missing]], dtype=str)
    code = np.empty(labels.size, dtype=np.int64)
    distinct, inverse = np.unique(names, return_inverse=True)
    code[~missing] = inverse
    code[missing] = len(distinct) + np.arange(int(missing.sum()))
    return code


def _classes(values: ArrayLike, num_classes: int, name: str) -> NDArray[np.int64]:
    """(N,) class numbers, checked."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be (N,) integers, not {array.dtype} of shape {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() < num_classes):
        raise ValueError(f"{name} holds {array.min()}..{array.max()}, outside the classes 0..{num_classes - 1}")
    return array.astype(np.int64)


def _probabilities(probs: ArrayLike, label: ArrayLike) -> tuple[FloatArray, NDArray[np.int64]]:
    """(N, K) float64 probabilities and (N,) labels, checked."""
    table = np.asarray(probs, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"probs must be (N, K), not of shape {table.shape}")
    checked = _classes(label, table.shape[1], "label")
    if checked.size != table.shape[0]:
        raise ValueError(f"probs has {table.shape[0]} rows and label {checked.size}; they must be the same images")
    return table, checked


def _ratio(part: ArrayLike, whole: ArrayLike) -> FloatArray:
    """Part / whole, NaN where whole is zero."""
    top, bottom = np.broadcast_arrays(np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def _mean_of_known(values: FloatArray) -> float:
    """Mean over the entries that are not NaN; NaN when there is none."""
    return float(_rows_mean_of_known(values[None, :])[0])


def _rows_mean_of_known(values: FloatArray) -> FloatArray:
    """(R,) means over the entries of each row that are not NaN."""
    return _ratio(np.nansum(values, axis=1), np.isfinite(values).sum(axis=1))
