"""Evaluate images with several labels: their predictions, stored, and every figure from what was stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from r2kit.data.files import SEPARATOR
from r2kit.data.preprocess import Preprocess
from r2kit.evaluate.target import (
    other_target,
    own_target,
    refuse_failed,
    store,
    text_of,
    write_result,
)
from r2kit.inference import Classifier, load_images
from r2kit.recipe import MultilabelSpec
from r2kit.result import PROBABILITY, Result
from r2kit.result.multilabel import compute
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
    """Evaluate a run of several labels, see `r2kit.evaluate.evaluate`; figures as `result.multilabel.compute`."""
    target = own_target(run, split) if data is None else other_target(run, Path(data), split)
    task, classes, source = run.recipe.task, run.preprocess.classes, target.source
    assert isinstance(task, MultilabelSpec)
    classify = Classifier(run.model(), device, channels_last=run.recipe.train.channels_last, several=True, tta=tta)
    probs = []
    load: dict[str, Any] = {"workers": workers, "batch_size": batch_size, "start_method": source.start_method}
    for batch in load_images(source.read, target.rows.tolist(), _Prepare(run.preprocess), **load):
        refuse_failed(batch.failed)
        probs.append(classify(batch.tensors[0]))
    stacked = np.concatenate(probs)
    names = np.asarray(classes, dtype=object)
    manifest = source.manifest.iloc[target.rows]
    group = [None] * len(manifest) if target.group is None else [text_of(name) for name in target.group]
    table = pd.DataFrame(
        {
            "id": manifest["id"].to_numpy(object),
            "path": manifest["path"].to_numpy(object),
            "label": [SEPARATOR.join(names[row > 0.5]) for row in target.label],
            "pred": [SEPARATOR.join(names[row >= task.threshold]) for row in stacked],
        }
    )
    place = pd.DataFrame({"group": group, "lon": manifest["lon"].to_numpy(), "lat": manifest["lat"].to_numpy()})
    columns = pd.DataFrame(stacked, columns=[f"{PROBABILITY}{name}" for name in classes])
    table = pd.concat([table, columns, place], axis=1)

    named, stored = store(run, target, table, tta=tta)
    result = compute(
        stored,
        classes,
        split=target.name,
        threshold=task.threshold,
        seed=run.recipe.seed,
        group_word=target.group_word,
    )
    result |= {"predictions": run.predictions(named.name).name, "tta": tta}
    write_result(run, named, result)
    return result


@dataclass(frozen=True)
class _Prepare:
    """The network's input, as validation saw it."""

    preprocess: Preprocess

    def __call__(self, raw: NDArray[Any]) -> tuple[Tensor, ...]:
        return (self.preprocess.apply(raw),)
