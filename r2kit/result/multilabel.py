"""The evaluated result of images with several labels: from stored predictions to figures, and to plain sentences.

The table of predictions has one row an image, with the columns ``id``, ``path``, ``label`` and ``pred`` (labels
separated by ``;``), ``prob_<label>`` for every label, ``group``, ``lon``, ``lat``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from r2kit import metrics
from r2kit.data.files import labels_of
from r2kit.errors import RunError
from r2kit.result import Result, groups, images_of, percent, probabilities, with_interval


def held_labels(table: pd.DataFrame, column: str, classes: Sequence[str]) -> NDArray[np.bool_]:
    """Return a column of labels as (N, K), in the order of `classes`.

    Raises:
        RunError: If a name is no label.
    """
    number = {name: i for i, name in enumerate(classes)}
    held = np.zeros((len(table), len(classes)), dtype=bool)
    for row, cell in enumerate(table[column]):
        for name in labels_of(cell):
            if name not in number:
                raise RunError(f"predictions: column '{column}' names '{name}', which is no label of this run")
            held[row, number[name]] = True
    return held


def compute(
    table: pd.DataFrame,
    classes: Sequence[str],
    *,
    split: str,
    threshold: float,
    seed: int = 0,
    group_word: str = "spatial block",
) -> Result:
    """Compute every figure of a result from the table of predictions.

    Args:
        table: One row an image, see the module's docstring.
        classes: Names of the labels, K of them.
        split: What the images are: ``test``, ``val``, or the name of another set.
        threshold: Probability from which a label was given.
        seed: Seed of the bootstrap.
        group_word: What a person calls a group of images that were held out together.

    Returns:
        JSON primitives. Intervals are `metrics.Interval.to_dict`; shares are in [0, 1]; a figure that the data cannot
        give is None.

    Raises:
        RunError: If the table does not belong to these labels.
    """
    held, given = (held_labels(table, column, classes) for column in ("label", "pred"))
    probs, group = probabilities(table, classes), groups(table)
    hit, support, predicted = np.split(metrics.label_counts(held, given).sum(axis=0), 3)
    per_class: list[dict[str, Any]] = []
    for i, name in enumerate(classes):
        found = float(metrics.average_precision(probs[:, i], held[:, i])[0])
        per_class.append(
            {
                "class": name,
                "support": int(support[i]),
                "average_precision": found if support[i] else None,
                "chance": float(support[i] / max(len(table), 1)),
                "precision": float(hit[i] / predicted[i]) if predicted[i] else None,
                "recall": float(hit[i] / support[i]) if support[i] else None,
                "f1": float(2 * hit[i] / (support[i] + predicted[i])) if support[i] + predicted[i] else None,
            }
        )
    known = [row for row in per_class if row["average_precision"] is not None]
    return {
        "task": "multilabel",
        "split": split,
        "images": len(table),
        "groups": None if group is None else len(pd.unique(pd.Series(group).dropna())),
        "group_word": group_word,
        "classes": list(classes),
        "threshold": threshold,
        "map": metrics.mean_average_precision_interval(probs, held, group, seed=seed).to_dict(),
        "chance_map": float(np.mean([row["chance"] for row in known])) if known else None,
        "macro_f1": metrics.labels_f1_interval(held, given, group, micro=False, seed=seed).to_dict(),
        "micro_f1": metrics.labels_f1_interval(held, given, group, micro=True, seed=seed).to_dict(),
        "exact": metrics.bootstrap_interval((held == given).all(axis=1).astype(float), group, seed=seed).to_dict(),
        "per_class": per_class,
        "worst_classes": [row["class"] for row in sorted(known, key=lambda row: row["average_precision"])[:3]],
    }


def headline(result: Result) -> str:
    """Return the result, its interval and what chance gives as one plain sentence."""
    return (
        f"Mean average precision is {with_interval(result['map'])} on {images_of(result)}; answering at random gives "
        f"{percent(result['chance_map'])}, the mean share of images with a label."
    )


def threshold_words(result: Result) -> str:
    """Return which figures depend on the threshold, as one sentence."""
    return (
        f"A label is given from a probability of {result['threshold']:g}, the same for all labels (task.threshold); "
        "F1, precision, recall and exact matches are at that threshold, average precision is over all of them."
    )


def caveats(result: Result) -> list[str]:
    """Return what to keep in mind when reading the figures, one sentence each."""
    found = []
    if result["split"] == "val":
        found.append("These images also chose the best epoch: expect a little less on new ones.")
    if result["map"]["reason"]:
        found.append(f"About the interval: {result['map']['reason']}.")
    bare = [row["class"] for row in result["per_class"] if row["support"] == 0]
    if bare:
        found.append(f"No image with the label {', '.join(bare[:5])} is in this set: it is left out of the means.")
    return found


def summary_lines(result: Result) -> list[str]:
    """Return the result as a few lines for a terminal."""
    lines = [
        f"{result['split']} mean average precision {with_interval(result['map'])} on {images_of(result)}",
        f"  at random {percent(result['chance_map'])}",
        f"at threshold {result['threshold']:g}: macro F1 {with_interval(result['macro_f1'])}, "
        f"micro F1 {with_interval(result['micro_f1'])}, all labels right {with_interval(result['exact'])}",
    ]
    rows: dict[str, dict[str, Any]] = {row["class"]: row for row in result["per_class"]}
    for name in result["worst_classes"]:
        row = rows[name]
        lines.append(
            f"  weak label {name}: average precision {percent(row['average_precision'])} of {row['support']} images"
        )
    return lines + [f"note: {note}" for note in caveats(result)]
