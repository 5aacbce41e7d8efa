"""Evaluate a run: one pass of its network over held-out images, stored, and every figure from what was stored."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2kit.baselines import band_features, logistic_regression, majority_class
from r2kit.data.datamodule import DataModule
from r2kit.data.preprocess import Preprocess
from r2kit.data.sources import Source
from r2kit.data.splits import PARTS
from r2kit.errors import DataError, RunError, did_you_mean
from r2kit.inference import Classifier, load_images
from r2kit.recipe import DataSpec
from r2kit.result import PROBABILITY, Result, calibrate, compute, summary_lines
from r2kit.run import Run, write_atomic

__all__ = ["evaluate", "summary_lines"]


def evaluate(
    run: Run,
    *,
    data: str | Path | None = None,
    split: str = "auto",
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
) -> Result:
    """Run a run's network once over held-out images, store its predictions and the figures computed from them.

    The run's reported split (``test``, or ``val`` where no test images were held out) goes to `run.metrics_json`;
    anything else goes to a file of its own beside it, so that it never replaces the reported result.

    Args:
        run: A finished run.
        data: A folder of other images, one folder a class, every class one of the run's; None takes the run's own data.
        split: ``train``, ``val``, ``test``, or ``all`` for every image of `data`; ``auto`` is test where it exists,
            else val, else all.
        batch_size: Images at once; the result does not depend on it beyond the rounding of float32.
        workers: Processes that read images.
        device: See `inference.choose_device`.

    Returns:
        The contents of the written JSON file, see `result.compute`, with the name of the predictions' file.

    Raises:
        DataError: If images are missing or unreadable, or a class or the bands are not the run's.
        RunError: If the run holds no image of the split.
    """
    target = _own_target(run, split) if data is None else _other_target(run, Path(data), split)
    preprocess, source = run.preprocess, target.source
    load = {"workers": workers, "batch_size": batch_size, "start_method": source.start_method}
    classify = Classifier(run.model(), device, channels_last=run.recipe.train.channels_last)
    probs, features = _predict(source, target.rows, preprocess, classify, load)
    table = _table(source, target, preprocess.classes, probs)

    left_out = _add_baselines(table, run, target, features, load)
    _write_parquet(table, run.predictions(target.name))
    stored = pd.read_parquet(run.predictions(target.name))
    result = compute(stored, preprocess.classes, split=target.name, seed=run.recipe.seed, group_word=target.group_word)
    result["predictions"] = run.predictions(target.name).name
    result["calibrated"] = calibrate(
        stored, _validation(run, target, classify, load), preprocess.classes, seed=run.recipe.seed
    )
    if left_out is not None:
        result["baselines_left_out"] = left_out
    reported = data is None and target.name == _reported_split(run)
    file = run.metrics_json if reported else run.metrics_json.with_stem(f"{run.metrics_json.stem}_{target.name}")
    write_atomic(file, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


@dataclass(frozen=True)
class _Target:
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


def _reported_split(run: Run) -> str:
    """The split whose figures are the run's result: test where images were held out for it, else val."""
    splits = set(pd.read_parquet(run.split_file, columns=["split"])["split"].dropna())
    return "test" if "test" in splits else "val"


def _own_target(run: Run, split: str) -> _Target:
    """The rows of one split of the run's own data."""
    name = _reported_split(run) if split == "auto" else split
    if name not in PARTS:
        raise RunError(f"split: '{name}' is none of auto, train, val, test{did_you_mean(name, PARTS)}")
    module = run.datamodule()
    module.setup()
    source, rows = module.source, module.split.rows(name)
    if rows.size == 0:
        raise RunError(f"{run.path}: the run held out no {name} images; take --split val")
    group, word = _groups(run, source, rows)
    return _Target(name, source, rows, module.labels[rows], group, word, module)


def _groups(run: Run, source: Source, rows: NDArray[np.int64]) -> tuple[NDArray[np.object_] | None, str]:
    """What was held out together, and the word for it: spatial blocks where the split is by blocks, else groups."""
    held = pd.read_parquet(run.split_file)
    group = source.manifest["group"].to_numpy(object)[rows]
    word = "group"
    if run.info.get("split") in ("blocks", "file") and held["block"].notna().any():
        group = held.set_index("id")["block"].reindex(source.manifest["id"].iloc[rows]).to_numpy(object)
        word = "spatial block"
    return (None if pd.isna(group).all() else group), word


