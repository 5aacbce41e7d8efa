"""What is evaluated, and how its tables and figures are written: the same for every kind of task."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from r2kit.data.datamodule import DataModule
from r2kit.data.sources import Source
from r2kit.data.splits import PARTS, distinct_pixels
from r2kit.errors import DataError, RunError, did_you_mean
from r2kit.recipe import DataSpec
from r2kit.run import Run, write_atomic

Result = dict[str, Any]
"""The contents of metrics.json."""


@dataclass(frozen=True)
class Target:
    """What is evaluated: rows of a source, their labels in the run's order of classes, and their groups."""

    name: str
    source: Source
    rows: NDArray[np.int64]
    label: NDArray[np.int64]
    group: NDArray[np.object_] | None
    group_word: str
    """What a person calls such a group."""
    module: DataModule | None
    """The run's own data; None where other data is evaluated."""
    positions: NDArray[np.int64] | None = None
    """(K,) the run's position of each class of the source, for masks; None where they are the same."""


def reported_split(run: Run) -> str:
    """Return the split whose figures are the run's result: test where images were held out for it, else val."""
    splits = set(run.read_table(run.split_file, ["split"])["split"].dropna())
    return "test" if "test" in splits else "val"


def own_target(run: Run, split: str) -> Target:
    """Return the rows of one split of the run's own data.

    Raises:
        RunError: If the run holds no image of the split.
    """
    name = reported_split(run) if split == "auto" else split
    if name not in PARTS:
        raise RunError(f"split: '{name}' is none of auto, train, val, test{did_you_mean(name, PARTS)}")
    module = run.datamodule()
    module.setup()
    source, rows = module.source, module.split.rows(name)
    if rows.size == 0:
        raise RunError(f"{run.path}: the run held out no {name} images; take --split val")
    group, word = groups_of(run, source, rows)
    return Target(name, source, rows, module.labels[rows], group, word, module, module.remapped)


def groups_of(run: Run, source: Source, rows: NDArray[np.int64]) -> tuple[NDArray[np.object_] | None, str]:
    """Return what was held out together, and the word for it: spatial blocks of a split by blocks, else groups."""
    held = run.read_table(run.split_file)
    group = source.manifest["group"].to_numpy(object)[rows]
    word = "group"
    if run.info.get("split") in ("blocks", "file") and held["block"].notna().any():
        group = held.set_index("id")["block"].reindex(source.manifest["id"].iloc[rows]).to_numpy(object)
        word = "spatial block"
    return (None if pd.isna(group).all() else group), word


def other_target(run: Run, folder: Path, split: str) -> Target:
    """Return the rows of data that is not the run's own; its classes and bands are checked against the run's.

    Raises:
        DataError: If the data cannot be used, or has no such split.
    """
    recipe = run.recipe
    spec = DataSpec(
        root=str(folder),
        bands=run.preprocess.bands,
        band_files=recipe.data.band_files,
        image_size=recipe.data.image_size,
        resize=recipe.data.resize,
        masks=recipe.data.masks,
        boxes=recipe.data.boxes,
    )
    module = DataModule(
        spec,
        recipe.augment,
        seed=recipe.seed,
        batch_size=64,
        preprocess=run.preprocess,
        all_test=True,
        target=recipe.target,
    )
    module.setup()
    manifest = module.source.manifest
    present = set(manifest["split"].dropna())
    chosen = next((name for name in ("test", "val") if name in present), "all") if split == "auto" else split
    if chosen != "all" and chosen not in present:
        held = ", ".join(sorted(present)) or "all images together"
        raise DataError(f"{folder}: has no split '{chosen}', only {held}")
    rows = np.arange(len(manifest)) if chosen == "all" else np.flatnonzero(manifest["split"] == chosen)
    group = manifest["group"].to_numpy(object)[rows]
    name = folder.resolve().name if chosen == "all" else f"{folder.resolve().name}_{chosen}"
    if name in PARTS:
        name = f"data_{name}"  # never the name of one of the run's own splits
    groups = None if pd.isna(group).all() else group
    return Target(name, module.source, rows, module.labels[rows], groups, "group", None, module.remapped)


def refuse_failed(failed: Sequence[tuple[int, str]]) -> None:
    """Stop at an image that cannot be read: a figure over the others would be another figure."""
    if failed:
        raise DataError(failed[0][1])


def text_of(group: Any) -> str | None:
    """Return a group as text, None where there is none."""
    return None if group is None or pd.isna(group) else str(group)


def store(run: Run, target: Target, table: pd.DataFrame, *, tta: bool) -> tuple[Target, pd.DataFrame]:
    """Store the table of an evaluation, and read back what is stored.

    Test-time averaging goes to files of its own, never in place of the reported result.

    Returns:
        The target under the name of those files, for `write_result`; the stored table.
    """
    named = replace(target, name=f"{target.name}_tta") if tta else target
    write_parquet(table, run.predictions(named.name))
    return named, pd.read_parquet(run.predictions(named.name))


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table so that a reader sees the old one or the new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    table.to_parquet(draft, index=False)
    os.replace(draft, path)


def known_to(run: Run, target: Target) -> Result:
    """Count the images of other data that the run knows from its training: by their pixels, or by their paths.

    Paths stand in where the run holds no hashes of pixels, as those of earlier versions do, or images are no files.

    Returns:
        `images`: evaluated; `train`: learned from; `val`: used to choose the epoch.
    """
    held = run.read_table(run.split_file)
    manifest = target.source.manifest.iloc[target.rows]
    if "pixels" in held and held["pixels"].notna().any() and target.source.contents is not None:
        known, key = held["pixels"], pd.Series(distinct_pixels(target.source.contents)[target.rows])
    else:
        root = Path(run.recipe.data.root or ".")
        folder = root if root.is_dir() else root.parent
        known = held["id"].map(lambda identity: str((folder / str(identity)).resolve()))
        key = manifest["path"].map(lambda path: str(Path(path).resolve()))
    found = {"images": len(manifest)}
    for part in ("train", "val"):
        found[part] = int(key.isin(set(known[held["split"] == part].dropna())).sum())
    return found


def known_line(found: Result) -> str | None:
    """Return the warning about images that the run knows from its training, None where there are none."""
    known = found.get("known")
    if not known or known["train"] + known["val"] == 0:
        return None
    words = (("train", "were trained on by this run"), ("val", "chose its best epoch"))
    said = " and ".join(f"{known[part]} {what}" for part, what in words if known[part])
    return f"of these {known['images']} images {said}: the figures are better than on images that it never saw"


def write_result(run: Run, target: Target, result: Result) -> None:
    """Write figures as JSON: those of the reported split to `run.metrics_json`, others to a file beside it.

    Of other data than the run's, `result` also gets `known`, see `known_to`.
    """
    if target.module is None:
        result["known"] = known_to(run, target)
    reported = target.module is not None and target.name == reported_split(run)
    file = run.metrics_json if reported else run.metrics_json.with_stem(f"{run.metrics_json.stem}_{target.name}")
    write_atomic(file, json.dumps(result, indent=2, allow_nan=False) + "\n")
