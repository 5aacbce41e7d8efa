"""The `augment` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from r2kit.recipe.base import Positive, Probability, Spec


class AugmentSpec(Spec):
    """How training images are varied."""

    preset: Literal["overhead", "natural", "none"] = "overhead"
    """`overhead`: all eight orientations, scale, light of each band, haze. `natural`: left-right only, scale, light.
    `none`."""
    transforms: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Transforms of albumentations after those of the preset, in order, each by its name with its own arguments, e.g.
    [{name: GaussNoise, std_range: [0.01, 0.05], p: 0.3}]; with preset none, these alone. `OneOf` and `SomeOf` (with
    `n`) choose among their own `transforms`, e.g. {name: OneOf, transforms: [{name: Blur}, {name: GaussNoise}]}. What
    comes from outside an image, and holes in it, are of the mean colour unless `fill` says otherwise."""
    mixup: Probability = 0.0
    """Share of the batches whose images are blended in pairs."""
    mixup_alpha: Positive = 0.2
    """Beta(alpha, alpha) draws the blend: small values stay near one of the two images."""
    cutmix: Probability = 0.0
    """Share of the batches in which a rectangle is pasted from another image."""
    cutmix_alpha: Positive = 1.0
    """Beta(alpha, alpha) draws the area of the rectangle."""
    mix_off_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of last epochs without MixUp and CutMix; with `train.time_limit` also the same share of the time. A run
    that `train.early_stop` ends before them has mixed to its end."""

    mosaic: Probability = 0.0
    """For boxes: share of the training images that are put together from windows of four."""
    copy_paste: Probability = 0.0
    """For boxes: share of the training images into which objects of another one are pasted, where they hide none."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentSpec:
        for position, values in enumerate(self.transforms):
            if not isinstance(values.get("name"), str):
                raise ValueError(
                    f"transforms: entry {position} has no name; one is written {{name: GaussNoise, p: 0.3}}"
                )
        if self.mixup + self.cutmix > 1.0:
            raise ValueError(
                f"mixup: {self.mixup:g} and cutmix {self.cutmix:g} are shares of the batches and add up to more than 1"
            )
        return self

    @property
    def varies(self) -> bool:
        """Whether single images are varied at all."""
        return self.preset != "none" or bool(self.transforms)