def _other_target(run: Run, folder: Path, split: str) -> _Target:
    """The rows of a folder that is not the run's own; the module checks its classes and bands against the run's."""
    recipe = run.recipe
    spec = DataSpec(
        root=str(folder), bands=run.preprocess.bands, image_size=recipe.data.image_size, resize=recipe.data.resize
    )
    module = DataModule(spec, recipe.augment, seed=recipe.seed, batch_size=64, preprocess=run.preprocess, all_test=True)
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
    return _Target(name, module.source, rows, module.labels[rows], groups, "group", None)


@dataclass(frozen=True)
class _Prepare:
    """From a raw image to what is asked of it: the network's input, the baseline's features, or both."""

    preprocess: Preprocess
    image: bool

    def __call__(self, raw: NDArray[Any]) -> tuple[Tensor, ...]:
        features = torch.from_numpy(band_features(raw, self.preprocess.nodata))
        return (self.preprocess.apply(raw), features) if self.image else (features,)


def _predict(
    source: Source, rows: NDArray[np.int64], preprocess: Preprocess, classify: Classifier, load: dict[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities (N, K) and baseline features (N, 2C) of rows, each image read once."""
    probs, features = [], []
    for batch in load_images(source.read, rows.tolist(), _Prepare(preprocess, image=True), **load):
        _refuse_failed(batch.failed)
        image, statistics = batch.tensors
        probs.append(classify(image))
        features.append(statistics.numpy())
    return np.concatenate(probs), np.concatenate(features)


def _validation(run: Run, target: _Target, classify: Classifier, load: dict[str, Any]) -> pd.DataFrame | str:
    """The stored predictions of the run's validation images, made anew; or why there are none to calibrate on."""
    if target.name == "val":
        return "these are the validation images themselves; calibration is judged on others"
    try:
        module = run.datamodule() if target.module is None else target.module
        module.setup()
        source, rows = module.source, module.split.val
        if rows.size == 0:
            return "the run held out no validation images"
        own = _Target("val", source, rows, module.labels[rows], *_groups(run, source, rows), module)
        probs, _ = _predict(source, rows, run.preprocess, classify, {**load, "start_method": source.start_method})
    except DataError as error:
        if target.module is not None:
            raise
        return f"the run's validation images cannot be read ({error})"
    file = run.predictions("val")
    _write_parquet(_table(source, own, run.preprocess.classes, probs), file)
    return pd.read_parquet(file)


def _refuse_failed(failed: Sequence[tuple[int, str]]) -> None:
    """Stop at an image that cannot be read: a figure over the others would be another figure."""
    if failed:
        raise DataError(failed[0][1])


def _table(source: Source, target: _Target, classes: Sequence[str], probs: NDArray[np.float64]) -> pd.DataFrame:
    """One row an image: identity, label, prediction, probabilities, group, place."""
    manifest = source.manifest.iloc[target.rows]
    names = np.asarray(classes, dtype=object)
    table = pd.DataFrame(
        {
            "id": manifest["id"].to_numpy(object),
            "path": manifest["path"].to_numpy(object),
            "label": names[target.label],
            "pred": names[probs.argmax(1)],
        }
    )
    columns = pd.DataFrame(probs, columns=[f"{PROBABILITY}{name}" for name in classes])
    place = pd.DataFrame(
        {
            "group": [None] * len(table) if target.group is None else [_text(g) for g in target.group],
            "lon": manifest["lon"].to_numpy(np.float64),
            "lat": manifest["lat"].to_numpy(np.float64),
        }
    )
    return pd.concat([table, columns, place], axis=1)


def _text(group: Any) -> str | None:
    """A group as text, None where there is none."""
    return None if group is None or pd.isna(group) else str(group)


def _add_baselines(
    table: pd.DataFrame, run: Run, target: _Target, features: NDArray[np.float64], load: dict[str, Any]
) -> str | None:
    """Add the baselines' answers, fitted on the run's training images; return why not where those are gone."""
    classes = np.asarray(run.preprocess.classes, dtype=object)
    train = []
    try:
        module = run.datamodule() if target.module is None else target.module
        module.setup()
        rows = module.split.train
        settings = {**load, "start_method": module.source.start_method}
        for batch in load_images(module.source.read, rows.tolist(), _Prepare(run.preprocess, image=False), **settings):
            _refuse_failed(batch.failed)
            train.append(batch.tensors[0].numpy())
    except DataError as error:
        if target.module is not None:
            raise
        return f"the run's training images cannot be read ({error})"
    label = module.labels[rows]
    table["pred_majority"] = classes[majority_class(label, len(classes))]
    table["pred_logistic"] = classes[logistic_regression(np.concatenate(train), label, features)]
    return None


def _write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table so that a reader sees the old one or the new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    table.to_parquet(draft, index=False)
    os.replace(draft, path)
