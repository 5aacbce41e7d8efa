"""The `augment` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r2kit.recipe.base import Positive, Probability, Spec


class AugmentSpec(Spec):
    """How training images are varied."""

    preset: Literal["overhead", "natural", "none"] = "overhead"
    """`overhead`: all eight orientations, scale, light. `natural`: left-right only, scale, light. `none`."""
    mixup: Probability = 0.0
    """Share of the batches whose images are blended in pairs."""
    mixup_alpha: Positive = 0.2
    """Beta(alpha, alpha) draws the blend: small values stay near one of the two images."""
    cutmix: Probability = 0.0
    """Share of the batches in which a rectangle is pasted from another image."""
    cutmix_alpha: Positive = 1.0
    """Beta(alpha, alpha) draws the area of the rectangle."""
    mix_off_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of last epochs without MixUp and CutMix."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentSpec:
        if self.mixup + self.cutmix > 1.0:
            raise ValueError(
                f"mixup: {self.mixup:g} and cutmix {self.cutmix:g} are shares of the batches and add up to more than 1"
            )
        return self
