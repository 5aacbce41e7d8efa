"""Evaluate a segmentation: counts of pixels of every held-out image, stored, and every figure from what was stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from r2kit.data.dense import known_mask
from r2kit.data.preprocess import Preprocess, missing_pixels
from r2kit.data.sources import DenseSource
from r2kit.data.targets import IGNORE
from r2kit.dense.metrics import boundary_counts, confusion_counts
from r2kit.errors import DataError
from r2kit.evaluate.target import (
    Result,
    Target,
    other_target,
    own_target,
    refuse_failed,
    store,
    text_of,
    write_result,
)
from r2kit.inference import PixelClassifier, load_images
from r2kit.recipe import SegmentationSpec
from r2kit.result.segmentation import compute
from r2kit.run import Run

_TRAINING_PIXELS, _TRAINING_IMAGES = 20_000, 200  # of the logistic regression


def evaluate(
    run: Run, *, data: str | Path | None, split: str, batch_size: int, workers: int, device: str, tta: bool
) -> Result:
    """Evaluate a run of a segmentation, see `r2kit.evaluate.evaluate`; figures as `result.segmentation.compute`."""
    target = own_target(run, split) if data is None else other_target(run, Path(data), split)
    recipe, preprocess, spec = run.recipe, run.preprocess, run.recipe.task
    assert isinstance(spec, SegmentationSpec)
    classify = PixelClassifier(
        run.model(),
        preprocess,
        spec.overlap,
        device,
        channels_last=recipe.train.channels_last,
        batch_size=batch_size,
        tta=tta,
    )
    baselines, left_out = _baselines(run, target)
    classes = len(preprocess.classes)
    rows: list[dict[str, Any]] = []
    for pairs in batches(target, preprocess, batch_size, workers):
        images, raws, masks = zip(*pairs, strict=True)
        for raw, mask, (probs, seen) in zip(raws, masks, classify(images, [mask.shape for mask in masks]), strict=True):
            pred = probs.argmax(0)
            judged = np.where(seen, mask, np.uint8(IGNORE))
            row = {
                "confusion": _confusion(pred, judged, classes),
                "boundary": boundary_counts(pred, judged, classes, spec.boundary_tolerance).ravel().tolist(),
            }
            for name, answer in baselines.items():
                row[f"confusion_{name}"] = _confusion(answer(raw), judged, classes)
            rows.append(row)
    named, stored = store(run, target, table_of(target, rows), tta=tta)
    result = compute(
        stored,
        preprocess.classes,
        split=target.name,
        tolerance=spec.boundary_tolerance,
        seed=recipe.seed,
        group_word=target.group_word,
    )
    result["predictions"] = run.predictions(named.name).name
    result["tta"] = tta
    if left_out is not None:
        result["baselines_left_out"] = left_out
    write_result(run, named, result)
    return result


@dataclass(frozen=True)
class _Read:
    """An image and its mask by row; picklable for loader processes."""

    source: DenseSource
    nodata: float | None
    positions: NDArray[np.int64] | None

    def __call__(self, row: int) -> Any:
        raw = self.source.read(row)
        return raw, known_mask(self.source.read_target(row).mask, raw, self.nodata, self.positions)


@dataclass(frozen=True)
class _Prepare:
    """The network's input, the raw image and the mask."""

    preprocess: Preprocess

    def __call__(self, pair: Any) -> tuple[Tensor, ...]:
        raw, mask = pair
        return self.preprocess.apply(raw), _tensor(raw), _tensor(mask)


def _tensor(array: NDArray[Any]) -> Tensor:
    """An array as a tensor of its own; types that torch lacks as float64."""
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.float64)
    return torch.from_numpy(np.array(array))


Pair = tuple[Tensor, NDArray[Any], NDArray[np.uint8]]


