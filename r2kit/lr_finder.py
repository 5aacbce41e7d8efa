"""A learning rate from the data: a short trial with growing rates on a copy of the network."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from matplotlib.figure import Figure

from r2kit.data.datamodule import DataModule
from r2kit.data.loader import Batch
from r2kit.errors import ModelError
from r2kit.optim import make_optimizer, parameter_groups
from r2kit.seeding import derive_seed
from r2kit.tasks import Task

STEPS = 100
_RANGE = {"adamw": (1e-6, 1.0), "sgd": (1e-5, 10.0)}
_SMOOTH = 0.9  # of the running mean of the losses
_BACK = 10.0  # the suggestion is the rate of the lowest loss over this
_TAG = 11


@dataclass(frozen=True)
class LrTrial:
    """What a trial found.

    Attributes:
        rates: Learning rate of each step.
        losses: Running mean of the loss before each step.
        lr: The suggestion: a tenth of the rate at which the loss is lowest.
    """

    rates: list[float]
    losses: list[float]
    lr: float


def find_lr(task: Task, data: DataModule, device: torch.device, steps: int = STEPS) -> LrTrial:
    """Train a copy of the network for a few steps with a rate that grows from step to step.

    The network, its statistics and every random state stay as they are. The result is a function of the recipe, the
    data and the device alone.

    Args:
        task: The task, ready for training.
        data: The data, set up.
        device: Where to train.
        steps: Steps at most; the trial ends where the loss explodes.

    Raises:
        ModelError: If the loss is no number from the start.

    Source: Smith 2017, arXiv:1506.01186, sec. 3.3; a tenth of the rate of the lowest loss is fastai's `minimum` rule.
    """
    spec = task.recipe.train
    low, high = _RANGE[spec.optimizer]
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        clone = copy.deepcopy(task).to(device).train()
        groups = parameter_groups(clone.model, spec)
        optimizer = make_optimizer(groups, spec, low, fused=False)
        for step, batch in enumerate(itertools.islice(_batches(data), steps)):
            torch.manual_seed(derive_seed(task.recipe.seed, _TAG, step))
            rate = low * (high / low) ** (step / (steps - 1))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            loss = clone.training_step(move_data_to_device(batch, device), step)
            value = float(loss.detach())
            mean = _SMOOTH * mean + (1 - _SMOOTH) * value
            smooth = mean / (1 - _SMOOTH ** (step + 1))
            if not math.isfinite(value) or (losses and smooth > 4 * min(losses)):
                break
            rates.append(rate)
            losses.append(smooth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    if len(losses) < 2:
        raise ModelError("train.lr: auto: the loss is no number from the start; give train.lr=1e-4 or another")
    best = min(range(len(losses)), key=losses.__getitem__)
    return LrTrial(rates, losses, float(f"{rates[best] / _BACK:.2g}"))


def plot_lr(trial: LrTrial) -> Figure:
    """Return the loss over the learning rate, with the suggestion marked."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogx(trial.rates, trial.losses)
    axes.axvline(trial.lr, linestyle="--", color="tab:red", label=f"train.lr {trial.lr:g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss, running mean")
    axes.legend()
    return figure


def _batches(data: DataModule) -> Iterator[Batch]:
    """Yield the training batches of one epoch after the other, mixed as in training."""
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # an EpochSampler
        for index, batch in enumerate(loader):
            yield data.mix(batch, epoch, index)
