"""The `data.rasters` part of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from r2kit.recipe.base import PixelSize, Spec


class RastersSpec(Spec):
    """How large georeferenced rasters are cut into tiles while they are read (`data.source: rasters`)."""

    labels: str | None = None
    """What labels them, relative to the current folder: a mask raster, a folder of mask rasters with the names of the
    images, or polygons (.geojson, .json, .gpkg, .shp); in any coordinate system."""
    attribute: str | None = None
    """For polygons: the attribute that names the class; null: every polygon is of the class `object`."""
    background: str | None = "background"
    """For polygons: the class of everything outside them; null: the class outside is not known."""
    tile: PixelSize = 256
    """Side of a tile in pixels of the raster. Tiles at the right and lower border are filled up; what is filled up has
    no class."""
    min_valid: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """A tile is used when at least this share of its pixels lies inside the raster, is measured and is labelled.
    What is transparent was not measured."""
    purity: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.6
    """For one class per tile: a tile is used when more than this share of its labelled pixels is of one class."""

    @property
    def has_polygons(self) -> bool:
        """Whether `labels` are polygons, by the name of the file."""
        return self.labels is not None and self.labels.lower().endswith((".geojson", ".json", ".gpkg", ".shp"))

    @model_validator(mode="after")
    def _consistent(self) -> RastersSpec:
        if self.attribute is not None and not self.has_polygons:
            raise ValueError(f"attribute: only polygons have attributes, and labels is {self.labels}")
        return self
