"""What a file of boxes says, before any image is opened: the one form that every reader gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r2kit.errors import DataError, did_you_mean


@dataclass(frozen=True)
class ImageRow:
    """One image that a file of boxes names."""

    path: Path
    part: str | None = None
    """train, val or test where the layout says so, else None."""
    size: tuple[int, int] | None = None
    """(H, W) as the file declares it, None where it does not."""
    where: str = ""
    """File and line that name it, for messages."""


@dataclass(frozen=True)
class BoxRow:
    """One box, as written."""

    image: int
    """Position of its image in `BoxListing.images`."""
    corners: tuple[float, float, float, float]
    """x0, y0, x1, y1 of the box's edges; in pixels, or in shares of the image where `BoxListing.relative`."""
    name: str
    """Its class."""
    where: str
    """File and line, for messages."""
    crowd: bool = False
    """Whether it marks a group of objects that were not separated."""
    mask: Any = None
    """COCO polygons (list of flat x, y lists) or run lengths (dict), None where there is no outline."""


@dataclass(frozen=True)
class BoxListing:
    """Every image and box of a data set, as written."""

    name: str
    """What data.root names, for messages."""
    root: Path
    """Folder that the ids of the images are relative to."""
    images: list[ImageRow]
    boxes: list[BoxRow]
    classes: tuple[str, ...]
    """Class names; a label is a position in it, plus one (zero is the background)."""
    relative: bool = False
    """Whether corners are shares of the image's width and height."""
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of each image that is named but not there."""


def number(text: Any, where: str, what: str) -> float:
    """A finite number.

    Args:
        text: Text, or a number as JSON gives it.
        where: File and line.
        what: What it should be, for the message.

    Raises:
        DataError: If it is none.
    """
    try:
        value = float(text) if not isinstance(text, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {what} is {text!r}; a finite number is needed")
    return value


def check_class(name: str, classes: Sequence[str], where: str) -> str:
    """Return the name of a class that is known.

    Raises:
        DataError: If it is not among `classes`.
    """
    if name not in classes:
        raise DataError(
            f"{where}: class '{name}' is not one of {', '.join(classes)}{did_you_mean(name, classes)}; add it to "
            "data.boxes.classes or mend the file"
        )
    return name


def check_classes(classes: Sequence[str], where: str) -> tuple[str, ...]:
    """Return class names that can be told apart.

    Raises:
        DataError: If there is none, one is empty, or one comes twice.
    """
    names = tuple(classes)
    if not names:
        raise DataError(f"{where}: names no class")
    for name in names:
        if not name.strip():
            raise DataError(f"{where}: a class has an empty name")
        if names.count(name) > 1:
            raise DataError(f"{where}: class '{name}' is listed twice")
    return names


def inside(root: Path, named: str, where: str) -> Path:
    """Resolve a file name that an annotation gives, which must not leave the data's folder.

    Raises:
        DataError: If the name is empty, absolute, or climbs out by `..`.
    """
    written = named.replace("\\", "/")
    path = Path(written)
    odd = "\0" in written or len(written) > 4096
    if odd or not written.strip() or path.is_absolute() or ".." in path.parts or ":" in written[:2]:
        named = named if len(named) <= 200 else f"{named[:200]}..."
        raise DataError(f"{where}: image '{named}' is no path inside {root}")
    return root / path


def read_text(path: Path) -> str:
    """Read a UTF-8 text file; a byte order mark is left out.

    Raises:
        DataError: If it cannot be read or is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{did_you_mean(path.name, near)}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
