"""What all parts of a recipe share: strictness, and the number types."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt


class Spec(BaseModel):
    """Base of every part of a recipe: frozen, strict, and without room for unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
LARGEST_SIDE = 4096
"""Pixels of a side of the network's input."""
PixelSize = Annotated[StrictInt, Field(ge=16, le=LARGEST_SIDE)]
