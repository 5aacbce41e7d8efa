"""Runs side by side: paired differences on the same images, with their intervals and their cost, in plain sentences.

Every figure is the headline figure of the runs' task (`result.paired.FIGURES`), from their stored predictions. The
difference of two runs is taken on images drawn for both, so that images that are hard for both do not blur it; where a
model was trained with several seeds, what is averaged is the difference of each seed, and the interval is over them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from rich.console import Console

from r2kit import metrics, result
from r2kit.backbones import create_model
from r2kit.benchmark import measure_throughput
from r2kit.console import duration, make_console, quiet_libraries, table
from r2kit.errors import RunError
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe
from r2kit.result import paired
from r2kit.result.paired import FIGURES, Judged
from r2kit.run import Run, unknown_kind, write_atomic
from r2kit.tasks import TASKS
from r2kit.train import finetune

_ROUNDS = 5  # batches that each network's speed is the median of


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Their number.
        macs: Multiply-adds of one image of the recipe's size.
        images_per_second: Inference here and now, all networks in turn; None where it was not measured.
        epochs: Trained, the mean over the runs.
        train_seconds: Seconds of training, on the device of the run; the mean over the seeds.
        device: Where it was trained.
        swing: Mean change of the validation figure that chose the best epoch, from one epoch to the next, up or down:
            how unsteady the training was; the mean over the seeds. None with a single epoch.
    """

    parameters: int
    macs: int
    images_per_second: float | None
    epochs: int
    train_seconds: float
    device: str
    swing: float | None


@dataclass(frozen=True)
class Entry:
    """One side of a comparison: the runs of one name, one for each seed, with their figure and their cost."""

    name: str
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    interval: metrics.Interval
    """Of the figure: over images or groups for one seed, over the seeds for several."""
    cost: Cost


@dataclass(frozen=True)
class Difference:
    """The figure of an entry minus that of the first one, on the same images."""

    name: str
    by_seed: tuple[float, ...]
    interval: metrics.Interval


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        figure: What is compared, in words.
        images: Images that every run of a seed answered, by seed.
        entries: In the order given; the first is what the others are compared with.
        differences: One for each entry but the first.
        sentences: The same in words.
    """

    figure: str
    images: dict[int, int]
    entries: tuple[Entry, ...]
    differences: tuple[Difference, ...]
    sentences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON primitives; NaN becomes None."""
        found = asdict(self)
        for row, entry in zip(found["entries"], self.entries, strict=True):
            row["interval"] = entry.interval.to_dict()
        for row, difference in zip(found["differences"], self.differences, strict=True):
            row["interval"] = difference.interval.to_dict()
        return found


def compare_runs(
    runs: Sequence[Run], *, out: str | Path | None = None, speed: bool = True, seed: int = 0
) -> Comparison:
    """Compare finished runs on the images that they all held out; runs of one network and recipe are its seeds.

    Args:
        runs: Two or more; the first one's network is what the others are compared with.
        out: Folder for compare.html and compare.json; None writes nothing.
        speed: Measure the inference speed of each network here, in turn.
        seed: Of the bootstrap.

    Raises:
        RunError: If there are fewer than two runs, one is not evaluated, or they do not answer the same images.
    """
    if len(runs) < 2:
        raise RunError("compare: needs two runs at least")
    grouped = _group(runs)
    answers = {name: {run.recipe.seed: paired.judge_run(run) for run in mine} for name, mine in grouped.items()}
    seeds = _common_seeds(grouped)
    pairs = {number: _paired({name: found[number] for name, found in answers.items()}) for number in seeds}
    rates = _speed({name: mine[0] for name, mine in grouped.items()}) if speed else {}
    entries = tuple(
        _entry(name, [run for run in mine if run.recipe.seed in seeds], pairs, rates.get(name), seed)
        for name, mine in grouped.items()
    )
    differences = tuple(_difference(entry.name, entries[0].name, pairs, seed) for entry in entries[1:])
    sentences = tuple(_sentence(entries[0].name, difference) for difference in differences)
    images = {number: len(next(iter(pair.values())).ids) for number, pair in pairs.items()}
    found = Comparison(FIGURES[runs[0].recipe.task.kind], images, entries, differences, sentences)
    if out is not None:
        _write(found, Path(out))
    return found


