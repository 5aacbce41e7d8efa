"""The evaluated result of a classification: from stored predictions to figures, and from figures to plain sentences.

The table of predictions is the only source of every figure. It has one row an image, with the columns ``id``, ``path``,
``label`` and ``pred`` (names of classes), ``prob_<class>`` for every class, ``group``, ``lon``, ``lat``, and the
baselines' answers ``pred_majority`` and ``pred_logistic`` where they could be had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from r2kit import calibration, metrics
from r2kit.errors import RunError

PROBABILITY = "prob_"
"""Prefix of the probability columns."""

BASELINES = {
    "majority": "the majority class of the training images",
    "logistic": "logistic regression on the mean and standard deviation of each band",
}
"""Names of the baselines and what they are."""

COVERAGES = (0.8, 0.9, 0.95)
"""Coverages that label sets are made for."""

Result = dict[str, Any]
"""The contents of metrics.json; see `compute`."""


def labels(table: pd.DataFrame, column: str, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return a column of class names as numbers (N,), in the order of `classes`.

    Raises:
        RunError: If a name is no class.
    """
    number = {name: i for i, name in enumerate(classes)}
    try:
        return np.array([number[name] for name in table[column]], dtype=np.int64)
    except KeyError as error:
        raise RunError(f"predictions: column '{column}' names {error}, which is no class of this run") from None


def probabilities(table: pd.DataFrame, classes: Sequence[str]) -> NDArray[np.float64]:
    """Return the probability columns (N, K), in the order of `classes`.

    Raises:
        RunError: If a column is missing.
    """
    columns = [f"{PROBABILITY}{name}" for name in classes]
    missing = [column for column in columns if column not in table]
    if missing:
        raise RunError(f"predictions: column '{missing[0]}' is missing; run r2kit evaluate again")
    return table[columns].to_numpy(np.float64)


def groups(table: pd.DataFrame) -> NDArray[np.object_] | None:
    """Return the group of each image (N,), or None when no image has one."""
    return table["group"].to_numpy(object) if "group" in table and table["group"].notna().any() else None


def compute(
    table: pd.DataFrame, classes: Sequence[str], *, split: str, seed: int = 0, group_word: str = "spatial block"
) -> Result:
    """Compute every figure of a result from the table of predictions.

    Args:
        table: One row an image, see the module's docstring.
        classes: Names of the classes, K of them.
        split: What the images are: ``test``, ``val``, or the name of another set.
        seed: Seed of the bootstrap.
        group_word: What a person calls a group of images that were held out together.

    Returns:
        JSON primitives. Intervals are `metrics.Interval.to_dict`; shares are in [0, 1]; a figure that the data cannot
        give is None.

    Raises:
        RunError: If the table does not belong to these classes.
    """
    label, pred, probs = labels(table, "label", classes), labels(table, "pred", classes), probabilities(table, classes)
    group, count = groups(table), len(classes)
    confusion = metrics.confusion_matrix(label, pred, count)
    each = metrics.per_class(confusion)
    right = (label == pred).astype(np.float64)
    losses = metrics.log_losses(probs, label)

    def interval(values: NDArray[np.float64], rows: NDArray[np.bool_] | None = None, **options: Any) -> dict[str, Any]:
        chosen = slice(None) if rows is None else rows
        found = metrics.bootstrap_interval(
            values[chosen], None if group is None else group[chosen], seed=seed, **options
        )
        return found.to_dict()

    per_class = [
        {
            "class": name,
            "support": int(each.support[i]),
            "recall": interval(right, label == i),
            "precision": _finite(each.precision[i]),
            "f1": _finite(each.f1[i]),
        }
        for i, name in enumerate(classes)
    ]
    seen = [i for i in range(count) if each.support[i]]
    worst = sorted(seen, key=lambda i: (each.recall[i], i))[:3]
    result: Result = {
        "split": split,
        "images": len(table),
        "groups": None if group is None else len(pd.unique(pd.Series(group).dropna())),
        "group_word": group_word,
        "classes": list(classes),
        "accuracy": interval(right),
        "balanced_accuracy": metrics.balanced_accuracy_interval(label, pred, count, group, seed=seed).to_dict(),
        "macro_f1": metrics.macro_f1_interval(label, pred, count, group, seed=seed).to_dict(),
        "log_loss": interval(losses, bounds=(0.0, math.inf)) if len(table) > 1 else None,
        "calibration_error": {"value": _finite(metrics.calibration_error(probs, label)), "bins": 15},
        "per_class": per_class,
        "worst_classes": [classes[i] for i in worst],
        "confusion": confusion.tolist(),
        "confusion_pairs": [
            {"label": classes[a], "pred": classes[b], "images": n, "share_of_label": n / int(each.support[a])}
            for a, b, n in metrics.confusion_pairs(confusion)[:10]
        ],
        "baselines": {},
        "difference": {},
    }
    for name, what in BASELINES.items():
        if f"pred_{name}" not in table:
            continue
        hits = (labels(table, f"pred_{name}", classes) == label).astype(np.float64)
        result["baselines"][name] = {"what": what, "accuracy": interval(hits)}
        if name == "majority":
            result["baselines"][name]["class"] = str(table[f"pred_{name}"].iloc[0]) if len(table) else None
        result["difference"][name] = interval(right - hits, bounds=(-1.0, 1.0))
    return result


