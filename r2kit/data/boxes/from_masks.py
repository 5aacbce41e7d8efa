"""Boxes and outlines of objects from masks: each connected patch of a class is an object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from r2kit.data.reader import find_images, read_image
from r2kit.errors import DataError


def masks_to_coco(root: Path, classes: Mapping[str, int], *, min_pixels: int = 4) -> Path:
    """Write the objects of a folder of images with masks as COCO JSON, for detection and instance segmentation.

    Pixels of a class that touch, at a side or a corner, are one object; two objects that touch are taken for one.

    Args:
        root: Holds ``images/`` and ``masks/``, files of the same names up to their endings.
        classes: Name of each class and its value in the masks; other values are background.
        min_pixels: Smaller patches are left out.

    Returns:
        The file written, ``root/boxes.json``.

    Raises:
        DataError: If an image has no mask, or one of another size, or no object is found at all.
    """
    masks = {path.stem: path for path in find_images([root / "masks"])}
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number, path in enumerate(find_images([root / "images"])):
        if path.stem not in masks:
            raise DataError(f"{path}: has no mask; want masks/{path.stem}.* beside images/")
        height, width = read_image(path).shape[:2]
        mask = read_image(masks[path.stem])[..., 0]
        if mask.shape != (height, width):
            raise DataError(f"{masks[path.stem]}: is {mask.shape[0]} x {mask.shape[1]}, its image {height} x {width}")
        name = path.relative_to(root / "images").as_posix()
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for category, value in enumerate(classes.values(), start=1):
            for patch in _patches(mask == value, min_pixels):
                objects.append({"id": len(objects), "image_id": number, "category_id": category, **_entry(patch)})
    if not objects:
        raise DataError(f"{root}: no patch of {min_pixels} pixels of {', '.join(classes)} in the masks")
    categories = [{"id": category, "name": name} for category, name in enumerate(classes, start=1)]
    out = root / "boxes.json"
    out.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}), encoding="utf-8")
    return out


def _patches(where: NDArray[np.bool_], min_pixels: int) -> list[NDArray[np.bool_]]:
    """Return the connected patches of a mask (H, W), each as a mask of its own."""
    labelled, count = ndimage.label(where, structure=np.ones((3, 3)))
    patches = [labelled == number for number in range(1, count + 1)]
    return [patch for patch in patches if patch.sum() >= min_pixels]


def _entry(patch: NDArray[np.bool_]) -> dict[str, Any]:
    """Return box, area and outline of an object; the outline in runs, column by column, as COCO has it."""
    rows, columns = np.flatnonzero(patch.any(1)), np.flatnonzero(patch.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    flat = patch.T.ravel()
    turns = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *turns, len(flat)]).tolist()
    return {
        "bbox": [int(value) for value in box],
        "area": int(patch.sum()),
        "iscrowd": 0,
        # COCO's runs begin with background, none of it where the first pixel is the object's.
        "segmentation": {"size": list(patch.shape), "counts": [0, *runs] if flat[0] else runs},
    }
