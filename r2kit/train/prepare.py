"""Everything that training needs, made ready: the data, the network, the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import nn

from r2kit.backbones.fast import optimize_with_reason
from r2kit.backbones.measure import count_macs, count_parameters
from r2kit.backbones.weights import LoadReport
from r2kit.benchmark import measure_throughput
from r2kit.console import counted, quiet_libraries
from r2kit.data.datamodule import DataModule
from r2kit.data.loader import Loader
from r2kit.errors import ModelError, RecipeError
from r2kit.loggers import check_loggers
from r2kit.lr_finder import LrTrial, find_lr
from r2kit.models import build_network, fit_preprocess, memory_format
from r2kit.recipe import Recipe, TrainSpec
from r2kit.tasks import TASKS, Task
from r2kit.train.choices import (
    Batch,
    Choice,
    choose_compile,
    choose_sync_batchnorm,
    choose_tf32,
    describe,
    fitting_batch,
    is_out_of_memory,
)
from r2kit.train.ranks import layout

_MEASURED = 1.0
"""Seconds after which one timed step says enough about the speed of a training."""


@dataclass
class Job:
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
    optimized: str
    batch: Batch
    choices: list[Choice]
    lr_trial: LrTrial | None
    compiled: bool


def prepare(recipe: Recipe, console: Console, decided: dict[str, Any] | None = None) -> Job:
    """Open the data, build and measure the network, and decide what the recipe leaves to the machine.

    Args:
        recipe: The checked recipe.
        console: Where to say what takes a while.
        decided: What `record` of an interrupted run's choices gave; they stay.
    """
    quiet_libraries()
    check_loggers(recipe.train.loggers)
    device, device_name, precision = choose_device(recipe)
    tf32, _ = choose_tf32(recipe.train, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    with console.status("reading the data"):
        data = open_data(recipe)
    model, loaded = start_network(recipe, data)
    optimized = speed_up(model, recipe.train, device, precision)
    bands = len(data.preprocess.bands)
    task = TASKS[recipe.task.kind].from_data(recipe, model, data)
    size = recipe.data.size
    with console.status("measuring the network"):

        def attempt(images: int) -> float:
            return measure_throughput(
                model,
                (bands, *size),
                images,
                training=True,
                device=device,
                channels_last=recipe.train.channels_last,
                loss=task.example_loss(),
                budget=_MEASURED,
            )

        kept = None if decided is None else Batch(decided["batch_size"], decided["accumulate"])
        batch, speed = fitting_batch(recipe.train, attempt, kept)
    data.batch_size = batch.size
    trial: LrTrial | None = None
    if decided is not None:
        task.lr = decided["lr"]
    elif recipe.train.lr == "auto":
        with console.status("looking for a learning rate"):
            trial = _find_lr(task, data, device)
        task.lr = trial.lr
    compiled = choose_compile(recipe, device)
    devices, machines = layout(recipe.train, device.type == "cuda")
    world = devices * machines
    choose_sync_batchnorm(recipe, device, world)  # refuses what cannot be before anything is trained
    return Job(
        recipe,
        data,
        model,
        task,
        device,
        device_name,
        precision,
        count_parameters(model),
        count_macs(task.counted, (bands, *size)),
        speed,
        loaded,
        optimized,
        batch,
        describe(recipe, device, precision, batch, task.lr, compiled, world),
        trial,
        compiled[0],
    )


def _find_lr(task: Task, data: DataModule, device: torch.device) -> LrTrial:
    """Look for a learning rate, which takes the memory of the optimiser as well."""
    try:
        return find_lr(task, data, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"train.lr: auto: its trial with {data.batch_size} images is out of memory; give train.lr=1e-3 or another, "
            f"or train.batch_size={max(2, data.batch_size // 2)}"
        ) from None


def open_data(recipe: Recipe) -> DataModule:
    """Return the data of a recipe, set up."""
    data = DataModule(
        recipe.data, recipe.augment, seed=recipe.seed, batch_size=recipe.train.pass_size, target=recipe.target
    )
    data.setup()
    data.size_share = recipe.train.size_share if recipe.train.progressive_size else None
    return data


def start_network(recipe: Recipe, data: DataModule) -> tuple[nn.Module, list[str]]:
    """Build the network of a recipe with its starting weights, which are a function of its seed.

    Args:
        recipe: The recipe.
        data: Its data; images then get the normalisation that the weights want.

    Returns:
        The network, in the recipe's memory layout, and what loading the weights did, in lines.
    """
    L.seed_everything(recipe.seed, verbose=False)

    def images(report: LoadReport) -> Loader:
        data.preprocess, _ = fit_preprocess(data.preprocess, report)
        return data.train_dataloader()

    model = build_network(recipe, num_classes=len(data.preprocess.classes), bands=data.preprocess.bands, images=images)
    report: LoadReport | None = model.load_report  # type: ignore[assignment]
    data.preprocess, normalisation = fit_preprocess(data.preprocess, report)
    model = model.to(memory_format=memory_format(recipe.train.channels_last))
    return model, [*(report.lines() if report is not None else []), *([normalisation] if normalisation else [])]


def speed_up(model: nn.Module, spec: TrainSpec, device: torch.device, precision: str) -> str:
    """Turn the network into its fast form where the recipe and the machine allow it, and say whether and why."""
    if spec.optimize == "off":
        return "off: train.optimize=off"
    if device.type != "cpu":
        return "off: the form for a GPU was never measured; r2kit.optimize has it"
    if precision != "32-true":
        return f"off: the kernels are for 32-bit floats, and the precision is {precision}"
    return optimize_with_reason(model)


def choose_device(recipe: Recipe) -> tuple[torch.device, str, str]:
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
        device, name, best = torch.device("cpu"), f"CPU, {counted(torch.get_num_threads(), 'thread')}", "fp32"
    precision = best if spec.precision == "auto" else spec.precision
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("train.precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
    return device, name, {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[precision]