def calibrate(
    table: pd.DataFrame, fitted_on: pd.DataFrame | str, classes: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Fit a temperature and the thresholds of label sets on validation images, and judge them on the evaluated ones.

    Args:
        table: Predictions of the evaluated images.
        fitted_on: Predictions of the validation images, or why there are none.
        classes: Names of the classes, K of them.
        seed: Seed of the bootstrap.

    Returns:
        JSON primitives: `images` fitted on; `temperature`; `calibration_error` and `log_loss` before and after, as
        numbers; `sets`, one for each of `COVERAGES`: the promised and the seen coverage, the mean number of classes in
        a set, the share of sets with one class. Only `left_out` where nothing could be fitted.
    """
    if isinstance(fitted_on, str):
        return {"left_out": fitted_on}
    fit_label, fit_probs = labels(fitted_on, "label", classes), probabilities(fitted_on, classes)
    label, probs, group = labels(table, "label", classes), probabilities(table, classes), groups(table)
    temperature = calibration.fit_temperature(fit_probs, fit_label)
    scaled = calibration.rescale(probs, temperature)
    sets = []
    for coverage in COVERAGES:
        threshold = calibration.conformal_threshold(fit_probs, fit_label, coverage)
        inside = calibration.label_sets(probs, threshold)
        covered = inside[np.arange(len(label)), label].astype(np.float64)
        size = inside.sum(axis=1)
        sets.append(
            {
                "promised": coverage,
                "threshold": threshold,
                "coverage": metrics.bootstrap_interval(covered, group, seed=seed).to_dict(),
                "mean_size": _finite(float(size.mean())) if size.size else None,
                "single": _finite(float((size == 1).mean())) if size.size else None,
            }
        )
    return {
        "images": len(fitted_on),
        "temperature": temperature,
        "calibration_error": [_finite(metrics.calibration_error(p, label)) for p in (probs, scaled)],
        "log_loss": [_finite(metrics.log_loss(p, label)) for p in (probs, scaled)],
        "sets": sets,
    }


def headline(result: Result) -> str:
    """Return the result, its interval and the baselines as one plain sentence."""
    sentence = f"{percent(result['accuracy']['value'])} of the {images_of(result)} are classified correctly"
    sentence += f" ({interval_words(result['accuracy'])})"
    base = result["baselines"]
    parts = []
    if "majority" in base:
        majority = base["majority"]
        parts.append(f"always answering '{majority['class']}' gives {percent(majority['accuracy']['value'])}")
    if "logistic" in base:
        parts.append(
            f"a logistic regression on band means and deviations {percent(base['logistic']['accuracy']['value'])}"
        )
    return sentence + (f"; {' and '.join(parts)}" if parts else "") + "."


def verdict(result: Result) -> str | None:
    """Return whether the network beats the logistic regression, as one sentence; None without that baseline."""
    difference = result["difference"].get("logistic")
    if difference is None or difference["value"] is None:
        return None
    points, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    level = 100 * difference["level"]
    span = f"{level:.0f} % interval of the difference on the same images {low:+.1f} to {high:+.1f} points"
    if low > 0:
        return f"The network is better than colour alone by {points:.1f} points ({span})."
    if high < 0:
        return f"The network is worse than colour alone by {-points:.1f} points ({span})."
    return f"It is not shown that the network is better than colour alone: {points:+.1f} points ({span})."


def caveats(result: Result) -> list[str]:
    """Return what to keep in mind when reading the figures, one sentence each."""
    found = []
    if result["split"] == "val":
        found.append("These images also chose the best epoch: expect a little less on new ones.")
    if result["accuracy"]["reason"]:
        found.append(f"About the interval: {result['accuracy']['reason']}.")
    if result.get("baselines_left_out"):
        found.append(f"No baselines beside it: {result['baselines_left_out']}")
    if result["groups"] is not None and "temperature" in result.get("calibrated", {}):
        found.append(
            f"The promise of label sets holds for images drawn like the validation images; here whole "
            f"{result['group_word']}s were held out, so read the seen coverage."
        )
    empty = [row["class"] for row in result["per_class"] if row["support"] == 0]
    if empty:
        found.append(f"No image of {_listed(empty)} is in this set, so nothing is known about that class.")
    return found


def summary_lines(result: Result) -> list[str]:
    """Return the result as a few lines for a terminal."""
    averaged = ", averaged over eight orientations" if result.get("tta") else ""
    lines = [f"{result['split']} accuracy {with_interval(result['accuracy'])} on {images_of(result)}{averaged}"]
    base = result["baselines"]
    if "majority" in base:
        lines.append(f"  majority class ({base['majority']['class']}) {with_interval(base['majority']['accuracy'])}")
    if "logistic" in base:
        lines.append(f"  logistic regression on band statistics {with_interval(base['logistic']['accuracy'])}")
        lines.append(f"  {verdict(result)}")
    error = percent(result["calibration_error"]["value"])
    lines.append(f"macro F1 {with_interval(result['macro_f1'])}, calibration error {error}")
    lines += calibrated_lines(result)
    rows = {row["class"]: row for row in result["per_class"]}
    for name in result["worst_classes"]:
        row = rows[name]
        lines.append(f"  weak class {name}: recall {with_interval(row['recall'])} of {_count(row['support'], 'image')}")
    for pair in result["confusion_pairs"][:3]:
        lines.append(f"  taken for another: {pair['label']} as {pair['pred']}, {_count(pair['images'], 'image')}")
    return lines + [f"note: {note}" for note in caveats(result)]


def calibrated_lines(result: Result) -> list[str]:
    """Return what temperature scaling and label sets give, one sentence each; nothing where they were left out."""
    found = result.get("calibrated", {})
    if "temperature" not in found:
        return []
    before, after = (percent(value) for value in found["calibration_error"])
    lines = [
        f"temperature {found['temperature']:.2f}, fitted on {_count(found['images'], 'validation image')}: calibration "
        f"error {before} before, {after} after"
    ]
    for row in found["sets"]:
        if row["promised"] == 0.9:
            lines.append(
                f"label sets with {percent(row['promised'])} promised coverage: {with_interval(row['coverage'])} seen, "
                f"{row['mean_size']:.1f} classes a set"
            )
    return lines


def percent(share: float | None) -> str:
    """Return a share as a percentage with one digit, ``not known`` for None."""
    return "not known" if share is None else f"{100 * share:.1f} %"


def interval_words(interval: dict[str, Any]) -> str:
    """Return the ends of an interval of a share in words."""
    if interval["low"] is None:
        return "no interval"
    return f"{100 * interval['level']:.0f} % interval {100 * interval['low']:.1f} to {100 * interval['high']:.1f}"


def with_interval(interval: dict[str, Any]) -> str:
    """Return a share with its interval, for example ``81.2 % (95 % interval 77.0 to 85.1)``."""
    return (
        f"{percent(interval['value'])} ({interval_words(interval)})" if interval["value"] is not None else "not known"
    )


def images_of(result: Result) -> str:
    """Return how many images of what, for example ``312 test images in 34 blocks``."""
    where = "" if result["groups"] is None else f" in {_count(result['groups'], result['group_word'])}"
    return f"{result['images']} {result['split']} image{'' if result['images'] == 1 else 's'}{where}"


def _count(number: int, thing: str) -> str:
    """A number and its thing, in the plural where that is due."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    """Names in a row, at most five of them."""
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _finite(value: float) -> float | None:
    """None for NaN, which JSON has no word for."""
    return float(value) if math.isfinite(value) else None