def batches(target: Target, preprocess: Preprocess, batch_size: int, workers: int) -> Iterator[list[Pair]]:
    """Yield some images at a time: the network's input, the raw pixels, the mask."""
    source = cast(DenseSource, target.source)
    read, pending = _Read(source, preprocess.nodata, target.positions), []
    # One by one, because raw images differ in size.
    for loaded in load_images(
        read,
        target.rows.tolist(),
        _Prepare(preprocess),
        batch_size=1,
        workers=workers,
        start_method=source.start_method,
    ):
        refuse_failed(loaded.failed)
        image, raw, mask = loaded.tensors
        pending.append((image[0], raw[0].numpy(), mask[0].numpy()))
        if len(pending) == batch_size or preprocess.resize == "tile":
            yield pending
            pending = []
    if pending:
        yield pending


def _confusion(pred: NDArray[Any], mask: NDArray[np.uint8], classes: int) -> list[int]:
    """K * K pixels by true and predicted class."""
    given, truth = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64))[None] for part in (pred, mask))
    counted: list[int] = confusion_counts(given, truth, classes).ravel().tolist()
    return counted


def table_of(target: Target, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row an image: identity, what was counted, group, place."""
    manifest = target.source.manifest.iloc[target.rows]
    group = [None] * len(rows) if target.group is None else [text_of(g) for g in target.group]
    return pd.DataFrame(
        {
            "id": manifest["id"].to_numpy(object),
            "path": manifest["path"].to_numpy(object),
            **{name: [row[name] for row in rows] for name in rows[0]},
            "group": group,
            "lon": manifest["lon"].to_numpy(np.float64),
            "lat": manifest["lat"].to_numpy(np.float64),
        }
    )


class _Majority:
    """One class everywhere."""

    def __init__(self, label: int) -> None:
        self.label = label

    def __call__(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        return np.full(raw.shape[:2], self.label, dtype=np.int64)


class _Logistic:
    """The class that the bands of a single pixel speak for."""

    def __init__(self, pixels: NDArray[np.float64], label: NDArray[np.int64]) -> None:
        self.model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        with warnings.catch_warnings():
            # Separable classes can stop at the iteration limit; the answer is then as good as the optimum's.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(pixels, label)

    def __call__(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        pixels = np.nan_to_num(raw.reshape(-1, raw.shape[2]).astype(np.float64))
        found: NDArray[np.int64] = self.model.predict(pixels).reshape(raw.shape[:2])
        return found


def _baselines(run: Run, target: Target) -> tuple[dict[str, Any], str | None]:
    """What answers without a network, fitted on the run's training pixels; or why there is none."""
    try:
        module = run.datamodule() if target.module is None else target.module
        module.setup()
        source, rows = cast(DenseSource, module.source), module.split.train
        if rows.size == 0:
            return {}, "the run has no training images"
        chosen = rows[np.linspace(0, len(rows), min(len(rows), _TRAINING_IMAGES), endpoint=False).astype(int)]
        each, generator = -(-_TRAINING_PIXELS // len(chosen)), np.random.default_rng(run.recipe.seed)
        pixels, labels = [], []
        for row in chosen.tolist():
            raw = source.read(row)
            mask = known_mask(source.read_target(row).mask, raw, run.preprocess.nodata, module.remapped)
            missing = missing_pixels(raw, run.preprocess.nodata)
            usable = mask != IGNORE if missing is None else (mask != IGNORE) & ~missing.any(axis=2)
            at = np.flatnonzero(usable)
            at = generator.choice(at, min(each, at.size), replace=False)
            pixels.append(raw.reshape(-1, raw.shape[2])[at].astype(np.float64))
            labels.append(mask.ravel()[at].astype(np.int64))
    except DataError as error:
        if target.module is not None:
            raise
        return {}, f"the run's training images cannot be read ({error})"
    label = np.concatenate(labels)
    if label.size == 0:
        return {}, "no training pixel is labelled"
    majority = _Majority(int(module.pixel_shares()["train"].to_numpy().argmax()))
    if np.unique(label).size == 1:
        return {"majority": majority}, None
    return {"majority": majority, "logistic": _Logistic(np.concatenate(pixels), label)}, None
