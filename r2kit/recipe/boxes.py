"""The `data.boxes` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from r2kit.recipe.base import Spec


class BoxSpec(Spec):
    """How boxes are read, for tasks that find objects."""

    format: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """`coco`: a JSON file, or a folder with one for each part. `yolo`: a folder with images/ and labels/. `voc`: a
    folder with JPEGImages/ and Annotations/. `auto`: by what is at `data.root`."""
    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Class names; for YOLO in the order of their numbers. null for those of the data: COCO's categories, YOLO's
    data.yaml or classes.txt, what occurs in VOC files."""
    on_bad_box: Literal["error", "mend"] = "error"
    """What a box does that reaches out of its image by more than a pixel, lies outside or has no area: stop before
    training; or be cut or left out, and counted."""
    overlap: Annotated[float, Field(ge=0.0, le=0.75)] = 0.25
    """With `data.resize: tile`, share of its side that a tile has in common with the next; as large as the objects."""
    min_visible: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """With `data.resize: tile`, and for mosaics: a box of which less than this share of its area is seen is left
    out."""
