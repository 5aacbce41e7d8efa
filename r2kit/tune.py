"""From a recipe and a few ranges to a better recipe: a search with Optuna that several processes can share.

A trial trains as `finetune` does and is judged on the validation images alone; the test images are never looked at.
"""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from r2kit.console import make_console, quiet_libraries
from r2kit.errors import R2kitError, RecipeError, RunError, require
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe, to_yaml
from r2kit.run import Run, next_free, write_atomic
from r2kit.seeding import derive_seed
from r2kit.tasks import Task
from r2kit.train.fit import fit
from r2kit.train.guard import Guard
from r2kit.train.prepare import prepare
from r2kit.train.signals import StopSignals

if TYPE_CHECKING:
    import optuna

_FORM = "key=low..high, key=low..high:log, or key=a,b,c"
_RANGE = re.compile(r"([^.,:]+(?:\.[^.,:]+)?)\.\.([^,:]+?)(:log)?")


@dataclass(frozen=True)
class Axis:
    """One key of the search.

    Attributes:
        key: Its path in the recipe.
        low: Lower end of a range.
        high: Upper end of a range.
        log: Whether the range is searched by ratios.
        whole: Whether the range holds whole numbers.
        choices: The values instead of a range, as YAML.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read ``train.lr=1e-4..1e-2:log``, ``model.drop_path_rate=0..0.3`` or ``train.optimizer=adamw,sgd``.

        Raises:
            RecipeError: If it is none of these.
        """
        key, separator, values = (part.strip() for part in text.partition("="))
        if not separator or not key or not values:
            raise RecipeError(f"--space: got '{text}', allowed is {_FORM}")
        match = _RANGE.fullmatch(values)
        if match is None:
            choices = tuple(choice.strip() for choice in values.split(","))
            if len(choices) < 2 or len(set(choices)) < len(choices) or "" in choices:
                raise RecipeError(f"--space: got '{text}', allowed is {_FORM}; a list has two or more different values")
            return cls(key, choices=choices)
        try:
            low, high = float(match.group(1)), float(match.group(2))
        except ValueError:
            raise RecipeError(f"--space: got '{text}': the ends of a range are numbers") from None
        log = match.group(3) is not None
        if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)):
            raise RecipeError(f"--space: got '{text}': low must be below high, and above 0 with :log")
        whole = all(re.fullmatch(r"-?\d+", match.group(index).strip()) for index in (1, 2))
        return cls(key, low, high, log, whole)

    def ends(self) -> list[str]:
        """Return overrides that name the ends of the axis, to be checked before the search."""
        return [f"{self.key}={value}" for value in self.choices or (self._show(self.low), self._show(self.high))]

    def suggest(self, trial: optuna.Trial, *, whole: bool) -> str:
        """Return the override that a trial tries."""
        if self.choices:
            return f"{self.key}={trial.suggest_categorical(self.key, self.choices)}"
        if whole:
            return f"{self.key}={trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)}"
        return f"{self.key}={trial.suggest_float(self.key, self.low, self.high, log=self.log)!r}"

    def _show(self, value: float) -> str:
        return str(int(value)) if self.whole else repr(value)


@dataclass(frozen=True)
class TuneResult:
    """What a search leaves behind.

    Attributes:
        path: The folder.
        recipe_file: The best recipe, as `finetune` takes it.
        best: The overrides of the best trial.
        score: What its best epoch reached on the validation images.
    """

    path: Path
    recipe_file: Path
    best: list[str]
    score: float


