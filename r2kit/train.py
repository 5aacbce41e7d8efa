"""From a recipe to a run folder: data, network, training, evaluation, report."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import nn

from r2kit import plots
from r2kit.backbones.measure import count_macs, count_parameters
from r2kit.backbones.scalenet import ScaleNet
from r2kit.backbones.scalenet_tables import save_structure
from r2kit.backbones.warmstart import finalize, set_beta
from r2kit.backbones.weights import LoadReport, save_weights
from r2kit.benchmark import measure_throughput
from r2kit.callbacks import AnnealBeta, Ema, Progress, Recorder
from r2kit.console import duration, make_console, quiet_libraries, table
from r2kit.data.datamodule import DataModule
from r2kit.data.loader import Loader
from r2kit.errors import RecipeError, RunError
from r2kit.evaluate import evaluate, summary_lines
from r2kit.models import build_model, fit_preprocess, memory_format
from r2kit.recipe import Recipe
from r2kit.recipe_file import find_recipe, load_recipe
from r2kit.report import write_report
from r2kit.run import Run, installed_versions, write_atomic
from r2kit.tasks import ClassificationTask, Task

_RUN_FOLDER = "R2KIT_RUN_FOLDER"  # tells the processes of the other devices where the first one made the run


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
    unfinished = _claim(checked, out, overwrite=overwrite, resume=resume)
    if unfinished is not None and unfinished.info.get("state") == "finished":
        console.print(f"{unfinished.path}: finished already")
        return unfinished

    # A run that goes on is built from its own copy of the channel table, whatever became of the file.
    begun = unfinished if first_process() else Run(os.environ[_RUN_FOLDER])
    job = _prepare(checked if begun is None else begun.own_recipe, console)
    if not first_process():
        run = Run(os.environ[_RUN_FOLDER])
    elif unfinished is not None:
        run = unfinished
    else:
        run = Run.create(checked, out, overwrite=overwrite)
        if isinstance(recipe, str | Path):
            _keep_as_written(run, recipe, overrides)
    os.environ[_RUN_FOLDER] = str(run.path.resolve())

    if first_process():
        job.data.preprocess.save(run.preprocess_file)
        if isinstance(job.model, ScaleNet) and checked.model.structure is not None:
            save_structure(job.model.structure, run.structure_file)
        job.data.split.save(run.split_file, job.data.source.manifest)
        run.write_info(
            state="training",
            versions=installed_versions(),
            device=job.device_name,
            data={"source": job.data.source.name, "fingerprint": job.data.source.fingerprint},
            split=job.data.split.kind,
            model={"parameters": job.parameters, "macs": job.macs, "train_images_per_second": round(job.speed, 1)},
        )
        plots.save(plots.batch_mosaic(next(iter(job.data.train_dataloader())), job.data, epoch=0), run, "batch")
    try:
        recorder = _fit(job, run, console, resume=unfinished is not None)
    finally:
        os.environ.pop(_RUN_FOLDER, None)
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
    _print_result(console, run, metrics, recorder.best_epoch, (train_seconds, now - trained, now - started))
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
    job = _prepare(checked, console)
    with tempfile.TemporaryDirectory(prefix="r2kit-dry-run-") as folder:
        run = Run.create(checked, Path(folder) / "run")
        _fit(job, run, console, resume=False, steps=2)
    console.print("dry run: two training steps and one validation batch went through; nothing was kept")


@dataclass
class _Job:
    """Everything that training needs, ready."""

    recipe: Recipe
    data: DataModule
    model: nn.Module
    task: Task
    device: torch.device
    device_name: str
    precision: str
    parameters: int
    macs: int
    speed: float
    loaded: list[str]


def first_process() -> bool:
    """Whether this is the process that writes files: the only one, or rank zero."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))
    return rank == "0"


