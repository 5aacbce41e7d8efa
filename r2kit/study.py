"""A study: a recipe, and the same with one key changed at a time; accuracy against what each network costs.

It is the form of the Res2Net paper's own study (arXiv:1904.01169, sec. 4.4), which varies depth, cardinality and scale
around one network. Any other keys, such as the width, can be varied just as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console

from r2kit import metrics, plots
from r2kit.backbones import create_model
from r2kit.compare import compare_runs, seeds_interval
from r2kit.console import make_console, table
from r2kit.errors import RecipeError, RunError
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe
from r2kit.run import Run, write_atomic
from r2kit.train import finetune

BASE = "base"


@dataclass(frozen=True)
class Point:
    """One network of a study.

    Attributes:
        key: What was changed; `BASE` for the recipe itself.
        value: To what, as it was written; empty for the recipe itself.
        accuracy: On the held-out images; the mean over the seeds.
        difference: To the recipe itself, on the same images; None for itself.
        parameters: Their number.
        macs: Multiply-adds of one image of the recipe's size.
        train_seconds: Seconds of training; the mean over the seeds.
    """

    key: str
    value: str
    accuracy: metrics.Interval
    difference: metrics.Interval | None
    parameters: int
    macs: int
    train_seconds: float

    @property
    def name(self) -> str:
        """Key and value in a word that a folder can have."""
        return _name(self.key, self.value)


def study(
    recipe: str | Path | dict[str, Any] | Recipe,
    vary: Sequence[str],
    *,
    seeds: int = 1,
    out: str | Path,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> list[Point]:
    """Train a recipe and its variations, and write study.csv and study.png; what is finished already is kept.

    Args:
        recipe: As `r2kit.finetune` takes it; the base of all.
        vary: ``key.path=value,value``: values that take the place of the recipe's own, one at a time.
        seeds: Number of seeds, counted up from the recipe's. A seed also draws the split, the same for all.
        out: Folder of the runs, the table and the picture.
        overrides: ``key.path=value`` items for all of them.
        quiet: Print nothing.

    Returns:
        The base first, then the variations in the order given.

    Raises:
        RecipeError: If a key or a value is wrong, given twice, or the recipe is no classification.
        ModelError: If a network cannot be built. Both before anything is trained.
        DataError, RunError: As `r2kit.finetune`.
    """
    base = load_recipe(recipe, overrides)
    if base.task.kind != "classification":
        raise RecipeError(f"task.kind: a study knows classification, and the recipe is of {base.task.kind}")
    changes = [(BASE, ""), *_changes(vary)]
    recipes = {
        (key, value): [
            load_recipe(recipe, [*overrides, *([] if key == BASE else [f"{key}={value}"]), f"seed={base.seed + n}"])
            for n in range(seeds)
        ]
        for key, value in changes
    }
    for (key, value), (first, *_) in recipes.items():
        if key != BASE and first.model_copy(update={"name": base.name}) == base:
            raise RecipeError(
                f"--vary {key}: {value} is the recipe's own value, which is the base anyway; leave it out"
            )
        with torch.device("meta"):  # no hour is spent before every network is known to exist
            create_model(first.model.name, **first.model.options)
    console, folder = make_console(quiet=quiet), Path(out)
    runs: dict[tuple[str, str], list[Run]] = {change: [] for change in changes}
    total = len(changes) * seeds
    for number, (change, seed) in enumerate(((change, n) for n in range(seeds) for change in changes), 1):
        name = _name(*change)
        console.print(f"run {number} of {total}: {name}, seed {base.seed + seed}")
        path = folder / f"{name}-seed-{base.seed + seed}"
        runs[change].append(finetune(recipes[change][seed], out=path, resume=True, quiet=quiet))
    points = [_point(change, mine, runs[BASE, ""]) for change, mine in runs.items()]
    _write(points, folder)
    _print(points, seeds, console)
    console.print(f"written: {folder / 'study.csv'}, {folder / 'study.png'}")
    return points


def split_values(text: str) -> list[str]:
    """Return the values of a list divided by commas, those inside brackets left alone: ``1,[2, 3]`` has two."""
    found, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [value.strip() for value in found]


def _changes(vary: Sequence[str]) -> list[tuple[str, str]]:
    """Every key with every value of it."""
    found: list[tuple[str, str]] = []
    for item in vary:
        key, separator, text = item.partition("=")
        values = split_values(text)
        if not separator or not key or not all(values):
            raise RecipeError(f"--vary: got '{item}'; it is written key.path=value,value, e.g. model.block.scale=2,4")
        found += [(key.strip(), value) for value in values]
    if not found:
        raise RecipeError("--vary: nothing is varied; e.g. --vary model.block.scale=2,4")
    if any(key in ("name", "seed") for key, _ in found):
        raise RecipeError("--vary: name and seed make no other network; --seeds gives the number of seeds")
    names = [_name(key, value) for key, value in found]
    if twice := next((change for change, name in zip(found, names, strict=True) if names.count(name) > 1), None):
        raise RecipeError(f"--vary {twice[0]}: {twice[1]} comes twice")
    return found


def _name(key: str, value: str) -> str:
    """Key and value as the name of a folder."""
    word = key.rsplit(".", 1)[-1]
    return word if key == BASE else f"{word}-{re.sub(r'[^A-Za-z0-9.]+', '-', value).strip('-')}"


def _point(change: tuple[str, str], runs: list[Run], base: list[Run]) -> Point:
    """What the runs of one network, one a seed, gave."""
    itself = change[0] == BASE
    pairs = [] if itself else [compare_runs([b, r], speed=False) for b, r in zip(base, runs, strict=True)]
    differences = [pair.differences[0].interval for pair in pairs]
    info = runs[0].info
    return Point(
        *change,
        accuracy=_over_seeds([_accuracy(run) for run in runs], (0.0, 1.0)),
        difference=None if itself else _over_seeds(differences, (-1.0, 1.0)),
        parameters=int(info["model"]["parameters"]),
        macs=int(info["model"]["macs"]),
        train_seconds=sum(float(run.info["train_seconds"]) for run in runs) / len(runs),
    )


def _accuracy(run: Run) -> metrics.Interval:
    """The reported accuracy of a run, with its interval over images or groups."""
    try:
        found = json.loads(run.metrics_json.read_text(encoding="utf-8"))["accuracy"]
    except (OSError, ValueError, KeyError):
        raise RunError(f"{run.path}: has no result; run r2kit evaluate {run.path}") from None
    return metrics.Interval.from_dict(found)


def _over_seeds(values: list[metrics.Interval], bounds: tuple[float, float]) -> metrics.Interval:
    """The interval of one seed, or Student's over several."""
    if len(values) == 1:
        return values[0]
    return seeds_interval(np.array([one.value for one in values]), bounds=bounds)