def tune(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    space: Sequence[str],
    trials: int = 20,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> TuneResult:
    """Search a few keys of a recipe for what is best on the validation images.

    Called again with the same folder it goes on; called at once from several processes they share the trials. A trial
    that is worse than the median of the others at the same epoch is ended.

    Args:
        recipe: As for `finetune`.
        space: What to search, e.g. ``train.lr=1e-4..1e-2:log``.
        trials: Trials in the end, those of earlier calls and of other processes included.
        out: The folder, named exactly; by default ``runs/<name>-tune-<n>``.
        overrides: ``key.path=value`` items.
        quiet: Print nothing.

    Raises:
        MissingExtraError: If Optuna is not installed.
        RecipeError, DataError, ModelError, RunError: Each with one line that says how to mend it.
    """
    require("optuna", "optuna", "tune", "r2kit tune")
    import optuna

    axes = [Axis.parse(item) for item in space]
    base = load_recipe(recipe, overrides)
    whole = _check(base, axes)
    quiet_libraries()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = make_console(quiet=quiet)
    path = next_free(Path("runs"), f"{base.name}-tune") if out is None else Path(out)
    path.mkdir(parents=True, exist_ok=True)
    study = _open(path, base, space)
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    while len(study.get_trials(deepcopy=False, states=done)) < trials:
        trial = study.ask()
        # What a trial tries depends on its number and on the trials before it, not on the process.
        study.sampler = optuna.samplers.TPESampler(seed=derive_seed(base.seed, trial.number) % 2**32)
        tried = [axis.suggest(trial, whole=axis.key in whole) for axis in axes]
        try:
            score = _train(load_recipe(base, tried), path / "trials" / str(trial.number), trial)
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            console.print(f"trial {trial.number}: {' '.join(tried)}: ended early")
        except _ExplodedError as error:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            console.print(f"trial {trial.number}: {' '.join(tried)}: {error}")
        except R2kitError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        else:
            study.tell(trial, score)
            console.print(f"trial {trial.number}: {' '.join(tried)}: {score:.4f}")
    result = _write(study, path, base, axes)
    console.print(f"best: {' '.join(result.best)}: {result.score:.4f} on the validation images")
    console.print(f"next: r2kit finetune {result.recipe_file}")
    return result


def _check(base: Recipe, axes: Sequence[Axis]) -> set[str]:
    """Refuse axes that the recipe cannot have; return the keys that hold whole numbers only."""
    if not axes:
        raise RecipeError(f"--space: name at least one key to search: {_FORM}")
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise RecipeError(f"--space: a key is named twice: {', '.join(sorted(k for k in keys if keys.count(k) > 1))}")
    whole: set[str] = set()
    for axis in axes:
        for end in axis.ends():
            load_recipe(base, [end])
        if axis.whole:
            try:
                load_recipe(base, [f"{axis.key}={axis.low + 0.5}"])
            except RecipeError:
                whole.add(axis.key)
    return whole


def _open(path: Path, base: Recipe, space: Sequence[str]) -> optuna.Study:
    """Return the folder's study, made if there is none; refuse that of another search."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    file = str(path / "study.journal")
    # A lock by an exclusively opened file works on every platform; Optuna's own default is a symbolic link.
    storage = JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    study = optuna.create_study(
        storage=storage, study_name="r2kit", direction="maximize", load_if_exists=True, pruner=pruner
    )
    asked = {"recipe": to_yaml(base), "space": sorted(space)}
    known = study.user_attrs.get("asked")
    if known is None:
        study.set_user_attr("asked", asked)
    elif known != asked:
        what = "space" if known["recipe"] == asked["recipe"] else "recipe"
        raise RunError(f"{path}: holds a search with another {what}; give another --out")
    return study


def _train(recipe: Recipe, path: Path, trial: optuna.Trial) -> float:
    """Train one trial; return what its best epoch reached on the validation images."""
    console = make_console(quiet=True)
    job = prepare(recipe, console)
    run = Run.create(recipe, path, overwrite=True)
    watch = _Judge(trial)
    try:
        with StopSignals() as signals:
            fit(job, run, console, signals, extra=[watch])
    except RunError as error:
        if watch.guard_problem() is None:
            raise
        raise _ExplodedError(str(error)) from None
    finally:
        shutil.rmtree(run.best_checkpoint.parent, ignore_errors=True)  # gigabytes that nobody asks for
    return watch.best


class _ExplodedError(R2kitError):
    """The loss of a trial was no number any more: a bad trial, and not the end of the search."""


class _Judge(Checkpoint):
    """Tells Optuna what each epoch reached, and ends the trial where it is hopeless; after the epoch is complete."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial
        self.best = -math.inf
        self.trainer: L.Trainer | None = None

    def guard_problem(self) -> str | None:
        """Return why the guard of the loss ended the trial; None if it did not."""
        guards = [] if self.trainer is None else [c for c in self.trainer.callbacks if isinstance(c, Guard)]
        return guards[0].problem if guards else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer = trainer

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        import optuna

        assert isinstance(pl_module, Task)
        if not pl_module.final_form:
            return
        self.best = max(self.best, float(pl_module.epoch_metrics[pl_module.monitor]))
        self.trial.report(self.best, trainer.current_epoch)
        if self.trial.should_prune() and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise optuna.TrialPruned


def _write(study: optuna.Study, path: Path, base: Recipe, axes: Sequence[Axis]) -> TuneResult:
    """Write the table of the trials and the best recipe."""
    try:
        best = study.best_trial
    except ValueError:
        raise RunError(f"{path}: no trial came to its end; give more --trials") from None
    found = [f"{axis.key}={best.params[axis.key]}" for axis in axes]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", "score", *(axis.key for axis in axes)])
    for trial in study.get_trials(deepcopy=False):
        values = [trial.params.get(axis.key, "") for axis in axes]
        writer.writerow([trial.number, trial.state.name.lower(), trial.value, *values])
    write_atomic(path / "trials.csv", out.getvalue())
    score = float(best.value or 0.0)
    head = f"# Found by r2kit tune: trial {best.number}, {score:.4f} on the validation images.\n#   {' '.join(found)}\n"
    file = path / "best.yaml"
    write_atomic(file, head + to_yaml(load_recipe(base, found)))
    return TuneResult(path, file, found, score)
