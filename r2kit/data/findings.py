"""What a check of data found, and the checks of what a row carries beside its image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from r2kit.data.sources import Source, Target

Kind = Literal[
    "files",
    "split",
    "duplicates",
    "near copies",
    "groups",
    "footprints",
    "flat images",
    "small classes",
    "imbalance",
    "drift",
    "masks",
    "classes",
    "boxes",
    "boxes twice",
]
"""Short name of what can be found."""


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know about the data."""

    kind: Kind
    untrue: bool
    """Whether a result on this data would not be true; otherwise a warning."""
    text: str
    """What was found, one line."""
    mend: str
    """What mends it, in words."""
    pairs: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """(N, M) rows of the manifest to look at, M of them together; of a leak, first the one that should give way."""
    change: str = ""
    """What mends it, as a change of the recipe (key.path=value items as a shell reads them) or as a whole command that
    begins with `r2kit `, with ``{data}`` for the data; `SPLIT_FILE` or `CLEAN_FILE` where the check writes the file;
    empty where nothing is known to mend it. A check of data always fills it, see `r2kit.data.mends`."""


SPLIT_FILE = "data.split_file={split}"
"""Stands for the split that a check writes: the same parts without the images that should give way."""
CLEAN_FILE = "data.split_file={clean}"
"""Stands for another one, which also leaves out what is only worth a warning: what shows nothing, shows the same again,
or is of doubtful class."""
STATS = "r2kit data stats {data}"
"""Shows the values of every band, and of masks."""
STATS_OF_PARTS = "r2kit data stats {data} --parts"
"""Shows them for each part."""

TargetCheck = Callable[[Source, np.ndarray], list[Finding]]
"""Reads the targets of rows of the manifest and says what is wrong with them: one finding for each kind of fault, with
the number of rows, one example by path, and all rows in `pairs` (N, 1)."""


def _check_boxes(source: Source, rows: np.ndarray) -> list[Finding]:
    """See `r2kit.data.boxes.checks.check_boxes`, which builds on this module."""
    from r2kit.data.boxes.checks import check_boxes

    return check_boxes(source, rows)


def _check_masks(source: Source, rows: np.ndarray) -> list[Finding]:
    """See `r2kit.data.mask_checks.check_masks`, which builds on this module."""
    from r2kit.data.mask_checks import check_masks

    return check_masks(source, rows)


TARGET_CHECKS: dict[Target, tuple[TargetCheck, ...]] = {
    "class": (),
    "classes": (),
    "mask": (_check_masks,),
    "boxes": (_check_boxes,),
    "outlines": (_check_boxes,),
}
"""What `r2kit data check` asks of each kind of target, beyond what it asks of every image."""
