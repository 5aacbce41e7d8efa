"""Objects drawn over the image that they are in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from r2kit.objects.coco import Objects, match, unpack_mask

RIGHT, WRONG, MISSED, GIVEN = "#2fd29a", "#ff7a3d", "#ffd83d", "#4dc3ff"
"""Colours that colour-blind readers tell apart: found and there, found and not there, there and not found, a label."""
_LONGEST = 960  # pixels of the longer side of a drawing


def draw_boxes(
    image: NDArray[np.uint8], boxes: NDArray[Any], colours: list[str], masks: list[Any] | None = None
) -> Any:
    """Draw boxes over an image.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4) in pixels of the image.
        colours: N, as ``#rrggbb``.
        masks: N run lengths; their objects are tinted.

    Returns:
        (h, w, 3) uint8, large images made smaller before the lines are drawn.
    """
    height, width = image.shape[:2]
    if masks:
        image = image.copy()
        for mask, colour in zip(masks, colours, strict=True):
            inside = unpack_mask(mask)
            tint = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
            image[inside] = (0.55 * image[inside] + 0.45 * tint).astype(np.uint8)
    factor = min(1.0, _LONGEST / max(height, width))
    picture = Image.fromarray(image)
    if factor < 1.0:
        picture = picture.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
    lines = ImageDraw.Draw(picture)
    thick = 2 if min(picture.size) >= 200 else 1
    for box, colour in zip(np.asarray(boxes, dtype=np.float64) * factor, colours, strict=True):
        x0, y0, x1, y1 = (float(value) for value in box)
        lines.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=thick)
    return np.asarray(picture)


def draw_comparison(
    image: NDArray[np.uint8], found: Objects, truth: Objects, num_classes: int, min_score: float
) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Draw what was found and what was missed.

    Args:
        image: (H, W, 3) uint8.
        found: Detections.
        truth: What is there.
        num_classes: K.
        min_score: Detections with a lower score are left out.

    Returns:
        (h, w, 3) uint8, and the number of objects that are `right`, `wrong` and `missed`, at an overlap of one half.
    """
    sure = np.flatnonzero(found["scores"] >= min_score)
    kept: Objects = {key: found[key][sure] for key in ("boxes", "labels", "scores")}
    right, missed = sides(kept, truth, num_classes)
    crowd = truth["crowd"].astype(bool)
    boxes = np.concatenate([truth["boxes"][missed], kept["boxes"]])
    colours = [MISSED] * int(missed.sum()) + [RIGHT if hit else WRONG for hit in right]
    masks = None
    if "masks" in found and "masks" in truth:
        masks = [truth["masks"][i] for i in np.flatnonzero(missed)] + [found["masks"][i] for i in sure]
    counts = {"right": int(right.sum()), "wrong": int((~right).sum()), "missed": int((missed & ~crowd).sum())}
    return draw_boxes(image, boxes, colours, masks), counts


def sides(found: Objects, truth: Objects, num_classes: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell which detections (N,) are objects, and which objects (M,) were not found, at an overlap of one half."""
    most = max(3, len(found["labels"]))
    matched = match(found, truth, num_classes, max_detections=most)
    right = np.zeros(len(found["labels"]), dtype=bool)
    missed = np.ones(len(truth["labels"]), dtype=bool)
    for label, item in enumerate(matched, 1):
        ours = np.flatnonzero(found["labels"] == label)
        ours = ours[np.argsort(-found["scores"][ours], kind="mergesort")]
        right[ours] = item.right[0]
        theirs = np.flatnonzero(truth["labels"] == label)
        taken = item.taken[item.taken >= 0]
        theirs = theirs[np.argsort(truth["crowd"][theirs].astype(bool), kind="mergesort")]
        missed[theirs[taken]] = False
        missed[theirs[truth["crowd"][theirs].astype(bool)]] = False
    return right, missed