def _claim(recipe: Recipe, out: str | Path | None, *, overwrite: bool, resume: bool) -> Run | None:
    """Return the run to go on with, or None for a new one; refuse a folder in use before any work is done.

    Raises:
        RunError: If the folder holds a run and neither `overwrite` nor `resume` is given, or a run of another recipe.
    """
    if out is None or not Run(out).exists() or not first_process():
        return None
    if not (overwrite or resume):
        raise RunError(f"{out}: holds a run already; give --overwrite, --resume auto, or another --out")
    if not resume:
        return None
    run = Run(out)
    if run.recipe != recipe:
        changed = _differences(run.recipe.model_dump(), recipe.model_dump())
        raise RunError(
            f"{out}: holds a run of another recipe, different in {', '.join(changed[:3])}; "
            f"go on with r2kit finetune {run.recipe_file} --out {out} --resume auto"
        )
    return run


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the key paths in which two recipes differ."""
    found: list[str] = []
    for key, value in new.items():
        if isinstance(value, dict):
            found += _differences(old[key], value, f"{prefix}{key}.")
        elif old[key] != value:
            found.append(f"{prefix}{key}")
    return found


def _keep_as_written(run: Run, recipe: str | Path, overrides: Sequence[str]) -> None:
    """Keep the recipe as its author wrote it beside the resolved one, the overrides below it."""
    text = find_recipe(recipe).read_text(encoding="utf-8")
    if overrides:
        text = text.rstrip("\n") + "\n\n# given on the command line:\n" + "".join(f"#   {item}\n" for item in overrides)
    write_atomic(run.path / "recipe.written.yaml", text)


def _prepare(recipe: Recipe, console: Console) -> _Job:
    """Open the data, build and measure the network, and print what is about to happen."""
    quiet_libraries()
    device, device_name, precision = _choose_device(recipe)
    with console.status("reading the data"):
        data = DataModule(recipe.data, recipe.augment, seed=recipe.seed, batch_size=recipe.train.batch_size)
        data.setup()
    L.seed_everything(recipe.seed, verbose=False)
    bands, classes = len(data.preprocess.bands), len(data.preprocess.classes)

    def images(report: LoadReport) -> Loader:
        data.preprocess, _ = fit_preprocess(data.preprocess, report)
        return data.train_dataloader()

    model = build_model(recipe.model, num_classes=classes, bands=data.preprocess.bands, images=images)
    report: LoadReport | None = model.load_report  # type: ignore[assignment]
    data.preprocess, normalisation = fit_preprocess(data.preprocess, report)
    model = model.to(memory_format=memory_format(recipe.train.channels_last))
    task = ClassificationTask(recipe, model, classes)
    size = recipe.data.size
    with console.status("measuring the network"):
        speed = measure_throughput(
            model,
            (bands, *size),
            recipe.train.batch_size,
            training=True,
            device=device,
            channels_last=recipe.train.channels_last,
        )
    job = _Job(
        recipe,
        data,
        model,
        task,
        device,
        device_name,
        precision,
        count_parameters(model),
        count_macs(model, (bands, *size)),
        speed,
        [*(report.lines() if report is not None else []), *([normalisation] if normalisation else [])],
    )
    _print_start(console, job)
    return job


def _choose_device(recipe: Recipe) -> tuple[torch.device, str, str]:
    """Return the device, its name, and Lightning's word for the precision.

    Raises:
        RecipeError: If the recipe asks for what the machine does not have.
    """
    spec = recipe.train
    if torch.cuda.is_available():
        device, name = torch.device("cuda", 0), torch.cuda.get_device_name(0)
        if isinstance(spec.devices, int) and spec.devices > torch.cuda.device_count():
            raise RecipeError(
                f"train.devices: {spec.devices} asked for, this machine has {torch.cuda.device_count()} GPU"
            )
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    else:
        device, name, best = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads", "fp32"
    precision = best if spec.precision == "auto" else spec.precision
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("train.precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
    return device, name, {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[precision]


def _fit(job: _Job, run: Run, console: Console, *, resume: bool, steps: int | None = None) -> Recorder:
    """Train; on return the run folder holds the best and the last checkpoint."""
    spec = job.recipe.train
    recorder = Recorder(run, console)
    callbacks: list[Callback] = [recorder, Progress(console)]
    if spec.ema:
        callbacks.append(Ema(spec.ema_decay))
    if job.recipe.model.warm_start:
        callbacks.append(AnnealBeta(job.recipe.model.warm_start_until))
    on_gpu = job.device.type == "cuda"
    devices = spec.devices if spec.devices != "auto" else (-1 if on_gpu else 1)
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=devices,
        strategy="ddp" if spec.strategy == "ddp" else "auto",
        precision=job.precision,
        max_epochs=spec.epochs if steps is None else 1,
        limit_train_batches=steps,
        limit_val_batches=None if steps is None else 1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=spec.gradient_clip,
        # Some CUDA kernels have no deterministic form; there Lightning warns and goes on.
        deterministic="warn" if on_gpu else True,
        use_distributed_sampler=False,  # the samplers of the DataModule shard themselves
    )
    checkpoint = run.last_checkpoint if resume and run.last_checkpoint.is_file() else None
    trainer.fit(job.task, datamodule=job.data, ckpt_path=checkpoint, weights_only=True)
    return recorder


# ------------------------------------------------------------------------------------------------- what is printed


def _print_start(console: Console, job: _Job) -> None:
    """Print versions, device, data, network and the estimated time."""
    recipe, data = job.recipe, job.data
    versions = installed_versions()
    console.print("  ".join(f"{name} {versions[name]}" for name in ("r2kit", "torch", "lightning", "timm")))
    console.print(f"device: {job.device_name}, precision {job.precision}, seed {recipe.seed}")
    console.print(f"data: {data.source.name}, split: {data.split.described}")
    for warning in data.split.warnings:
        console.print(f"  note: {warning}")
    for path, reason in data.skipped[:5]:
        console.print(f"  left out: {path}: {reason}")
    if len(data.skipped) > 5:
        console.print(f"  and {len(data.skipped) - 5} more left out")
    counts = data.counts()
    rows = [[name, *row] for name, row in zip(counts.index, counts.to_numpy().tolist(), strict=True)]
    rows.append(["all", *counts.sum().tolist()])
    console.print(table("images", ["class", *counts.columns], rows))
    prep = data.preprocess
    bands = [[band, f"{m:.4g}", f"{s:.4g}"] for band, m, s in zip(prep.bands, prep.mean, prep.std, strict=True)]
    console.print(table(f"normalisation (of pixel values divided by {prep.scale:g})", ["band", "mean", "std"], bands))
    frozen = "nothing is frozen" if job.task.frozen is None else f"{job.task.frozen.parameters:,} parameters are frozen"
    pretrained = recipe.model.pretrained
    if isinstance(pretrained, bool):
        start = "published ImageNet weights" if pretrained else "random weights"
    else:
        start = f"weights of {pretrained}"
    height, width = recipe.data.size
    console.print(
        f"model: {recipe.model.name}, {start}, {job.parameters:,} parameters, {job.macs / 1e9:.3g} GMACs at "
        f"{height}x{width}, {job.speed:.1f} training images/s measured here; {frozen}"
    )
    for line in job.loaded:
        console.print(f"  {line}")
    passes = int(counts["train"].sum()) * recipe.train.epochs + int(counts["val"].sum()) * recipe.train.epochs / 3
    console.print(f"estimated training time: {duration(passes / job.speed)}")


def _print_result(
    console: Console, run: Run, metrics: dict[str, Any], best_epoch: int, seconds: tuple[float, float, float]
) -> None:
    """Print the result, what it stands beside, the seconds (training, evaluation, all), and what to do next."""
    training, evaluation, total = (duration(value) for value in seconds)
    console.print()
    console.print(f"best epoch: {best_epoch + 1} of {run.recipe.train.epochs}")
    for line in summary_lines(metrics):
        console.print(line)
    console.print(f"time: {total}, of which {training} training and {evaluation} evaluation and report")
    console.print(f"run folder: {run.path}  (start with {run.report})")
    console.print("next:")
    console.print(f"  r2kit evaluate {run.path}")
    console.print(f"  r2kit predict {run.path} path/to/images")
    console.print(f"  r2kit report {run.path}")
