"""Evaluate a detector: what it finds in held-out images, stored, and every figure from what was stored."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch

from r2kit.data.boxes.samples import BoxSamples
from r2kit.data.boxes.source import BoxedImages
from r2kit.data.loader import EpochSampler, make_loader
from r2kit.errors import require
from r2kit.evaluate.target import Target, other_target, own_target, text_of, write_parquet, write_result
from r2kit.finder import Finder, refuse_tta
from r2kit.objects.coco import Objects
from r2kit.objects.detectors import PIECES_AT_ONCE
from r2kit.result.detection import Result, compute, make_table
from r2kit.run import Run
from r2kit.tasks.detection import as_objects


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
    """Evaluate a run of a detection, see `r2kit.evaluate.evaluate`; figures as `result.detection.compute` gives them.

    Raises:
        RunError: With `tta`: boxes of turned images cannot be averaged.
        MissingExtraError: If what measures a detector is not installed.
    """
    refuse_tta(tta)
    require("faster_coco_eval", "faster-coco-eval", "det", "COCO's average precision")
    target = own_target(run, split) if data is None else other_target(run, Path(data), split)
    find = Finder(run, device, batch_size=min(batch_size, PIECES_AT_ONCE))
    found, truth = _find(run, target, find, workers)
    table = make_table(_images(target), found, truth, run.preprocess.classes)
    write_parquet(table, run.predictions(target.name))
    result = compute(
        pd.read_parquet(run.predictions(target.name)),
        run.preprocess.classes,
        split=target.name,
        outlines=run.recipe.task.kind == "instance",
        max_detections=run.recipe.objects.max_detections,
        seed=run.recipe.seed,
        group_word=target.group_word,
    )
    result["predictions"] = run.predictions(target.name).name
    write_result(run, target, result)
    return result


def _find(run: Run, target: Target, find: Finder, workers: int) -> tuple[list[Objects], list[Objects]]:
    """What is found and what is there, in each image."""
    source, classes = cast(BoxedImages, target.source), run.preprocess.classes
    positions = np.array([classes.index(name) for name in source.classes], dtype=np.int64)
    samples = BoxSamples(
        source,
        source.manifest["label"].to_numpy(dtype=np.int64),
        run.preprocess,
        None,
        run.recipe.data.boxes,
        run.recipe.seed,
        rows=target.rows,
        positions=positions,
    )
    sampler = EpochSampler(target.rows, train=False, seed=run.recipe.seed, batch_size=1)
    found: list[Objects] = []
    truth: list[Objects] = []
    loader = make_loader(samples, sampler, batch_size=1, workers=workers, start_method=source.start_method)
    waiting: list[dict] = []
    for batch in loader:  # one image a batch; several are found in together
        waiting.append(batch)
        if sum(len(item["image"]) for item in waiting) >= find.batch_size or len(found) + len(waiting) == len(sampler):
            pieces = [pieces for item in waiting for pieces in item["pieces"]]
            found += find(torch.cat([item["image"] for item in waiting]), pieces)
            truth += [as_objects(objects) for item in waiting for objects in item["truth"]]
            waiting = []
    return found, truth


def _images(target: Target) -> pd.DataFrame:
    """One row an image: identity, path, size, group, place."""
    manifest = target.source.manifest.iloc[target.rows]
    sizes = [cast(BoxedImages, target.source).sizes[row] for row in target.rows]
    return pd.DataFrame(
        {
            "id": manifest["id"].to_numpy(object),
            "path": manifest["path"].to_numpy(object),
            "height": [height for height, _ in sizes],
            "width": [width for _, width in sizes],
            "group": [None] * len(manifest) if target.group is None else [text_of(g) for g in target.group],
            "lon": manifest["lon"].to_numpy(np.float64),
            "lat": manifest["lat"].to_numpy(np.float64),
        }
    )
