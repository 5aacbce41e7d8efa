"""What `r2kit data check` asks of boxes."""

from __future__ import annotations

import json
import shlex
from typing import cast

import numpy as np
from numpy.typing import NDArray

from r2kit.data.boxes.source import BoxedImages
from r2kit.data.findings import CLEAN_FILE, Finding, Kind
from r2kit.data.sources import Source

BAD_BOXES: Kind = "boxes"
"""Kind of the finding that `data.boxes.on_bad_box=mend` mends."""


def check_boxes(source: Source, rows: NDArray[np.int64]) -> list[Finding]:
    """Say what is wrong with boxes of some rows: outside their image, twice, in two classes; classes without any."""
    boxed = cast(BoxedImages, source)
    findings = []
    boxes = boxed.boxes
    bad = [box for box in boxed.bad_boxes if box.image in rows]
    if bad:
        cut = sum(box.mended == "cut" for box in bad)
        text = f"{cut} box(es) reach out of their image and {len(bad) - cut} lie outside or have no area, e.g. "
        mend = "mend the files, or data.boxes.on_bad_box=mend cuts them or leaves them out"
        images = _unique([box.image for box in bad])
        text += f"{bad[0].where}: {bad[0].reason}"
        findings.append(Finding(BAD_BOXES, True, text, mend, images, "data.boxes.on_bad_box=mend"))
    keys = np.column_stack([boxes.image, boxes.corners])
    _, first, count = np.unique(keys, axis=0, return_index=True, return_counts=True)
    same: list[int] = []
    other: list[int] = []
    for at in first[(count > 1) & np.isin(boxes.image[first], rows)]:
        twins = np.flatnonzero((keys == keys[at]).all(axis=1))
        (same if len(set(boxes.label[twins])) == 1 else other).append(int(at))
    for chosen, what in ((same, "are listed twice"), (other, "are listed with two classes")):
        if chosen:
            path = boxed.manifest["path"].iloc[int(boxes.image[chosen[0]])]
            corners = ", ".join(f"{value:g}" for value in boxes.corners[chosen[0]])
            text = f"{len(chosen)} box(es) {what}, e.g. {corners} in {path}"
            mend = "remove one of each, or leave the images out"
            images = _unique(boxes.image[chosen].tolist())
            findings.append(Finding("boxes twice", False, text, mend, images, CLEAN_FILE))
    counts = boxed.counts(rows)
    missing = [name for name, objects in zip(boxed.classes, counts, strict=True) if objects == 0]
    if missing:
        text = f"no object of class {', '.join(missing)}"
        mend = "leave them out of the class names, or add images"
        findings.append(Finding("classes", False, text, mend, change=_without(boxed)))
    return findings


def _without(boxed: BoxedImages) -> str:
    """The change of the recipe that leaves out the classes without any object; none where that cannot be.

    Where classes have numbers, those after them would get the wrong ones.
    """
    counts = boxed.counts(np.arange(len(boxed.manifest)))
    last = int(np.flatnonzero(counts)[-1])
    kept = boxed.classes[: last + 1] if boxed.numbered else [c for c, n in zip(boxed.classes, counts, strict=True) if n]
    if len(kept) == len(boxed.classes):
        return ""
    return shlex.quote(f"data.boxes.classes={json.dumps(list(kept), ensure_ascii=False)}")


def _unique(rows: list[int]) -> NDArray[np.int64]:
    """Rows (N, 1), each once."""
    return np.unique(np.array(rows, dtype=np.int64))[:, None]
