"""The `train` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from r2kit.recipe.base import Positive, Spec


class TrainSpec(Spec):
    """How the network is trained."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Images per optimiser step on each device."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    lr: Positive = 1e-3
    """Highest learning rate, reached after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Decay of the weights; norms and biases have none."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.5
    """Epochs, fractions allowed, in which the learning rate grows from zero to `lr`; a cosine to zero follows."""
    ema: bool = False
    """Average the weights over the steps and evaluate the average."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """Weight of the running average at each step."""
    gradient_clip: Positive | None = None
    """Largest norm of the gradient; null for none."""
    freeze: Literal["none", "backbone"] = "none"
    """`backbone`: train the classifier only; gradients and BatchNorm statistics of the rest stand still."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 on a GPU that has it, else fp32."""
    devices: Annotated[StrictInt, Field(ge=1)] | Literal["auto"] = "auto"
    """Devices to train on; `auto` takes every GPU, or one CPU process."""
    strategy: Literal["auto", "ddp"] = "auto"
    """`ddp`: one process per device, gradients averaged; `auto` is `ddp` for more than one device."""
    channels_last: bool = True
    """Keep images as (B, H, W, C) in memory, the faster layout for convolutions."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if self.warmup_epochs > 0 and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs:g} must be less than epochs ({self.epochs}); "
                f"e.g. train.warmup_epochs={self.epochs / 4:g}"
            )
        return self
