"""What lets a held-out image be known from training: the same pixels, the same group, the same piece of ground.

Everything here works on what the check of the files already found, so it costs milliseconds and every training does it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pandas as pd
import rasterio.warp
from scipy.spatial import cKDTree

from r2kit.data.findings import Finding, Kind
from r2kit.data.perceptual import near_copies
from r2kit.data.sources import Source
from r2kit.data.splits import PARTS, Split, distinct_pixels
from r2kit.data.stratify import absent, membership
from r2kit.errors import DataError

MIN_OVERLAP = 0.01
"""Share of the smaller footprint above which two count as overlapping; neighbouring tiles may share an edge."""
_MIN_OVERLAP_ACROSS = 0.25  # between coordinate systems: rectangles grow when they are turned into degrees
NEAR_LIMIT = 20_000
"""Images up to which every training looks for near copies between its parts; `r2kit data check` does for any number."""
_CHUNK = 512


def find_leaks(source: Source, split: Split, pixels: np.ndarray | None = None) -> list[Finding]:
    """Find training images that give away validation or test images, and validation images that give away test images.

    Args:
        source: The images.
        split: Their parts.
        pixels: (N,) hash of the pixels of each row, or None for an image that counts as a copy of no other; by default
            those of the source's files, if it has files.

    Returns:
        At most one finding each for pixels, groups and footprints; its `pairs` hold each image that gives something
        away once.
    """
    manifest = source.manifest
    rank = np.full(len(manifest), -1)
    for number, name in enumerate(PARTS):
        rank[split.rows(name)] = number
    mend = "leave the images out that give others away: data.on_leak=drop"
    found = []
    groups = manifest["group"].to_numpy(dtype=object)
    searches: list[tuple[Kind, str, np.ndarray]] = [("groups", "of the same group", _same(groups, rank))]
    if pixels is None and source.contents is not None:
        pixels = distinct_pixels(source.contents)
    if pixels is not None:
        searches.insert(0, ("duplicates", "with the same pixels", _same(pixels, rank)))
    if source.contents is not None:
        searches.append(("footprints", "on overlapping ground", _overlapping(source.contents, rank)))
    for kind, what, pairs in searches:
        if len(pairs):
            first, second = (manifest["path"].iloc[row] for row in pairs[0])
            parts = [PARTS[rank[row]] for row in pairs[0]]
            text = f"{len(pairs)} image(s) {what} in two parts, e.g. {first} ({parts[0]}) and {second} ({parts[1]})"
            found.append(Finding(kind, True, text, mend, pairs, change="data.on_leak=drop"))
    return found


def near_copies_between_parts(source: Source, split: Split) -> str | None:
    """Say how many images look like near copies of one in a higher part; None where none do, or it is not searched.

    Likeness is a reason to look, not a proof: training goes on. It is searched by what the check of the files left,
    among at most `NEAR_LIMIT` images.
    """
    rank = np.full(len(source.manifest), -1)
    for number, name in enumerate(PARTS):
        rank[split.rows(name)] = number
    if source.contents is None:
        return None
    hashed = np.flatnonzero((rank >= 0) & source.contents["low"].notna().to_numpy())
    if not 2 <= len(hashed) <= NEAR_LIMIT:
        return None
    lows = np.frombuffer(b"".join(source.contents["low"].iloc[hashed]), dtype=np.float16).astype(np.float32)
    pairs = hashed[near_copies(lows.reshape(-1, 8, 8))].reshape(-1, 2)
    pixels = source.contents["pixels"].to_numpy(dtype=object)
    pairs = pairs[(rank[pairs[:, 0]] != rank[pairs[:, 1]]) & (pixels[pairs[:, 0]] != pixels[pairs[:, 1]])]
    if not len(pairs):
        return None
    first, second = pairs[0][np.argsort(rank[pairs[0]])]
    path = source.manifest["path"]
    return (
        f"{len(pairs)} pair(s) of images in two parts look like near copies (turned, resized or compressed), e.g. "
        f"{path.iloc[first]} ({PARTS[rank[first]]}) and {path.iloc[second]} ({PARTS[rank[second]]}): r2kit data check "
        "shows them and writes a split without them"
    )


def without_leaks(split: Split, findings: list[Finding], manifest: pd.DataFrame, classes: tuple[str, ...]) -> Split:
    """Return the split without the images that give others away.

    Args:
        split: The parts.
        findings: What `find_leaks` found in it.
        manifest: Column label, or labels (see `stratify.membership`).
        classes: Class names; the labels are positions in it.

    Raises:
        DataError: If a class then has no image left in training or validation that it had before.
    """
    gone = np.unique(np.concatenate([finding.pairs[:, 0] for finding in findings]))
    held = membership(manifest, len(classes))
    kept = {name: np.setdiff1d(split.rows(name), gone) for name in PARTS}
    for name in ("train", "val"):
        lost = set(absent(held[kept[name]])) - set(absent(held[split.rows(name)]))
        if lost:
            raise DataError(
                f"data.on_leak=drop leaves no {name} image of '{classes[min(lost)]}'; divide the data anew with "
                "data.split=group or data.split=blocks"
            )
    count = sum(len(split.rows(name)) - len(kept[name]) for name in PARTS)
    kinds = ", ".join(finding.kind for finding in findings)
    note = f"{count} image(s) that give held-out images away were left out ({kinds})"
    return dataclasses.replace(
        split, train=kept["train"], val=kept["val"], test=kept["test"], warnings=(*split.warnings, note)
    )


def _same(key: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """(N, 2) rows: each image of a lower part whose key also comes in a higher part, and the first image there."""
    used = np.flatnonzero((rank >= 0) & ~pd.isna(key))
    if not len(used):
        return np.empty((0, 2), dtype=np.int64)
    code, _ = pd.factorize(key[used])
    highest = np.full(code.max() + 1, -1)
    np.maximum.at(highest, code, rank[used])
    holder = np.full(code.max() + 1, -1)
    for row, c in zip(used[::-1], code[::-1], strict=True):
        if rank[row] == highest[c]:
            holder[c] = row
    leaking = rank[used] < highest[code]
    return np.stack([used[leaking], holder[code[leaking]]], axis=1)


def _overlapping(contents: pd.DataFrame, rank: np.ndarray) -> np.ndarray:
    """(N, 2) rows: each image whose footprint overlaps one of a higher part, and one such image."""
    known = np.flatnonzero((rank >= 0) & contents["crs"].notna().to_numpy())
    if not len(known):
        return np.empty((0, 2), dtype=np.int64)
    crs = contents["crs"].to_numpy(dtype=object)
    boxes = np.stack([np.asarray(box, dtype=float) for box in contents["bounds"].iloc[known]])
    found: dict[int, int] = {}
    systems = sorted(set(crs[known]))
    for system in systems:
        here = crs[known] == system
        for a, b in _overlaps(boxes[here], rank[known[here]], MIN_OVERLAP):
            found.setdefault(int(known[here][a]), int(known[here][b]))
    if len(systems) > 1:
        degrees = [
            rasterio.warp.transform_bounds(c, "EPSG:4326", *box) for c, box in zip(crs[known], boxes, strict=True)
        ]
        system_of = pd.factorize(crs[known])[0]
        for a, b in _overlaps(np.array(degrees), rank[known], _MIN_OVERLAP_ACROSS, system_of):
            found.setdefault(int(known[a]), int(known[b]))
    return np.array(sorted(found.items()), dtype=np.int64).reshape(-1, 2)


def _overlaps(
    boxes: np.ndarray, rank: np.ndarray, share: float, system: np.ndarray | None = None
) -> Iterator[tuple[int, int]]:
    """Yield each box that overlaps one of a higher rank by a share of the smaller; with `system`, only of another."""
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    area = np.maximum(side.prod(axis=1), 1e-300)
    reach = np.maximum(side.max(axis=0), 1e-300)  # two boxes that touch have centres nearer than the largest side
    for lower in (0, 1):
        mine, others = np.flatnonzero(rank == lower), np.flatnonzero(rank > lower)
        if not len(mine) or not len(others):
            continue
        tree = cKDTree(centre[others] / reach)
        for start in range(0, len(mine), _CHUNK):
            rows = mine[start : start + _CHUNK]
            for row, near in zip(rows, tree.query_ball_point(centre[rows] / reach, 1.0, p=np.inf), strict=True):
                candidates = others[near]
                if system is not None:
                    candidates = candidates[system[candidates] != system[row]]
                low = np.maximum(boxes[candidates, :2], boxes[row, :2])
                high = np.minimum(boxes[candidates, 2:], boxes[row, 2:])
                common = np.maximum(high - low, 0.0).prod(axis=1)
                hits = candidates[common > share * np.minimum(area[candidates], area[row])]
                if len(hits):
                    yield int(row), int(hits[0])
