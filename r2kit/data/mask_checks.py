"""What `r2kit data check` asks of masks that can be used.

Masks of another size than their image, or with a value that no class has, are among the files that cannot.
"""

from __future__ import annotations

import json
import shlex
from typing import cast

import numpy as np

from r2kit.data.findings import CLEAN_FILE, STATS, Finding
from r2kit.data.masks import MaskedImages
from r2kit.data.sources import DenseSource, Source

RARE = 0.001
"""Share of the labelled pixels below which a class is named: a network learns to leave such a class out."""


def check_masks(source: Source, rows: np.ndarray) -> list[Finding]:
    """Say what is wrong with the masks of some rows: none of their pixels has a class; classes without, or with few."""
    dense = cast(DenseSource, source)
    findings = []
    pixels = dense.pixels[rows]
    empty = rows[pixels.sum(axis=1) == 0]
    if len(empty):
        text = f"{len(empty)} mask(s) have no pixel with a class, e.g. that of {dense.manifest['path'].iloc[empty[0]]}"
        mend = "label them, or leave the images out: nothing is learned from them, and nothing measured"
        findings.append(Finding("masks", False, text, mend, empty[:, None], CLEAN_FILE))
    count = pixels.sum(axis=0)
    share = count / max(int(count.sum()), 1)
    missing = [name for name, of_class in zip(dense.classes, count, strict=True) if of_class == 0]
    if missing:
        text = f"no pixel of class {', '.join(missing)}"
        mend = "leave the class out, or look at the values that the masks hold: another one may be meant"
        findings.append(Finding("classes", False, text, mend, change=_without(source, missing)))
    rare = [i for i in np.argsort(share) if 0 < share[i] < RARE]
    if rare:
        each = ", ".join(f"'{dense.classes[i]}' {100 * share[i]:.2g} %" for i in rare[:3])
        text = f"{len(rare)} class(es) have less than {100 * RARE:g} % of the labelled pixels, e.g. {each}"
        mend = "trust the mean over the classes, not the accuracy of pixels; a loss that looks at overlap helps"
        holding = rows[pixels[:, rare[0]] > 0][:, None]
        findings.append(Finding("imbalance", False, text, mend, holding, "task.loss.dice=1"))
    return findings


def _without(source: Source, missing: list[str]) -> str:
    """The change of the recipe that leaves classes out, whose values then must not occur; else a look at the values."""
    meaning = source.meaning if isinstance(source, MaskedImages) else None
    if meaning is None or meaning.threshold is not None or meaning.colours:
        return STATS
    value = {meaning.classes[p]: int(v) for v, p in zip(meaning.values, meaning.positions, strict=True) if p < 255}
    kept = {name: v for name, v in value.items() if name not in missing}
    return shlex.quote(f"data.masks.classes={json.dumps(kept, ensure_ascii=False)}")  # JSON is YAML
