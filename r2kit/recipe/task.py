"""The `task` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r2kit.recipe.base import Fraction, Spec


class ClassificationSpec(Spec):
    """One class per image."""

    kind: Literal["classification"] = "classification"
    """What the network predicts."""
    label_smoothing: Fraction = 0.0
    """Share of the target spread evenly over all classes."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """`focal`: images that the network is sure about count less (Lin et al. 2017); not with MixUp and CutMix."""
    focal_gamma: Annotated[float, Field(gt=0.0, le=10.0)] = 2.0
    """For `loss: focal`: the loss of an image of probability p is multiplied by (1 - p) to this power."""
    class_weights: Literal["none", "effective_number"] = "none"
    """`effective_number`: rare classes count more in the loss (Cui et al. 2019); 1 on average over the images."""
    class_weights_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """For `class_weights: effective_number`: near 0 all classes count alike, near 1 as the inverse of their size."""

    @model_validator(mode="after")
    def _consistent(self) -> ClassificationSpec:
        refuse_unused(self, "focal_gamma", "loss", "focal")
        refuse_unused(self, "class_weights_beta", "class_weights", "effective_number")
        return self


def refuse_unused(spec: Spec, name: str, key: str, needed: str) -> None:
    """Refuse a value that nothing would read.

    Args:
        spec: Part of a recipe.
        name: A field of it, used only when field `key` is `needed`.
        key: The field that decides.
        needed: Its value.

    Raises:
        ValueError: If `name` is not at its default and `key` is not `needed`.
    """
    value = getattr(spec, name)
    if getattr(spec, key) != needed and value != type(spec).model_fields[name].default:
        raise ValueError(f"{name}: {value:g} has no effect with {key}={getattr(spec, key)}; set {key}={needed} too")
