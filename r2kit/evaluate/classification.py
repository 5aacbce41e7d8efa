"""Evaluate a classification: its predictions of held-out images, stored, and every figure from what was stored."""

from __future__ import annotations

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
from r2kit.data.preprocess import Preprocess
from r2kit.data.sources import Source
from r2kit.errors import DataError
from r2kit.evaluate.target import (
    Target,
    groups_of,
    other_target,
    own_target,
    refuse_failed,
    store,
    text_of,
    write_parquet,
    write_result,
)
from r2kit.inference import Classifier, load_images
from r2kit.result import PROBABILITY, Result, calibrate, compute
from r2kit.run import Run


def evaluate(
    run: Run,
    *,
    data: str | Path | None = None,
    split: str = "auto",
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    tta: bool = False,
) -> Result:
    """Evaluate a run of a classification, see `r2kit.evaluate.evaluate`; figures as `result.compute` gives them."""
    target = own_target(run, split) if data is None else other_target(run, Path(data), split)
    preprocess, source = run.preprocess, target.source
    load = {"workers": workers, "batch_size": batch_size, "start_method": source.start_method}
    classify = Classifier(run.model(), device, channels_last=run.recipe.train.channels_last, tta=tta)
    probs, features = _predict(source, target.rows, preprocess, classify, load)
    table = _table(source, target, preprocess.classes, probs)

    left_out = _add_baselines(table, run, target, features, load)
    named, stored = store(run, target, table, tta=tta)
    result = compute(stored, preprocess.classes, split=target.name, seed=run.recipe.seed, group_word=target.group_word)
    result["task"] = "classification"
    result["predictions"] = run.predictions(named.name).name
    result["tta"] = tta
    result["calibrated"] = calibrate(
        stored,
        _validation(run, target, classify, load, "val_tta" if tta else "val"),
        preprocess.classes,
        seed=run.recipe.seed,
    )
    if left_out is not None:
        result["baselines_left_out"] = left_out
    write_result(run, named, result)
    return result


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
        refuse_failed(batch.failed)
        image, statistics = batch.tensors
        probs.append(classify(image))
        features.append(statistics.numpy())
    return np.concatenate(probs), np.concatenate(features)


def _validation(run: Run, target: Target, classify: Classifier, load: dict[str, Any], name: str) -> pd.DataFrame | str:
    """The stored predictions of the run's validation images, made anew; or why there are none to calibrate on."""
    if target.name == "val":
        return "these are the validation images themselves; calibration is judged on others"
    try:
        module = run.datamodule() if target.module is None else target.module
        module.setup()
        source, rows = module.source, module.split.val
        if rows.size == 0:
            return "the run held out no validation images"
        own = Target("val", source, rows, module.labels[rows], *groups_of(run, source, rows), module)
        probs, _ = _predict(source, rows, run.preprocess, classify, {**load, "start_method": source.start_method})
    except DataError as error:
        if target.module is not None:
            raise
        return f"the run's validation images cannot be read ({error})"
    file = run.predictions(name)
    write_parquet(_table(source, own, run.preprocess.classes, probs), file)
    return pd.read_parquet(file)


def _table(source: Source, target: Target, classes: Sequence[str], probs: NDArray[np.float64]) -> pd.DataFrame:
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
            "group": [None] * len(table) if target.group is None else [text_of(g) for g in target.group],
            "lon": manifest["lon"].to_numpy(np.float64),
            "lat": manifest["lat"].to_numpy(np.float64),
        }
    )
    return pd.concat([table, columns, place], axis=1)


def _add_baselines(
    table: pd.DataFrame, run: Run, target: Target, features: NDArray[np.float64], load: dict[str, Any]
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
            refuse_failed(batch.failed)
            train.append(batch.tensors[0].numpy())
    except DataError as error:
        if target.module is not None:
            raise
        return f"the run's training images cannot be read ({error})"
    label = module.labels[rows]
    table["pred_majority"] = classes[majority_class(label, len(classes))]
    table["pred_logistic"] = classes[logistic_regression(np.concatenate(train), label, features)]
    return None