def plot_study(points: Sequence[Point]) -> Figure:
    """Draw accuracy against parameters and against multiply-adds: one line for each key, all through the base.

    A thin upright line is the 95 % interval of an accuracy.
    """
    base, keys = points[0], list(dict.fromkeys(point.key for point in points[1:]))
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    costs = (("parameters", 1e6, "parameters (millions)"), ("macs", 1e9, "multiply-adds of one image (billions)"))
    for axes, (cost, unit, label) in zip(figure.subplots(1, 2, sharey=True), costs, strict=True):
        for key in keys:
            line = sorted([base, *(p for p in points if p.key == key)], key=lambda point: getattr(point, cost))
            x, y = [getattr(point, cost) / unit for point in line], [100 * point.accuracy.value for point in line]
            (drawn,) = axes.plot(x, y, marker="o", markersize=4, linewidth=1.4, label=key)
            own = [(at, point.accuracy) for at, point in zip(x, line, strict=True) if point is not base]
            low, high = ([100 * getattr(accuracy, end) for _, accuracy in own] for end in ("low", "high"))
            axes.vlines([at for at, _ in own], low, high, colors=drawn.get_color(), linewidth=1, alpha=0.5)
            for point, at, height in zip(line, x, y, strict=True):
                if point is not base:
                    axes.annotate(point.value, (at, height), (3, 4), textcoords="offset points", fontsize=7)
        at = getattr(base, cost) / unit
        axes.plot(at, 100 * base.accuracy.value, marker="s", markersize=8, color="black", label=BASE)
        axes.vlines(at, 100 * base.accuracy.low, 100 * base.accuracy.high, colors="black", linewidth=1, alpha=0.5)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("accuracy on held-out images (%)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def _write(points: list[Point], folder: Path) -> None:
    """Write the table and the picture."""
    rows = []
    for point in points:
        row: dict[str, Any] = {"key": point.key, "value": point.value, "parameters": point.parameters}
        row |= {"macs": point.macs, "train_seconds": round(point.train_seconds, 1)}
        for word, interval in (("accuracy", point.accuracy), ("difference", point.difference)):
            ends = (None,) * 3 if interval is None else (interval.value, interval.low, interval.high)
            row |= dict(zip((word, f"{word}_low", f"{word}_high"), ends, strict=True))
        rows.append(row)
    try:
        write_atomic(folder / "study.csv", pd.DataFrame(rows).to_csv(index=False))
        (folder / "study.png").write_bytes(plots.png(plot_study(points)))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; give another --out") from None


def _print(points: list[Point], seeds: int, console: Console) -> None:
    """Print one row for each network."""

    def words(interval: metrics.Interval | None, sign: str) -> str:
        if interval is None:
            return "-"
        return " ".join(format(100 * v, f"{sign}.1f") for v in (interval.value, interval.low, interval.high))

    rows = [
        [p.name, f"{p.parameters / 1e6:.2f}", f"{p.macs / 1e9:.3f}", words(p.accuracy, ""), words(p.difference, "+")]
        for p in points
    ]
    columns = ["network", "params (M)", "GMACs", "accuracy, % (low, high)", "minus base, points (low, high)"]
    console.print(table(f"one key at a time, {seeds} seed{'' if seeds == 1 else 's'}", columns, rows))
