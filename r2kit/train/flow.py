"""From a recipe to a finished run, and the same without keeping anything."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from r2kit import plots
from r2kit.backbones.scalenet import ScaleNet
from r2kit.backbones.scalenet_tables import save_structure
from r2kit.backbones.warmstart import finalize, set_beta
from r2kit.backbones.weights import save_weights
from r2kit.console import make_console
from r2kit.errors import RunError
from r2kit.evaluate import evaluate
from r2kit.lr_finder import plot_lr
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe
from r2kit.report import write_report
from r2kit.run import Run, installed_versions
from r2kit.train.choices import record
from r2kit.train.claim import RUN_FOLDER, claim, first_process, keep_as_written
from r2kit.train.fit import fit
from r2kit.train.prepare import prepare
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
    unfinished = claim(checked, out, overwrite=overwrite, resume=resume)
    if unfinished is not None and unfinished.info.get("state") == "finished":
        console.print(f"{unfinished.path}: finished already")
        return unfinished

    # A run that goes on is built from its own copy of the channel table, whatever became of the file.
    begun = unfinished if first_process() else Run(os.environ[RUN_FOLDER])
    job = prepare(
        checked if begun is None else begun.own_recipe, console, None if begun is None else begun.info.get("decided")
    )
    print_start(console, job)
    if not first_process():
        run = Run(os.environ[RUN_FOLDER])
    elif unfinished is not None:
        run = unfinished
    else:
        run = Run.create(checked, out, overwrite=overwrite)
        if isinstance(recipe, str | Path):
            keep_as_written(run, recipe, overrides)
    os.environ[RUN_FOLDER] = str(run.path.resolve())

    if first_process():
        job.data.preprocess.save(run.preprocess_file)
        if isinstance(job.model, ScaleNet) and checked.model.structure is not None:
            save_structure(job.model.structure, run.structure_file)
        job.data.split.save(run.split_file, job.data.source.manifest)
        run.write_info(
            state="training",
            versions=installed_versions(),
            device=job.device_name,
            data={
                "source": job.data.source.name,
                "fingerprint": job.data.source.fingerprint,
                "image_size": job.data.original_size,
            },
            split=job.data.split.kind,
            decided=record(job.batch, job.task.lr),
            choices=[asdict(choice) for choice in job.choices],
            model={"parameters": job.parameters, "macs": job.macs, "train_images_per_second": round(job.speed, 1)},
        )
        plots.save(plots.batch_mosaic(next(iter(job.data.train_dataloader())), job.data, epoch=0), run, "batch")
    if job.lr_trial is not None and first_process():
        plots.save(plot_lr(job.lr_trial), run, "lr_finder")
    try:
        recorder = fit(job, run, console, resume=unfinished is not None)
    finally:
        os.environ.pop(RUN_FOLDER, None)
    if not first_process():
        return run

    trained, train_seconds = time.perf_counter(), recorder.seconds
    state = torch.load(run.best_checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    job.model.load_state_dict(weights)
    if checked.model.warm_start:
        set_beta(job.model, 1.0)  # as it was when the best epoch was validated
        finalize(job.model)
    save_weights(job.model, run.weights_file, {"name": checked.model.name, "preprocess": run.preprocess.to_dict()})
    run.write_info(best_epoch=recorder.best_epoch, train_seconds=round(train_seconds, 1))
    metrics = evaluate(run)
    run.write_info(
        state="finished",
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(recorder.earlier_seconds + time.perf_counter() - started, 1),
    )
    write_report(run)
    now = time.perf_counter()
    print_result(console, run, metrics, recorder.best_epoch, (train_seconds, now - trained, now - started))
    return run


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
    with tempfile.TemporaryDirectory(prefix="r2kit-dry-run-") as folder:
        run = Run.create(checked, Path(folder) / "run")
        fit(job, run, console, resume=False, steps=2)
    console.print("dry run: two training steps and one validation batch went through; nothing was kept")
