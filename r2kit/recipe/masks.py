"""The `data.masks` part of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictInt, model_validator

from r2kit.recipe.base import Spec

Level = Annotated[StrictInt, Field(ge=0, le=255)]
MaskValue = Annotated[StrictInt, Field(ge=0, le=65535)]
Colour = Annotated[tuple[Level, Level, Level], Field(strict=False)]


class MaskSpec(Spec):
    """What the pixels of masks mean, for tasks that learn from masks."""

    classes: Annotated[dict[str, MaskValue | Colour], Field(min_length=2, max_length=255)] | None = None
    """Name of each class and its value in the masks, e.g. {water: 0, road: 255}, or its colour, e.g. {water: [0, 0,
    255], road: [90, 90, 90]}; null: every value that the masks hold is a class of that name."""
    threshold: Annotated[float, Field(ge=0.0, lt=65535.0)] | None = None
    """For grey masks of two classes: values up to it are `background`, values above it `object`; of `names` if
    given."""
    names: Annotated[tuple[str, str], Field(strict=False)] | None = None
    """Names of the two classes of `threshold`, the one below it first, e.g. [land, road]."""
    ignore: Annotated[tuple[MaskValue | Colour, ...], Field(strict=False)] = ()
    """Values, or colours, of pixels whose class is not known: they are neither learned nor counted."""

    @model_validator(mode="after")
    def _consistent(self) -> MaskSpec:
        if self.threshold is not None and self.classes is not None:
            raise ValueError("threshold: the classes name their values already; leave out one of the two")
        if self.names is not None and self.threshold is None:
            raise ValueError("names: only a threshold needs them; give classes with their values instead")
        if self.names is not None and self.names[0] == self.names[1]:
            raise ValueError(f"names: both classes are '{self.names[0]}'")
        given = [*(self.classes or {}).values(), *self.ignore]
        if len({isinstance(value, tuple) for value in given}) > 1:
            raise ValueError("classes: values and colours are mixed (ignore included); a mask holds one or the other")
        if len(set(given)) < len(given):
            twice = next(value for value in given if given.count(value) > 1)
            raise ValueError(f"classes: {twice} has two meanings")
        return self

    @property
    def colours(self) -> bool:
        """Whether the masks are read as colours instead of values."""
        return any(isinstance(value, tuple) for value in [*(self.classes or {}).values(), *self.ignore])
