"""The `train` part of a recipe."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from r2kit.recipe.base import Fraction, Positive, Spec

AUTO_BATCH = 32  # what batch_size auto begins with, for each pass of accumulate: the default
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LIMIT = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


class TrainSpec(Spec):
    """How the network is trained."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training images."""
    time_limit: str | None = None
    """Longest time of training, such as 90s, 30m or 1h30m, interruptions not counted; null for none. The learning rate
    runs its whole course within it, and `epochs` stays the upper bound."""
    batch_size: Annotated[StrictInt, Field(ge=2)] | Literal["auto"] = 32
    """Images of one pass through the network on each device. `auto`: 32 x `accumulate`, halved until a training step
    fits into memory; as many more passes then make up an optimiser step, whose images stay 32 x `accumulate`. Where
    memory runs out in training all the same, a run on one device goes on from its last checkpoint with half of it; on
    several devices it ends with a line that says so."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Passes whose gradients one optimiser step averages: it sees `accumulate` x `batch_size` images on each device."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of SGD's momentum; false for the plain one, as in the Res2Net paper."""
    lr: Positive | Literal["auto"] = 1e-3
    """Highest learning rate, reached after the warm-up. `auto`: found before training, by a trial with growing rates on
    a copy of the network."""
    lr_scales: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] | None = None
    """Shares of `lr` for the stem with the early stages, the last two stages, and the head, e.g. [0.05, 0.2, 1];
    null for one rate."""
    layer_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of its successor's learning rate that each block has, counted down from the head, e.g. 0.75; null for one
    rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Decay of the weights; norms and biases have none."""
    schedule: Literal["cosine", "one_cycle", "step", "plateau", "constant"] = "cosine"
    """Course of the learning rate after the warm-up. `cosine`: to zero. `one_cycle`: to zero, momentum in counterphase.
    `step`: times `lr_factor` every `step_epochs`. `plateau`: times `lr_factor` after `plateau_patience` epochs
    without a better one. `constant`."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] | Literal["auto"] = "auto"
    """Epochs, fractions allowed, in which the learning rate grows to `lr`. `auto`: 0.3 of all epochs for `one_cycle`,
    none for `step`, half an epoch for the others."""
    step_epochs: (
        Annotated[StrictInt, Field(ge=1)]
        | Annotated[tuple[Annotated[StrictInt, Field(ge=1)], ...], Field(strict=False, min_length=1)]
    ) = 30
    """Epochs between two reductions of the schedule `step`; or a list of the epochs after which it reduces, e.g.
    [150, 225]."""
    lr_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """What a reduction of `step` or `plateau` multiplies the learning rate by."""
    plateau_patience: Annotated[int, Field(ge=1)] = 3
    """Epochs in a row without a better one on the validation images before `plateau` reduces."""
    best_by: Literal["metric", "loss"] = "metric"
    """What makes an epoch better than another on the validation images: the task's own figure (accuracy, average
    precision, mean IoU, largest F), and the loss among equals; or the loss, which tells epochs apart where a few
    hundred images give nearly the same accuracy. The weights of the best epoch are what the run keeps."""
    early_stop: Annotated[int, Field(ge=1)] | None = None
    """Training ends after so many epochs in a row without a better one on the validation images; null for never."""
    ema: bool = False
    """Average the weights over the steps and evaluate the average."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """Weight of the running average at each step."""
    gradient_clip: Positive | None = None
    """Largest norm of the gradient; null for none."""
    freeze: Literal["none", "backbone"] = "none"
    """`backbone`: train the head only; gradients and BatchNorm statistics of the rest stand still."""
    unfreeze: Annotated[tuple[Annotated[StrictInt, Field(ge=1)], ...], Field(strict=False)] = ()
    """After how many epochs a frozen backbone is freed, stage by stage from the head down: [1, 3] frees the last stage
    after one epoch and all the rest after three. Empty: never."""
    progressive_size: Annotated[tuple[Annotated[float, Field(ge=0.1, lt=1.0)], ...], Field(strict=False)] = ()
    """Shares of `data.image_size` at which training images are seen in the first, second, ... of equal parts of the
    epochs, rounded to multiples of 16 pixels; a last part with the full size follows. Empty: the full size always."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 on a GPU that has it, else fp32."""
    tf32: StrictBool | Literal["auto"] = "auto"
    """Let a GPU multiply fp32 matrices with TF32's shorter mantissa; `auto` where it has that."""
    compile: StrictBool | Literal["auto"] = "auto"
    """Compile the network with torch.compile before training; `auto` is never on a CPU, where it gained nothing."""
    loggers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Field(strict=False)] = ()
    """Where the metrics of the epochs are written beside `metrics.csv`; their files lie in the run folder."""
    devices: Annotated[StrictInt, Field(ge=1)] | Literal["auto"] = "auto"
    """Devices to train on; `auto` takes every GPU, or one CPU process."""
    strategy: Literal["auto", "ddp"] = "auto"
    """`ddp`: one process per device, gradients averaged; `auto` is `ddp` for more than one device."""
    lr_scaling: Literal["auto", "none"] = "auto"
    """On several devices, where a step sees as many times the images: `auto` multiplies `lr` by their number for SGD
    (Goyal et al. 2017, arXiv:1706.02677) and by its square root for AdamW (Malladi et al. 2022, arXiv:2205.10287)."""
    sync_batchnorm: bool | Literal["auto"] = "auto"
    """BatchNorm over the images of all devices; `auto` does so on several GPUs with less than 16 images each, where
    nothing is frozen."""
    channels_last: bool = True
    """Keep images as (B, H, W, C) in memory, the faster layout for convolutions."""
    optimize: Literal["auto", "off"] = "auto"
    """`auto`: on a CPU with a C++ compiler train in the fast form, which computes the same to rounding; the run says
    whether it does, and the trained weights are those of the plain network. `off`: the plain network."""
    checkpoint_every: Annotated[StrictInt, Field(ge=1)] | str = "5m"
    """Optimiser steps, or a time such as 90s, 5m or 1h, between two checkpoints within an epoch: what a killed run has
    to compute again at most. There is one after each epoch, too."""
    max_loss_growth: Annotated[float, Field(gt=1.0)] | None = 100.0
    """Stop when the mean loss of 20 batches is more than this many times that of the first 20; null only stops when the
    loss is infinite or no number."""

    @property
    def checkpoint_steps(self) -> int | None:
        """Optimiser steps between two checkpoints; None where they go by time."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else None

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds between two checkpoints; infinite where they go by steps."""
        return float("inf") if isinstance(self.checkpoint_every, int) else _seconds(self.checkpoint_every)

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        for problem in (self._time_problem(), self._schedule_problem(), self._freeze_problem(), self._unused_problem()):
            if problem is not None:
                raise ValueError(problem)
        return self

    def _time_problem(self) -> str | None:
        """Return what is wrong with the time limit."""
        if self.time_limit is not None and not _seconds(self.time_limit):
            return f"time_limit: '{self.time_limit}': allowed is a time such as 90s, 30m, 2h or 1h30m"
        if isinstance(self.checkpoint_every, str) and not _seconds(self.checkpoint_every):
            return f"checkpoint_every: '{self.checkpoint_every}': allowed are steps, or a time such as 90s or 5m"
        return None

    def _schedule_problem(self) -> str | None:
        """Return what is wrong with the warm-up and the learning rates."""
        if self.warmup_epochs != "auto" and self.warmup_epochs > 0 and self.warmup_epochs >= self.epochs:
            return (
                f"warmup_epochs: {self.warmup_epochs:g} must be less than epochs ({self.epochs}); "
                f"e.g. train.warmup_epochs={self.epochs / 4:g}"
            )
        if isinstance(self.step_epochs, tuple):
            if any(first >= second for first, second in itertools.pairwise(self.step_epochs)):
                return f"step_epochs: {list(self.step_epochs)} must grow from entry to entry, e.g. [150, 225]"
            if self.step_epochs[-1] >= self.epochs:
                return f"step_epochs: {self.step_epochs[-1]} is not reached in {self.epochs} epochs; give less, or more"
        if self.lr_scales is not None and self.layer_decay is not None:
            return "layer_decay: both it and lr_scales give learning rates by depth; leave one out"
        if list(self.progressive_size) != sorted(self.progressive_size):
            return "progressive_size: the images grow; give the shares in growing order, e.g. [0.5, 0.75]"
        if len(self.progressive_size) >= self.epochs:
            return (
                f"progressive_size: {len(self.progressive_size)} smaller sizes and the full one need an epoch "
                f"each, and epochs is {self.epochs}"
            )
        return None

    def _freeze_problem(self) -> str | None:
        """Return what is wrong with what is frozen and until when."""
        if not self.unfreeze:
            by_depth = "lr_scales" if self.lr_scales is not None else "layer_decay" if self.layer_decay else None
            if self.freeze == "backbone" and by_depth:
                return (
                    f"{by_depth}: only the head is trained; leave it out, or free the backbone with train.unfreeze=[1]"
                )
            return None
        if self.freeze == "none":
            return "unfreeze: nothing is frozen; set train.freeze=backbone, or leave unfreeze out"
        if any(first >= second for first, second in itertools.pairwise(self.unfreeze)):
            return f"unfreeze: {list(self.unfreeze)} must grow from entry to entry, e.g. [1, 3]"
        if self.unfreeze[-1] >= self.epochs:
            return f"unfreeze: {self.unfreeze[-1]} is not reached in {self.epochs} epochs; give less, or more epochs"
        return None

    def _unused_problem(self) -> str | None:
        """Return the first key that what it belongs to does not use."""
        needs: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
            ("momentum", "optimizer", ("sgd",)),
            ("nesterov", "optimizer", ("sgd",)),
            ("step_epochs", "schedule", ("step",)),
            ("lr_factor", "schedule", ("step", "plateau")),
            ("plateau_patience", "schedule", ("plateau",)),
        )
        for key, owner, users in needs:
            changed = getattr(self, key) != type(self).model_fields[key].default
            if changed and getattr(self, owner) not in users:
                return f"{key}: belongs to {owner} {' and '.join(users)}, and {owner} is '{getattr(self, owner)}'"
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0.0:
            return "nesterov: needs a momentum above 0; set train.nesterov=false"
        if self.schedule == "one_cycle" and self.optimizer == "sgd" and self.momentum != 0.9:
            return "momentum: one_cycle moves it between 0.95 and 0.85 itself; leave it out"
        return None

    @property
    def pass_size(self) -> int:
        """Images of one pass through the network, as far as the recipe alone knows."""
        return AUTO_BATCH if self.batch_size == "auto" else self.batch_size

    @property
    def warmup(self) -> float:
        """Epochs of the warm-up, with `auto` decided."""
        if self.warmup_epochs != "auto":
            return self.warmup_epochs
        return {"one_cycle": 0.3 * self.epochs, "step": 0.0}.get(self.schedule, 0.5)

    @property
    def time_limit_seconds(self) -> int | None:
        """The time limit in seconds."""
        return None if self.time_limit is None else _seconds(self.time_limit)

    def size_share(self, epoch: int) -> float:
        """Return the share of the image size that training images have in an epoch, counted from 0."""
        shares = (*self.progressive_size, 1.0)
        return shares[min(epoch * len(shares) // self.epochs, len(shares) - 1)]


def _seconds(text: str) -> int:
    """Return the seconds of a time such as 1h30m; 0 where it is none."""
    match = _LIMIT.fullmatch(text.replace(" ", ""))
    if match is None:
        return 0
    return sum(int(number) * _SECONDS[unit] for number, unit in zip(match.groups("0"), "dhms", strict=True))
