"""From boxes as written to boxes that training can trust: in pixels, inside the image, with an area."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from r2kit.data.boxes.listing import BoxListing
from r2kit.errors import DataError, require

TOLERANCE = 1.0
"""Pixels by which a box may reach out of its image: rounding and the two conventions of counting pixels. It is cut."""
SMALLEST = 1.0
"""Pixels of the shorter side below which a box has no area that could be learned."""


@dataclass(frozen=True)
class BadBox:
    """A box that cannot be used as it is."""

    image: int
    """Position of its image."""
    where: str
    """File and line."""
    reason: str
    mended: Literal["cut", "left out"]
    """What becomes of it where it is not refused."""


@dataclass(frozen=True)
class Boxes:
    """All boxes of a data set, in pixels of their images."""

    image: NDArray[np.int64]
    """(N,) position of the image, ascending."""
    corners: NDArray[np.float32]
    """(N, 4) x0, y0, x1, y1 of the edges: a box around a single pixel in the corner is 0, 0, 1, 1."""
    label: NDArray[np.int64]
    """(N,) class, from 1; 0 is the background."""
    crowd: NDArray[np.bool_]
    """(N,) whether it marks a group that was not separated."""
    masks: list[Any]
    """N outlines as COCO has them (polygons in pixels or run lengths), None without."""
    bad: list[BadBox]
    """What was cut or left out."""

    @property
    def outlined(self) -> bool:
        """Whether every box comes with an outline."""
        return bool(self.masks) and all(mask is not None for mask in self.masks)

    def of(self, image: int) -> slice:
        """Where the boxes of an image are."""
        first, last = np.searchsorted(self.image, [image, image + 1])
        return slice(int(first), int(last))


def settle(listing: BoxListing, sizes: Sequence[tuple[int, int]], on_bad_box: Literal["error", "mend"]) -> Boxes:
    """Bring boxes into pixels and decide about those that do not fit.

    A box that reaches out of its image by at most a pixel is cut without a word. One that reaches out further is cut,
    and one that lies outside, or is less than a pixel wide or high after cutting, is left out: with ``mend``, and
    listed in `Boxes.bad`; ``error`` refuses them.

    Args:
        listing: As a reader gave it.
        sizes: (H, W) of each of its images, upright, as decoded.
        on_bad_box: What to do with boxes that do not fit.

    Raises:
        DataError: If an image has another size than its annotation says, or with ``error`` a box does not fit.
    """
    for image, (height, width) in zip(listing.images, sizes, strict=True):
        if image.size is not None and image.size != (height, width):
            raise DataError(
                f"{image.where}: says that {image.path} is {image.size[1]} x {image.size[0]} pixels, and it is "
                f"{width} x {height} (upright, as decoded); its boxes would lie elsewhere"
            )
    order = sorted(range(len(listing.boxes)), key=lambda i: listing.boxes[i].image)
    label_of = {name: position + 1 for position, name in enumerate(listing.classes)}
    kept: list[tuple[int, tuple[float, ...], int, bool, Any]] = []
    bad: list[BadBox] = []
    for index in order:
        row = listing.boxes[index]
        height, width = sizes[row.image]
        x0, y0, x1, y1 = _in_pixels(row.corners, width, height, listing.relative)
        cut = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
        shown = f"box {x0:.1f}, {y0:.1f}, {x1:.1f}, {y1:.1f} of '{row.name}'"
        if x1 <= x0 or y1 <= y0:
            bad.append(BadBox(row.image, row.where, f"{shown} has no area", "left out"))
            continue
        if cut[2] - cut[0] < SMALLEST or cut[3] - cut[1] < SMALLEST:
            outside = cut[2] <= cut[0] or cut[3] <= cut[1]
            reason = f"lies outside the image of {width} x {height}" if outside else "is less than a pixel wide or high"
            bad.append(BadBox(row.image, row.where, f"{shown} {reason}", "left out"))
            continue
        if min(x0, y0) < -TOLERANCE or x1 > width + TOLERANCE or y1 > height + TOLERANCE:
            bad.append(BadBox(row.image, row.where, f"{shown} reaches out of the image of {width} x {height}", "cut"))
        mask = _mask_in_pixels(row.mask, width, height, listing.relative, row.where)
        kept.append((row.image, cut, label_of[row.name], row.crowd, mask))
    if bad and on_bad_box == "error":
        first = "; ".join(f"{item.where}: {item.reason}" for item in bad[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{len(bad)} of {len(listing.boxes)} boxes do not fit: {first}{more}; mend them, or have them cut or left "
            "out with data.boxes.on_bad_box=mend"
        )
    return Boxes(
        np.array([item[0] for item in kept], dtype=np.int64),
        np.array([item[1] for item in kept], dtype=np.float32).reshape(-1, 4),
        np.array([item[2] for item in kept], dtype=np.int64),
        np.array([item[3] for item in kept], dtype=bool),
        [item[4] for item in kept],
        bad,
    )


def rasterize(mask: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Turn an outline into pixels.

    Args:
        mask: COCO polygons in pixels, or run lengths.
        size: (H, W) of the image.

    Returns:
        (H, W), True where the object is.

    Raises:
        MissingExtraError: If faster-coco-eval is not installed.
        DataError: If run lengths do not fit.
    """
    require("faster_coco_eval", "faster-coco-eval", "det", "an outline of an object")
    from faster_coco_eval.core import mask as coco_mask

    height, width = size
    try:
        packed = coco_mask.frPyObjects(mask, height, width)
        pixels = coco_mask.decode(packed if isinstance(mask, dict) else coco_mask.merge(packed))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"an outline cannot be turned into pixels: {error}") from None
    return np.asarray(pixels, dtype=bool)


def _in_pixels(corners: tuple[float, ...], width: int, height: int, relative: bool) -> tuple[float, ...]:
    """Corners in pixels."""
    if not relative:
        return corners
    x0, y0, x1, y1 = corners
    return x0 * width, y0 * height, x1 * width, y1 * height


def _mask_in_pixels(mask: Any, width: int, height: int, relative: bool, where: str) -> Any:
    """The outline in pixels, not far outside; run lengths must be of the image's size, and cover it exactly."""
    if isinstance(mask, dict):
        if list(mask["size"]) != [height, width]:
            raise DataError(f"{where}: the run lengths are for {mask['size']}, and the image is {[height, width]}")
        counts = _runs(mask["counts"], where)
        if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != height * width:
            raise DataError(f"{where}: the run lengths do not add up to {height} x {width} pixels")
        return {"size": [height, width], "counts": counts}
    if mask is None:
        return mask
    sides = (width, height)
    if relative:
        mask = [[value * sides[i % 2] for i, value in enumerate(polygon)] for polygon in mask]
    for polygon in mask:
        for i, value in enumerate(polygon):
            # Decoders walk along an outline point by point: one mistyped number would fill the memory.
            if not -sides[i % 2] <= value <= 2 * sides[i % 2]:
                raise DataError(
                    f"{where}: a point of the outline has {'xy'[i % 2]} = {value:g}, further outside the image of "
                    f"{width} x {height} than its own size; mend the number, or take the outline out"
                )
    return mask


def _runs(counts: str | list[int], where: str) -> list[int]:
    """Run lengths of COCO's packed text: 5 bits a character from '0' on, differences from the third run on.

    Unpacked here because the decoders do so in C without looking at the length.
    """
    if isinstance(counts, list):
        return counts
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise DataError(f"{where}: the run lengths are no text that COCO writes")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
