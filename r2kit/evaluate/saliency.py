"""Evaluate a task of salient objects: measures of every held-out image, stored, and every figure from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from r2kit.data.targets import IGNORE
from r2kit.dense.saliency import f_curve, measures
from r2kit.evaluate.segmentation import batches, table_of
from r2kit.evaluate.target import (
    Result,
    other_target,
    own_target,
    store,
    write_result,
)
from r2kit.inference import PixelClassifier
from r2kit.recipe import SaliencySpec
from r2kit.result.saliency import compute
from r2kit.run import Run


def evaluate(
    run: Run, *, data: str | Path | None, split: str, batch_size: int, workers: int, device: str, tta: bool
) -> Result:
    """Evaluate a run of salient objects, see `r2kit.evaluate.evaluate`; figures as `result.saliency.compute`."""
    target = own_target(run, split) if data is None else other_target(run, Path(data), split)
    recipe, preprocess, spec = run.recipe, run.preprocess, run.recipe.task
    assert isinstance(spec, SaliencySpec)
    classify = PixelClassifier(
        run.model(),
        preprocess,
        spec.overlap,
        device,
        channels_last=recipe.train.channels_last,
        batch_size=batch_size,
        tta=tta,
    )
    rows: list[dict[str, Any]] = []
    for pairs in batches(target, preprocess, batch_size, workers):
        images, _, masks = zip(*pairs, strict=True)
        for mask, (probs, seen) in zip(masks, classify(images, [mask.shape for mask in masks]), strict=True):
            judged = np.where(seen, mask, np.uint8(IGNORE))
            truth = judged[judged != IGNORE] == 1
            everything = float(f_curve(np.ones(truth.shape), truth)[0])
            rows.append({**measures(probs[1], judged), "f_everything": everything})
    named, stored = store(run, target, table_of(target, rows), tta=tta)
    result = compute(stored, split=target.name, seed=recipe.seed, group_word=target.group_word)
    result["predictions"] = run.predictions(named.name).name
    result["tta"] = tta
    write_result(run, named, result)
    return result
