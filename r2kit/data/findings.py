"""What a check of data found, and the checks of what a row carries beside its image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from r2kit.data.sources import Source, Target


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know about the data."""

    kind: str
    """Short name."""
    untrue: bool
    """Whether a result on this data would not be true; otherwise a warning."""
    text: str
    """What was found, one line."""
    mend: str
    """What mends it, in words."""
    pairs: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """(N, M) rows of the manifest to look at, M of them together; of a leak, first the one that should give way."""
    change: str = ""
    """The change of the recipe that mends it, as key.path=value items; `SPLIT_FILE` where the check writes the file."""


SPLIT_FILE = "data.split_file={split}"
"""Stands for the split that a check writes: the same parts without the images that should give way."""

TargetCheck = Callable[[Source], list[Finding]]
"""Reads the targets of all rows and says what is wrong with them: one finding for each kind of fault, with the number
of rows, one example by path, and all rows in `pairs` (N, 1)."""


def _check_boxes(source: Source) -> list[Finding]:
    """See `r2kit.data.boxes.checks.check_boxes`, which builds on this module."""
    from r2kit.data.boxes.checks import check_boxes

    return check_boxes(source)


TARGET_CHECKS: dict[Target, tuple[TargetCheck, ...]] = {
    "class": (),
    "classes": (),
    "mask": (),
    "boxes": (_check_boxes,),
    "outlines": (_check_boxes,),
}
"""What `r2kit data check` asks of each kind of target, beyond what it asks of every image."""