def compare_models(
    recipe: str | Path | dict[str, Any] | Recipe,
    models: Sequence[str],
    *,
    seeds: int,
    out: str | Path,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Comparison:
    """Train every network with every seed by one recipe, and compare them; what is finished already is kept.

    Args:
        recipe: As `r2kit.finetune` takes it.
        models: Names of networks; the first one is what the others are compared with.
        seeds: Number of seeds, counted up from the recipe's. A seed also draws the split, the same for all networks.
        out: Folder for the runs, compare.html and compare.json.
        overrides: ``key.path=value`` items for all of them.
        quiet: Print nothing.

    Raises:
        RecipeError, DataError, ModelError, RunError: As `r2kit.finetune`, or if a name comes twice.
    """
    if len(set(models)) != len(models) or len(models) < 2:
        raise RunError(f"--models: got {', '.join(models) or 'none'}; give two different names at least")
    first = load_recipe(recipe, overrides)
    # All recipes are checked before the first hour of training.
    recipes = {
        (name, first.seed + n): load_recipe(recipe, [*overrides, f"model.name={name}", f"seed={first.seed + n}"])
        for n in range(seeds)
        for name in models
    }
    with torch.device("meta"):  # nor is it spent before every network is known to exist
        for name in models:
            create_model(name, **recipes[name, first.seed].model.options)
    console, runs = make_console(quiet=quiet), []
    for number, ((name, seed), checked) in enumerate(recipes.items(), 1):
        console.print(f"run {number} of {len(recipes)}: {name}, seed {seed}")
        runs.append(finetune(checked, out=Path(out) / f"{name}-seed-{seed}", resume=True, quiet=quiet))
    # By network, so that the first name is the first entry.
    return compare_runs(sorted(runs, key=lambda run: models.index(run.recipe.model.name)), out=out)


def print_comparison(found: Comparison, console: Console) -> None:
    """Print the table and the sentences."""
    rows = [
        [
            entry.name,
            result.with_interval(entry.interval.to_dict()),
            f"{entry.cost.parameters / 1e6:.1f}",
            f"{entry.cost.macs / 1e9:.2f}",
            "-" if entry.cost.images_per_second is None else f"{entry.cost.images_per_second:.1f}",
            entry.cost.epochs,
            duration(entry.cost.train_seconds),
            "-" if entry.cost.swing is None else f"{100 * entry.cost.swing:.1f}",
        ]
        for entry in found.entries
    ]
    columns = ["network", found.figure, "params (M)", "GMACs", "images/s", "epochs", "training", "swing (points)"]
    console.print(table(_what(found), columns, rows))
    for sentence in found.sentences:
        console.print(sentence)


# ---------------------------------------------------------------------------------------------------- what is paired


def _group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by network; those of one network must differ in the seed alone, else each is named after its folder."""
    by_model: dict[str, list[Run]] = {}
    for run in runs:
        kind, first = run.recipe.task.kind, runs[0].recipe.task.kind
        if kind not in FIGURES:
            raise unknown_kind(run, "compare")
        if kind != first:
            raise RunError(f"compare: {run.path} is of {kind}, and {runs[0].path} of {first}; compare runs of one task")
        by_model.setdefault(run.recipe.model.name, []).append(run)
    plain = all(
        len({run.recipe.seed for run in mine}) == len(mine)
        and len({run.recipe.model_copy(update={"seed": 0, "name": "x"}).model_dump_json() for run in mine}) == 1
        for mine in by_model.values()
    )
    if plain and len(by_model) > 1:
        return by_model
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) != len(names):
        names = [str(run.path) for run in runs]
    if len(set(names)) != len(names):
        raise RunError(f"{names[0]}: given twice; compare different runs")
    return {name: [run] for name, run in zip(names, runs, strict=True)}


def _common_seeds(grouped: dict[str, list[Run]]) -> list[int]:
    """Seeds that every network was trained with; single runs are compared whatever their seeds."""
    if all(len(mine) == 1 for mine in grouped.values()):
        numbers = {mine[0].recipe.seed for mine in grouped.values()}
        if len(numbers) > 1:
            raise RunError(
                "compare: the runs have different seeds, and with them different splits and luck; give each network "
                "the same seeds, e.g. r2kit compare --recipe RECIPE --models A,B --seeds 3"
            )
    common = set.intersection(*({run.recipe.seed for run in mine} for mine in grouped.values()))
    if not common:
        raise RunError("compare: the networks have no seed in common; nothing is paired")
    return sorted(common)


Pair = dict[str, Judged]
"""What each network said of the same images, in the same order."""


def _paired(answers: Pair) -> Pair:
    """Bring all networks to the order of the first one's images.

    Raises:
        RunError: If the networks did not answer the same images, or their labels differ.
    """
    names = list(answers)
    first = answers[names[0]]
    same: Pair = {}
    for name, found in answers.items():
        if set(found.ids) != set(first.ids):
            raise RunError(
                f"compare: {name} and {names[0]} held out different images "
                f"({len(set(found.ids) ^ set(first.ids))} are not in both); train them with one recipe and seed, or "
                "with one data.split_file"
            )
        place = {identity: row for row, identity in enumerate(found.ids)}
        mine = found.at(np.array([place[identity] for identity in first.ids], dtype=np.int64))
        if (mine.truth != first.truth).any():
            raise RunError(f"compare: {name} and {names[0]} were given different labels for the same images")
        same[name] = mine
    return same


def _entry(name: str, runs: list[Run], pairs: dict[int, Pair], rate: float | None, seed: int) -> Entry:
    """Figure and cost of one network."""
    runs = sorted(runs, key=lambda run: run.recipe.seed)
    by_seed = tuple(pair[name].value for pair in pairs.values())
    if len(pairs) == 1:
        found = paired.interval(next(iter(pairs.values()))[name], seed=seed)
    else:
        found = seeds_interval(np.array(by_seed), bounds=(0.0, 1.0))
    return Entry(name, tuple(pairs), by_seed, found, _cost(runs, rate))


def _difference(name: str, base: str, pairs: dict[int, Pair], seed: int) -> Difference:
    """Figure of one network minus that of another: over images for one seed, Student's t over several."""
    by_seed = tuple(pair[name].value - pair[base].value for pair in pairs.values())
    if len(pairs) == 1:
        pair = next(iter(pairs.values()))
        return Difference(name, by_seed, paired.difference(pair[base], pair[name], seed=seed))
    return Difference(name, by_seed, seeds_interval(np.array(by_seed), bounds=(-1.0, 1.0)))


def seeds_interval(
    values: NDArray[np.float64], *, bounds: tuple[float, float], level: float = 0.95
) -> metrics.Interval:
    """Return Student's t interval of a mean over seeds: it holds what the images and what the training's luck vary.

    Args:
        values: (S,) one number a seed, S at least 2.
        bounds: Smallest and largest possible value, to clip.
        level: Coverage.
    """
    mean, count = float(values.mean()), len(values)
    half = float(scipy.stats.t.ppf(0.5 + level / 2, count - 1)) * float(values.std(ddof=1)) / math.sqrt(count)
    reason = None if half > 0 else f"all {count} seeds give the same value, so nothing can be said about their spread"
    return metrics.Interval(
        mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), level, "seeds", count, reason
    )


