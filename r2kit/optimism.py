"""The optimism gap: what the same network seems to reach when its test images are neighbours of the training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r2kit.console import make_console
from r2kit.data.sources import open_source
from r2kit.data.splits import make_split
from r2kit.errors import RecipeError
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe
from r2kit.report import write_report
from r2kit.report.classification import stored_result
from r2kit.result import interval_words, percent
from r2kit.run import Run
from r2kit.train import finetune

_FIGURE = {
    "classification": ("accuracy", "accuracy"),
    "multilabel": ("map", "mean average precision"),
    "segmentation": ("miou", "mean IoU"),
}
"""Key of metrics.json and name of the figure that is compared, for each kind of task."""


def optimism(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Run:
    """Train a recipe twice, under a random split and under its split by blocks or groups, and compare the results.

    The only difference is `data.split` (and that leaks are kept in the random one: they are what is measured). The
    result stands in run.json and in the report of the honest run.

    Args:
        recipe: See `train.finetune`; its `data.split` decides by what is held out, `auto` as always.
        out: Folder of both runs: ``out/honest`` and ``out/random``. Runs in it that are finished are not made again.
        overrides: ``key.path=value`` items.
        quiet: Print nothing.

    Returns:
        The honest run.

    Raises:
        RecipeError: If the task has no such figure, or the data is not divided by blocks or groups.
        RunError: If a run in `out` is of another recipe.
    """
    checked = load_recipe(recipe, overrides)
    if checked.task.kind not in _FIGURE:
        raise RecipeError(f"task.kind: {checked.task.kind} has no optimism gap; allowed is {', '.join(_FIGURE)}")
    source = open_source(checked.data, checked.target)
    honest = make_split(source.manifest, source.strata, checked.data, checked.seed, source.contents)
    if honest.kind not in ("blocks", "group"):
        raise RecipeError(
            f"data.split: the images would be divided by {honest.described}; the gap is between a random split and one "
            "by blocks or groups, so they need coordinates or a column group, and data.split=blocks or group"
        )
    runs = {}
    for name, items in (
        ("honest", [f"data.split={honest.kind}"]),
        ("random", ["data.split=stratified", "data.on_leak=keep"]),
    ):
        runs[name] = finetune(checked, out=Path(out) / name, overrides=items, resume=True, quiet=quiet)
    found = compare_splits(runs["random"], runs["honest"], honest.kind)
    runs["honest"].write_info(optimism=found)
    write_report(runs["honest"])
    make_console(quiet=quiet).print(found["sentence"])
    return runs["honest"]


def compare_splits(random: Run, honest: Run, kind: str) -> dict[str, Any]:
    """Return the gap between two evaluated runs that differ in their split only.

    Args:
        random: Divided at random.
        honest: Divided by whole blocks or groups.
        kind: ``blocks`` or ``group``.

    Returns:
        JSON primitives: name of the figure, both intervals, the gap with its interval (the two results are of different
        images, so the half widths add as squares), and a sentence.

    Raises:
        RunError: If a run has no result.
    """
    key, name = _FIGURE[honest.recipe.task.kind]
    both = []
    for run in (random, honest):
        both.append(stored_result(run, key)[key])
    a, b = both
    gap = a["value"] - b["value"]
    low, high = None, None
    if None not in (a["low"], a["high"], b["low"], b["high"]):
        low = gap - math.hypot(a["value"] - a["low"], b["high"] - b["value"])
        high = gap + math.hypot(a["high"] - a["value"], b["value"] - b["low"])
    units = {"blocks": "spatial blocks", "group": "groups"}[kind]
    span = "" if low is None or high is None else f" (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    shown = "" if low is None or low > 0 else ", so no optimism is shown"
    return {
        "figure": name,
        "random": a,
        "honest": b,
        "gap": gap,
        "low": low,
        "high": high,
        "units": units,
        "sentence": (
            f"Optimism gap: the same network under a random split reaches {percent(a['value'])} {name} "
            f"({interval_words(a)}), with whole {units} held out {percent(b['value'])} ({interval_words(b)}): "
            f"{100 * gap:+.1f} points{span}{shown}."
        ),
    }
