"""From a recipe to a finished run, and the same without keeping anything."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from r2kit.backbones.warmstart import finalize, set_beta
from r2kit.backbones.weights import save_weights
from r2kit.callbacks import Recorder
from r2kit.checkpoint import read_checkpoint
from r2kit.console import make_console
from r2kit.errors import Interrupted, RunError
from r2kit.evaluate import evaluate
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe
from r2kit.report import write_report
from r2kit.run import Run
from r2kit.train.choices import record
from r2kit.train.claim import changed_versions, check_same_data, claim, keep_as_written, write_beginning
from r2kit.train.fit import OutOfMemoryError, fit, newest_checkpoint
from r2kit.train.lock import hold
from r2kit.train.prepare import Job, prepare
from r2kit.train.ranks import first_process, meet, part, share
from r2kit.train.signals import StopSignals
from r2kit.train.words import print_result, print_start


def finetune(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> Run:
    """Train, evaluate and explain a network as a recipe says.

    Args:
        recipe: A file, the name of a packaged recipe, nested plain values, or a `Recipe`.
        out: The run folder, named exactly; by default ``runs/<name>-<n>``.
        overrides: ``key.path=value`` items.
        overwrite: Replace the run that `out` holds.
        resume: Go on with the run that `out` holds; start it where there is none.
        quiet: Print nothing.

    Returns:
        The finished run.

    Raises:
        RecipeError, DataError, ModelError, RunError: Each with one line that says how to mend it.
    """
    started = time.perf_counter()
    checked = load_recipe(recipe, overrides)
    console = make_console(quiet=quiet or not first_process())
    if resume and out is None:
        raise RunError("--resume auto needs the folder of the run: give --out runs/NAME")
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        stack.callback(part)
        meet()
        if first_process():
            if out is not None and Run(out).exists():
                stack.enter_context(hold(Path(out)))
            unfinished = claim(checked, out, overwrite=overwrite, resume=resume)
            if unfinished is not None and unfinished.info.get("state") == "finished":
                console.print(f"{unfinished.path}: finished already")
                share({"folder": None, "checkpoint": None})
                return unfinished
            run, job, checkpoint = _begin(checked, unfinished, out, overwrite, console, stack)
            if unfinished is None and isinstance(recipe, str | Path):
                keep_as_written(run, recipe, overrides)
            share({"folder": str(run.path.resolve()), "checkpoint": checkpoint and str(checkpoint.resolve())})
        else:
            told = share({})
            if told["folder"] is None:
                return Run(str(out))
            run = Run(told["folder"])
            checkpoint = Path(told["checkpoint"]) if told["checkpoint"] is not None else None
            job = prepare(run.own_recipe, console, run.info.get("decided"))
        job, recorder = _train(job, run, console, signals, checkpoint)
        part()
        if first_process():
            _finish(job, run, console, recorder, started)
        return run


def _begin(
    checked: Recipe,
    unfinished: Run | None,
    out: str | Path | None,
    overwrite: bool,
    console: Console,
    stack: ExitStack,
) -> tuple[Run, Job, Path | None]:
    """Return the run, all that it trains, and the checkpoint to go on with; for the first process."""
    if unfinished is not None:
        # A run that goes on is built from its own copy of the channel table, whatever became of the file.
        job = prepare(unfinished.own_recipe, console, unfinished.info.get("decided"))
        print_start(console, job)
        check_same_data(unfinished, job.data.source.fingerprint)
        for line in changed_versions(unfinished):
            console.print(f"note: {line}: the result may differ from that of the unbroken run")
        write_beginning(job, unfinished)
        return unfinished, job, newest_checkpoint(unfinished, console)
    job = prepare(checked, console)
    print_start(console, job)
    if out is not None and not Run(out).exists():
        stack.enter_context(hold(Path(out)))
    run = Run.create(checked, out, overwrite=overwrite)
    if out is None:
        stack.enter_context(hold(run.path))
    write_beginning(job, run)
    return run, job, None


def _train(job: Job, run: Run, console: Console, signals: StopSignals, checkpoint: Path | None) -> tuple[Job, Recorder]:
    """Train; where memory runs out and the batch is the machine's choice, go on from what was saved with half of it.

    What follows is what a run that was killed there, and goes on with the smaller batch, computes.
    """
    while True:
        try:
            return job, fit(job, run, console, signals, checkpoint=checkpoint)
        except OutOfMemoryError as error:
            half = job.batch.halved()
            if half is None or not error.alone or job.recipe.train.batch_size != "auto":
                raise
            where = error.where
        # The caller still has the job; what trained it must go.
        job.task.trainer = job.data.trainer = None
        job.task.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        job = prepare(job.recipe, console, record(half, job.task.lr))
        batch = job.batch  # smaller still, where a trial step does not fit
        run.write_info(
            decided=record(batch, job.task.lr),
            choices=[asdict(choice) for choice in job.choices],
            backed_off=[*run.info.get("backed_off", []), {"at": where, "batch_size": batch.size}],
        )
        checkpoint = newest_checkpoint(run, console)
        console.print(
            f"{where}: out of memory; going on from {'the last checkpoint' if checkpoint else 'the start'} with "
            f"{batch.passes} x {batch.size} images a step: a step still sees {batch.passes * batch.size} images, "
            f"BatchNorm sees {batch.size}"
        )


def resume(run: str | Path, *, quiet: bool = False) -> Run:
    """Go on with an interrupted run, from the newest checkpoint that is whole, to the result it would have had.

    Args:
        run: The run folder.
        quiet: Print nothing.

    Raises:
        RunError: If there is no such run, or it cannot go on.
    """
    folder = Run(run)
    if not folder.recipe_file.is_file():
        return Run.open(run)  # says what is there instead
    return finetune(folder.recipe, out=folder.path, resume=True, quiet=quiet)


def _finish(job: Job, run: Run, console: Console, recorder: Recorder, started: float) -> None:
    """Store the network of the best epoch, evaluate it, and write the report."""
    recipe = job.recipe
    trained, train_seconds = time.perf_counter(), recorder.seconds
    state = read_checkpoint(run.best_checkpoint)["state_dict"]
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    job.model.load_state_dict(weights)
    if recipe.model.warm_start:
        set_beta(job.model, 1.0)  # as it was when the best epoch was validated
        finalize(job.model)
    save_weights(job.model, run.weights_file, {"name": recipe.model.name, "preprocess": run.preprocess.to_dict()})
    run.write_info(best_epoch=recorder.best_epoch, train_seconds=round(train_seconds, 1))
    run.opened = job.data.source
    metrics = evaluate(run)
    seconds = round(recorder.earlier_seconds + time.perf_counter() - started, 1)
    run.write_info(finished=datetime.now(UTC).isoformat(timespec="seconds"), seconds=seconds)
    write_report(run)
    run.opened = None
    run.write_info(state="finished")
    now = time.perf_counter()
    print_result(console, run, metrics, recorder.best_epoch, (train_seconds, now - trained, now - started))


def dry_run(
    recipe: str | Path | dict[str, Any] | Recipe, *, overrides: Sequence[str] = (), quiet: bool = False
) -> None:
    """Do everything up to the first two steps and one validation batch, and keep nothing.

    Raises:
        RecipeError, DataError, ModelError: Whatever `finetune` would raise before training.
    """
    checked = load_recipe(recipe, overrides)
    console = make_console(quiet=quiet)
    job = prepare(checked, console)
    print_start(console, job)
    with tempfile.TemporaryDirectory(prefix="r2kit-dry-run-") as folder, StopSignals() as signals:
        run = Run.create(checked, Path(folder) / "run")
        try:
            fit(job, run, console, signals, steps=2)
        except Interrupted as error:
            raise Interrupted(error.number, "a dry run keeps nothing") from None
    console.print("dry run: two training steps and one validation batch went through; nothing was kept")