# ------------------------------------------------------------------------------------------------------------- cost


def _cost(runs: list[Run], rate: float | None) -> Cost:
    """What the runs of one network took."""
    info = runs[0].info
    swings = [value for value in (_swing(run) for run in runs) if value is not None]
    return Cost(
        parameters=int(info["model"]["parameters"]),
        macs=int(info["model"]["macs"]),
        images_per_second=rate,
        epochs=round(statistics.mean(run.epochs_trained for run in runs)),
        train_seconds=statistics.mean(float(run.info["train_seconds"]) for run in runs),
        device=str(info["device"]),
        swing=statistics.mean(swings) if swings else None,
    )


def _swing(run: Run) -> float | None:
    """Mean absolute change between epochs of what the validation judges by."""
    monitor = TASKS[run.recipe.task.kind].monitor
    history = run.read_table(run.metrics_csv, [monitor])[monitor]
    return float(history.diff().abs().mean()) if len(history) > 1 else None


def _speed(runs: dict[str, Run]) -> dict[str, float]:
    """Images per second in inference, all networks in turn, so that a machine whose speed drifts slows them alike."""
    nets = {name: (run.model(), run) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(_ROUNDS):
        for name, (net, run) in nets.items():
            shape = (len(run.preprocess.bands), *run.preprocess.size)
            batch = run.recipe.train.pass_size
            layout = run.recipe.train.channels_last
            found[name].append(measure_throughput(net, shape, batch, training=False, channels_last=layout, rounds=1))
    return {name: statistics.median(rates) for name, rates in found.items()}


# ------------------------------------------------------------------------------------------------------------ words


def _sentence(base: str, difference: Difference) -> str:
    """Whether one network is better than another, as a plain sentence."""
    found = difference.interval
    points, low, high = 100 * found.value, 100 * found.low, 100 * found.high
    who = f"{difference.name} is {'better' if points >= 0 else 'worse'} than {base} by {abs(points):.1f} points"
    span = (
        f"{100 * found.level:.0f} % interval of the difference {low:+.1f} to {high:+.1f}, over {found.n} {found.units}"
    )
    shown = "" if low > 0 or high < 0 else ": not shown"
    if found.reason is not None and found.units == "seeds":
        shown = f": not shown ({found.reason})"
    return f"{who} ({span}){shown}."


def _what(found: Comparison) -> str:
    """The caption of the table."""
    seeds = found.entries[0].seeds
    images = sorted(set(found.images.values()))
    held = f"{images[0]}" if len(images) == 1 else f"{images[0]} to {images[-1]}"
    return f"{held} held-out images, {len(seeds)} seed{'' if len(seeds) == 1 else 's'} ({', '.join(map(str, seeds))})"


def _write(found: Comparison, folder: Path) -> None:
    """Write the page and the figures."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r2kit", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    page = environment.get_template("compare.html.j2").render(found=found, what=_what(found), sentences=result)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "compare.json", json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n")
        write_atomic(folder / "compare.html", page)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; give another --out") from None


def compare_command(given: Sequence[str], *, recipe: str | None, models: str | None, seeds: int, out: Path) -> None:
    """Do what ``r2kit compare`` was asked for and print it.

    Args:
        given: Run folders; with a recipe, ``key.path=value`` items.
        recipe: The recipe to train the networks by; None compares the runs.
        models: Names of networks, separated by commas; only with a recipe.
        seeds: Number of seeds; only with a recipe.
        out: Folder to write into.

    Raises:
        RunError: If runs and a recipe are both given, or neither.
    """
    quiet_libraries()
    if recipe is None:
        if models is not None or seeds != 1:
            raise RunError("compare: --models and --seeds need --recipe, which trains the networks")
        found = compare_runs([Run.open(path) for path in given], out=out)
    else:
        if any("=" not in item for item in given):
            raise RunError("compare: give runs, or --recipe and --models, not both")
        names = [name.strip() for name in (models or "").split(",") if name.strip()]
        found = compare_models(recipe, names, seeds=seeds, out=out, overrides=given)
    console = make_console()
    print_comparison(found, console)
    console.print(f"written: {out / 'compare.html'}, {out / 'compare.json'}")
