"""The evaluated result of a task of salient objects: from stored measures to figures and plain sentences.

The table of measures has one row an image: ``id``, ``path``, ``mae``, ``f_curve`` and ``e_curve`` (256 thresholds),
``weighted_f``, ``s_measure``, ``f_everything`` (the F-measure of calling everything an object), ``group``, ``lon``,
``lat``. Every measure is a mean over images; `max_f` and `max_e` are the largest value of the mean curve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from r2kit import metrics
from r2kit.result import Result, groups, images_of, percent, with_interval


def compute(table: pd.DataFrame, *, split: str, seed: int = 0, group_word: str = "spatial block") -> Result:
    """Compute every figure of a result from the table of measures, see the module's docstring; JSON primitives."""
    group = groups(table)

    def mean(column: str) -> dict[str, Any]:
        return metrics.bootstrap_interval(table[column].to_numpy(np.float64), group, seed=seed).to_dict()

    def best(column: str) -> dict[str, Any]:
        curves = np.array([np.asarray(row) for row in table[column]], dtype=np.float64)
        counted = np.concatenate([curves, np.ones((len(curves), 1))], axis=1)

        def statistic(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            largest: NDArray[np.float64] = (sums[:, :-1] / sums[:, -1:]).max(axis=1)
            return largest

        return metrics.bootstrap_interval(counted, group, statistic=statistic, seed=seed).to_dict()

    return {
        "task": "saliency",
        "split": split,
        "images": len(table),
        "groups": None if group is None else len(pd.unique(pd.Series(group).dropna())),
        "group_word": group_word,
        "classes": ["background", "object"],
        "mae": mean("mae"),
        "max_f": best("f_curve"),
        "weighted_f": mean("weighted_f"),
        "s_measure": mean("s_measure"),
        "max_e": best("e_curve"),
        "f_everything": mean("f_everything"),
    }


def headline(result: Result) -> str:
    """Return the result and what it stands beside as one plain sentence."""
    return (
        f"The largest F-measure is {with_interval(result['max_f'])} on {images_of(result)}; calling every pixel an "
        f"object gives {percent(result['f_everything']['value'])}."
    )


def caveats(result: Result) -> list[str]:
    """Return what to keep in mind when reading the figures, one sentence each."""
    found = ["The threshold of the largest F-measure is chosen on these very images, as is usual for this figure."]
    if result["split"] == "val":
        found.append("These images also chose the best epoch: expect a little less on new ones.")
    if result["max_f"]["reason"]:
        found.append(f"About the interval: {result['max_f']['reason']}.")
    return found


def summary_lines(result: Result) -> list[str]:
    """Return the result as a few lines for a terminal."""
    averaged = ", averaged over eight orientations" if result.get("tta") else ""
    return [
        f"{result['split']} largest F-measure {with_interval(result['max_f'])} on {images_of(result)}{averaged}",
        f"  everything an object: {with_interval(result['f_everything'])}",
        f"mean absolute error {with_interval(result['mae'])}, weighted F {with_interval(result['weighted_f'])}",
        f"S-measure {with_interval(result['s_measure'])}, largest E-measure {with_interval(result['max_e'])}",
        *(f"note: {note}" for note in caveats(result)),
    ]
