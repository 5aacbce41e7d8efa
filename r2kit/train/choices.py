"""What a recipe leaves to the machine: batch size, learning rate, precision, kernels; each choice with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from r2kit.errors import ModelError, RecipeError
from r2kit.recipe import Recipe, TrainSpec
from r2kit.recipe.train import AUTO_BATCH
from r2kit.schedules import lr_factor

_T = TypeVar("_T")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Choice:
    """One choice: what was chosen, and why."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """How the images of an optimiser step go through the network on each device.

    Attributes:
        size: Images of one pass.
        passes: Passes of one step.
    """

    size: int
    passes: int

    def halved(self) -> Batch | None:
        """Return the same images a step in twice as many passes; None for one image a pass, which has no BatchNorm."""
        return Batch(self.size // 2, self.passes * 2) if self.size % 2 == 0 and self.size > 2 else None


def fitting_batch(spec: TrainSpec, attempt: Callable[[int], _T], decided: Batch | None = None) -> tuple[Batch, _T]:
    """Return the batch that fits into memory, and what the attempt with it gave.

    Args:
        spec: The recipe's `train` section.
        attempt: Runs a training step with a batch of a size; raises torch's error where memory is out.
        decided: What an interrupted run had; it stays.

    Raises:
        ModelError: If not even two images fit, or the size that the recipe gives does not.
    """
    images = AUTO_BATCH * spec.accumulate
    wanted = images if spec.batch_size == "auto" else spec.batch_size
    size = wanted if decided is None else decided.size
    while True:
        try:
            found = attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if spec.batch_size != "auto":
                raise ModelError(
                    f"train.batch_size: a training step with {size} images is out of memory; give less and as much "
                    "more train.accumulate, or train.batch_size=auto"
                ) from None
            smaller = Batch(size, images // size).halved()
            if smaller is None:
                raise ModelError(
                    f"train.batch_size: auto: a training step with {size} images is out of memory; use smaller images "
                    "(data.image_size) or a smaller network (model.name)"
                ) from None
            size = smaller.size
            continue
        passes = spec.accumulate if spec.batch_size != "auto" else images // size
        return Batch(size, passes), found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that memory is out, on a GPU or a CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY)


def choose_compile(recipe: Recipe, device: torch.device) -> tuple[bool, str]:
    """Return whether the network is compiled, and why."""
    spec = recipe.train
    if spec.compile != "auto":
        return spec.compile, "as the recipe says"
    if device.type == "cpu":
        return False, "compiling whole networks gained nothing on a CPU (measured)"
    if spec.unfreeze or spec.progressive_size or recipe.model.warm_start:
        return False, "the network or its images change while training, and each change would compile anew"
    return True, "on a GPU"


def choose_sync_batchnorm(recipe: Recipe, device: torch.device, world: int) -> tuple[bool, str]:
    """Return whether BatchNorm is computed over the images of all devices, and why.

    Args:
        recipe: The recipe.
        device: A device of the training.
        world: Number of devices.

    Raises:
        RecipeError: If the recipe asks for it on a CPU.
    """
    spec = recipe.train
    if spec.sync_batchnorm is True and device.type == "cpu":
        raise RecipeError("train.sync_batchnorm: torch has it for GPUs only; use auto")
    if spec.sync_batchnorm != "auto":
        return spec.sync_batchnorm and world > 1, "as the recipe says"
    if world == 1 or device.type == "cpu":
        return False, "there is one device" if world == 1 else "torch has it for GPUs only"
    if spec.freeze != "none":
        return False, "the statistics of what is frozen stand still"
    few = 16
    if spec.batch_size == "auto" or spec.batch_size >= few:
        return False, f"each device has {few} images or more"
    return True, f"each device has {spec.batch_size} images, fewer than {few}"


def choose_tf32(spec: TrainSpec, device: torch.device) -> tuple[bool, str]:
    """Return whether TF32 is used, and why.

    Raises:
        RecipeError: If the recipe asks for it and the device does not have it.
    """
    has = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if spec.tf32 is True and not has:
        raise RecipeError("train.tf32: this device has no TF32, which NVIDIA GPUs have since Ampere; use auto")
    if spec.tf32 != "auto":
        return spec.tf32, "as the recipe says"
    return has, "the device has it" if has else "the device has none"


def describe(
    recipe: Recipe,
    device: torch.device,
    precision: str,
    batch: Batch,
    lr: float,
    compiled: tuple[bool, str],
    world: int = 1,
) -> list[Choice]:
    """Return all choices of a training on so many devices."""
    spec = recipe.train
    given = "as the recipe says"
    images = batch.size * batch.passes
    if spec.batch_size != "auto":
        why = given
    elif batch.passes == spec.accumulate:
        why = "a training step with it fits into memory"
    else:
        why = f"more did not fit into memory; a step still sees {images} images, BatchNorm sees {batch.size}"
    fused = precision != "16-mixed"
    tf32, tf32_why = choose_tf32(spec, device)
    layout = "faster for convolutions" if spec.channels_last else given
    if spec.precision != "auto":
        precision_why = given
    else:
        precision_why = "the GPU has bf16" if precision == "bf16-mixed" else "bf16 is only chosen on a GPU that has it"
    return [
        Choice("batch", f"{batch.passes} x {batch.size} images a step", why),
        Choice("learning rate", f"{lr:g}", "a tenth of that of the lowest loss" if spec.lr == "auto" else given),
        Choice("precision", precision, precision_why),
        Choice("TF32", _on(tf32), tf32_why),
        Choice("torch.compile", _on(compiled[0]), compiled[1]),
        Choice("fused optimiser", _on(fused), "one kernel for all" if fused else "fp16's scaler cannot clip with it"),
        Choice("channels last", _on(spec.channels_last), layout),
        *_of_several_devices(recipe, device, images, lr, world),
    ]


def _of_several_devices(recipe: Recipe, device: torch.device, images: int, lr: float, world: int) -> list[Choice]:
    """Return the choices that only several devices need."""
    if world == 1:
        return []
    spec = recipe.train
    factor = lr_factor(spec.optimizer, world) if spec.lr_scaling == "auto" else 1.0
    rule = {"sgd": "with the devices", "adamw": "with the root of the devices"}[spec.optimizer]
    why = f"a step sees {world} x {images} images; {spec.optimizer} scales {rule}"
    synced, synced_why = choose_sync_batchnorm(recipe, device, world)
    return [
        Choice("scaled rate", f"{lr * factor:.4g}", why if spec.lr_scaling == "auto" else "train.lr_scaling=none"),
        Choice("SyncBatchNorm", _on(synced), synced_why),
    ]


def record(batch: Batch, lr: float) -> dict[str, Any]:
    """Return what run.json keeps, so that a run that goes on decides nothing anew."""
    return {"batch_size": batch.size, "accumulate": batch.passes, "lr": lr}


def _on(value: bool) -> str:
    return "on" if value else "off"
