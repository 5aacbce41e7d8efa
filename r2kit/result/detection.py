"""The evaluated result of a detector: from stored boxes to figures, and from figures to plain sentences.

The table of objects is the only source of every figure. Its column ``kind`` says what a row is: ``image`` (one for each
image, also those without an object: ``id``, ``path``, ``height``, ``width``, ``group``, ``lon``, ``lat``), ``truth``
(an object: ``id``, ``class``, ``crowd``, the corners ``x0``, ``y0``, ``x1``, ``y1`` in pixels, ``mask``) or ``found``
(a detection: the same with ``score``). A mask is COCO's run lengths as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray

from r2kit import metrics
from r2kit.console import counted
from r2kit.objects import coco

Result = dict[str, Any]
"""The contents of metrics.json; see `compute`."""

REDRAWS = 500
"""Times the images are drawn anew for an interval."""
CORNERS = ["x0", "y0", "x1", "y1"]
_FIGURES = ("map", "map_50", "map_75")


def make_table(
    images: pd.DataFrame, found: Sequence[coco.Objects], truth: Sequence[coco.Objects], classes: Sequence[str]
) -> pd.DataFrame:
    """Put images, objects and detections into one table, see the module's docstring.

    Args:
        images: One row an image: id, path, height, width, group, lon, lat.
        found: Detections of each image.
        truth: Objects of each image; empty when nothing is known about them.
        classes: Class names; label 1 is the first.
    """
    rows = [images.assign(kind="image")]
    for kind, of_images in (("truth", truth), ("found", found)):
        for identity, objects in zip(images["id"], of_images, strict=bool(of_images)):
            rows.append(_objects_table(str(identity), kind, objects, classes))
    table = pd.concat([rows[0], *(part for part in rows[1:] if len(part))], ignore_index=True)
    for column, default in (("class", None), ("crowd", None), ("mask", None), ("score", np.nan)):
        if column not in table:
            table[column] = default
    return table.reindex(columns=[*dict.fromkeys([*table.columns, *CORNERS])])


def _objects_table(identity: str, kind: str, objects: coco.Objects, classes: Sequence[str]) -> pd.DataFrame:
    """One row for each object of an image."""
    frame = pd.DataFrame(np.asarray(objects["boxes"], dtype=np.float64).reshape(-1, 4), columns=CORNERS)
    frame.insert(0, "id", identity)
    frame["kind"] = kind
    frame["class"] = [classes[int(label) - 1] for label in objects["labels"]]
    if kind == "found":
        frame["score"] = np.asarray(objects["scores"], dtype=np.float64)
    else:
        frame["crowd"] = np.asarray(objects["crowd"]).astype(bool)
    if "masks" in objects:
        frame["mask"] = [mask["counts"] for mask in objects["masks"]]
    return frame


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table by the names of its columns."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def read_objects(table: pd.DataFrame, classes: Sequence[str]) -> tuple[pd.DataFrame, list[Any], list[Any]]:
    """Return the images, and the detections and objects of each, as `make_table` was given them."""
    label_of = {name: position + 1 for position, name in enumerate(classes)}
    images = table[table["kind"] == "image"].reset_index(drop=True)
    sides: list[list[Any]] = []
    for kind in ("found", "truth"):
        groups = dict(list(table[table["kind"] == kind].groupby("id", sort=False)))
        empty = table.iloc[:0]
        of_kind = []
        for row in rows_of(images):
            part = groups.get(row["id"], empty)
            objects: coco.Objects = {
                "boxes": part[CORNERS].to_numpy(np.float32),
                "labels": np.array([label_of[name] for name in part["class"]], dtype=np.int64),
            }
            if kind == "found":
                objects["scores"] = part["score"].to_numpy(np.float64)
            else:
                objects["crowd"] = part["crowd"].to_numpy(bool) if len(part) else np.zeros(0, dtype=bool)
            if part["mask"].notna().any() or not len(part):
                size = [int(row["height"]), int(row["width"])]
                objects["masks"] = [{"size": size, "counts": counts} for counts in part["mask"]]
            of_kind.append(objects)
        sides.append(of_kind)
    return images, sides[0], sides[1]


def compute(
    table: pd.DataFrame,
    classes: Sequence[str],
    *,
    split: str,
    outlines: bool = False,
    max_detections: int = 100,
    seed: int = 0,
    group_word: str = "spatial block",
) -> Result:
    """Compute every figure of a result from the table of objects.

    Args:
        table: See the module's docstring.
        classes: Class names.
        split: What the images are: ``test``, ``val``, or the name of another set.
        outlines: Whether masks were found: then all figures are of masks, and `boxes` holds those of the boxes.
        max_detections: Detections of one class in one image that count.
        seed: Seed of the bootstrap.
        group_word: What a person calls images that were held out together.

    Returns:
        JSON primitives. Intervals are `metrics.Interval.to_dict`; a figure that the data cannot give is None.
    """
    images, found, truth = read_objects(table, classes)
    group = images["group"].to_numpy(object) if images["group"].notna().any() else None
    figures = _figures(found, truth, len(classes), group, outlines, max_detections, seed)
    objects = np.bincount(
        np.concatenate([t["labels"][~t["crowd"]] for t in truth] or [np.zeros(0, np.int64)]).astype(np.int64),
        minlength=len(classes) + 1,
    )[1:]
    per_class = figures.pop("per_class")
    result: Result = {
        "task": "instance" if outlines else "detection",
        "split": split,
        "images": len(images),
        "empty_images": int(sum(not len(t["labels"]) for t in truth)),
        "objects": int(objects.sum()),
        "found": int(sum(len(f["labels"]) for f in found)),
        "groups": None if group is None else len(pd.unique(pd.Series(group).dropna())),
        "group_word": group_word,
        "classes": list(classes),
        "max_detections": max_detections,
        **figures,
        "per_class": [
            {"class": name, "objects": int(count), "map": _finite(value)}
            for name, count, value in zip(classes, objects, per_class, strict=True)
        ],
        "best_score": best_score(found, truth, len(classes), outlines, max_detections),
    }
    if outlines:
        result["boxes"] = _figures(found, truth, len(classes), group, False, max_detections, seed)
    return result


def _figures(
    found: Sequence[coco.Objects],
    truth: Sequence[coco.Objects],
    count: int,
    group: NDArray[np.object_] | None,
    outlines: bool,
    max_detections: int,
    seed: int,
) -> Result:
    """COCO's figures, those of all sizes with intervals."""
    figures = coco.average_precision(found, truth, count, outlines=outlines, max_detections=max_detections)
    matches = [
        coco.match(f, t, count, outlines=outlines, max_detections=max_detections)
        for f, t in zip(found, truth, strict=True)
    ]
    precision = coco.PrecisionOf(matches)
    memory: dict[bytes, NDArray[np.float64]] = {}  # the three figures are redrawn alike

    def of(column: int) -> metrics.Statistic:
        def statistic(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            sums = np.ascontiguousarray(sums)
            key = sums.tobytes()
            if key not in memory:
                memory[key] = precision(sums)
            return memory[key][:, column]

        return statistic

    once = scipy.sparse.csr_array(scipy.sparse.identity(len(found)))  # how often an image is drawn: once
    result: Result = {}
    for column, name in enumerate(_FIGURES):
        interval = metrics.bootstrap_interval(once, group, statistic=of(column), n=REDRAWS, seed=seed)
        result[name] = interval.to_dict()
    for name in ("map_small", "map_medium", "map_large", "recall"):
        result[name] = _finite(figures[name])
    result["objects_by_size"] = coco.count_sizes(truth, outlines=outlines)
    result["per_class"] = [_finite(value) for value in figures["per_class"]]
    return result


def best_score(
    found: Sequence[coco.Objects],
    truth: Sequence[coco.Objects],
    count: int,
    outlines: bool = False,
    max_detections: int = 100,
) -> Result | None:
    """Return the score from which on detections are best taken for objects, at an overlap of one half.

    Returns:
        `score`, and `precision`, `recall` and `f1` of the detections with at least that score; chosen on these very
        images by the largest F1. None where no detection is an object.
    """
    scores, right, objects = [], [], 0
    for ours, theirs in zip(found, truth, strict=True):
        for item in coco.match(ours, theirs, count, outlines=outlines, max_detections=max_detections):
            objects += item.objects
            counted = ~item.ignored[0]
            scores.append(item.scores[counted])
            right.append(item.right[0][counted])
    score, hit = np.concatenate(scores or [np.zeros(0)]), np.concatenate(right or [np.zeros(0, bool)])
    if not hit.any():
        return None
    order = np.argsort(-score, kind="mergesort")
    hits = hit[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + objects)
    last = np.append(np.diff(score[order]) != 0, True)  # all of one score are taken together
    best = int(np.argmax(np.where(last, f1, -1.0)))
    return {
        "score": float(score[order][best]),
        "precision": float(hits[best] / (best + 1)),
        "recall": float(hits[best] / objects),
        "f1": float(f1[best]),
    }


def summary_lines(result: Result) -> list[str]:
    """Say a result in plain sentences, one a line."""
    word = "masks" if result["task"] == "instance" else "boxes"
    objects = counted(result["objects"], "object")
    of = f"{result['split']} images: {result['images']}, {objects}, {result['found']} found"
    lines = [of, f"mean average precision of {word}: {_share(result['map'])}"]
    lines.append(f"  at an overlap of 0.5: {_share(result['map_50'])}; of 0.75: {_share(result['map_75'])}")
    counts = result.get("objects_by_size", {})  # which older results lack
    sizes = [
        f"{name} ({coco.SIZE_WORDS[name]}) {100 * result[f'map_{name}']:.1f} %"
        + (f" ({counts[name]})" if name in counts else "")
        for name in ("small", "medium", "large")
        if result[f"map_{name}"] is not None
    ]
    if sizes:
        lines.append(f"  by size: {', '.join(sizes)}")
    known = [row for row in result["per_class"] if row["map"] is not None]
    lines.append("  by class: " + ", ".join(f"{r['class']} {100 * r['map']:.1f} % ({r['objects']})" for r in known))
    best = result["best_score"]
    if best is not None:
        lines.append(
            f"  taking scores from {best['score']:.2f} on (the best of these images): precision "
            f"{100 * best['precision']:.1f} %, recall {100 * best['recall']:.1f} %"
        )
    if result["task"] == "instance":
        lines.append(f"mean average precision of boxes: {_share(result['boxes']['map'])}")
    note = result["map"].get("reason")
    if note:
        lines.append(f"  note: {note}")
    return lines


def _share(interval: dict[str, Any]) -> str:
    """A share with its interval in per cent."""
    if interval["value"] is None:
        return "not known (no object)"
    text = f"{100 * interval['value']:.1f} %"
    if interval["low"] is None:
        return text
    level = f"{100 * interval['level']:.0f} %"
    return f"{text} ({level} interval {100 * interval['low']:.1f} to {100 * interval['high']:.1f})"


def _finite(value: float) -> float | None:
    """The value, None where it is not known."""
    return None if value is None or not math.isfinite(value) else float(value)
