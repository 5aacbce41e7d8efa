"""What an export of less precision loses: the run's headline figure on its held-out images, beside PyTorch's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from r2kit.data.datamodule import DataModule
from r2kit.data.dense import known_mask
from r2kit.data.files import SEPARATOR
from r2kit.data.preprocess import Preprocess
from r2kit.data.targets import IGNORE
from r2kit.dense.metrics import confusion_counts
from r2kit.dense.saliency import f_curve
from r2kit.export.formats import Answer
from r2kit.inference import PixelClassifier
from r2kit.recipe import SaliencySpec, SegmentationSpec
from r2kit.result import PROBABILITY
from r2kit.result.paired import FIGURES, difference, judge, reported_split, stored_predictions
from r2kit.run import Run

MOST_IMAGES = 1000
"""Held-out images that the loss is measured on, spread over all of them."""
_BATCH = 8


@dataclass(frozen=True)
class Loss:
    """What an export loses.

    Attributes:
        figure: The headline figure of the task, in words.
        split: Of the run.
        images: Judged.
        pytorch: The figure of PyTorch in fp32.
        value: The export's figure minus that; below zero is a loss.
        low: Lower end of its 95 % interval, paired over the same images (or blocks of them).
        high: Upper end.
    """

    figure: str
    split: str
    images: int
    pytorch: float
    value: float
    low: float
    high: float

    def words(self) -> str:
        """The loss in points, as one phrase."""
        points, low, high = (100 * one for one in (self.value, self.low, self.high))
        return f"{points:+.1f} points ({low:+.1f} to {high:+.1f})"


def fixed_size(preprocess: Preprocess) -> Preprocess:
    """Return preprocessing whose images are of one size: where they are read in tiles, the centre is cut out."""
    return dataclasses.replace(preprocess, resize="crop") if preprocess.resize == "tile" else preprocess


def measure_losses(run: Run, module: DataModule, plain: Answer, answers: Mapping[str, Answer]) -> dict[str, Loss]:
    """Measure each export on the held-out images of the run, each read once.

    Args:
        run: A finished and evaluated run of a classification, a segmentation or of salient objects.
        module: Its data, set up.
        plain: PyTorch's own answers.
        answers: Those of the exports, by name.

    Raises:
        RunError: If the run is not evaluated.
        DataError: If an image cannot be read.
    """
    split = reported_split(run)
    rows = module.split.rows(split)
    if len(rows) > MOST_IMAGES:
        rows = rows[np.linspace(0, len(rows), MOST_IMAGES, endpoint=False).astype(int)]
    kind, task = run.recipe.task.kind, run.recipe.task
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in ("", *answers)}
    for first in range(0, len(rows), _BATCH):
        some = rows[first : first + _BATCH]
        raws = [module.source.read(int(row)) for row in some]
        truths = [_truth(kind, module, int(row), raw) for row, raw in zip(some, raws, strict=True)]
        for name, answer in (("", plain), *answers.items()):
            if isinstance(task, SegmentationSpec | SaliencySpec):
                for probs, truth in zip(_maps(answer, module.preprocess, task.overlap, raws), truths, strict=True):
                    tables[name].append(_row(run, probs[0], np.where(probs[1], truth, np.uint8(IGNORE))))
                continue
            found = answer(torch.stack([module.preprocess.fit(raw).float() for raw in raws]).numpy())
            tables[name] += [_row(run, probs, truth) for probs, truth in zip(found, truths, strict=True)]
    ids = module.source.manifest["id"].to_numpy(object)[rows]
    stored = stored_predictions(run)
    group = stored.set_index("id")["group"].reindex(ids).to_numpy(object)
    judged = {
        name: judge(kind, pd.DataFrame(table).assign(id=ids, group=group), run.preprocess.classes)
        for name, table in tables.items()
    }
    losses = {}
    for name in answers:
        lost, base = difference(judged[""], judged[name], seed=run.recipe.seed), judged[""].value
        losses[name] = Loss(FIGURES[kind], split, len(rows), base, lost.value, lost.low, lost.high)
    return losses


class _AsLogits(nn.Module):
    """An export's answers as a network of normalised images: what `PixelClassifier` puts together to whole images.

    Logarithms of probabilities differ from logits by one number for all classes of a pixel, which no mean over tiles
    and no resizing turns into a difference between classes.
    """

    def __init__(self, answer: Answer, preprocess: Preprocess) -> None:
        super().__init__()
        self.answer = answer
        self.mean, self.std = (
            torch.tensor(values)[:, None, None] * preprocess.scale for values in (preprocess.mean, preprocess.std)
        )

    def forward(self, batch: Tensor) -> Tensor:
        raw = batch * self.std + self.mean  # exports normalise by themselves; what is filled up is the mean
        found = torch.from_numpy(np.asarray(self.answer(raw.contiguous().numpy()), dtype=np.float32))
        return found.clamp_min(torch.finfo(torch.float32).tiny).log()


def _maps(
    answer: Answer, preprocess: Preprocess, overlap: float, raws: Sequence[NDArray[Any]]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Probabilities (K, H, W) of whole images, in tiles where the run has tiles, and where they were seen.

    It is the way in which a run is evaluated, so that the figure of PyTorch is that of `r2kit evaluate`.
    """
    whole = PixelClassifier(
        _AsLogits(answer, preprocess), preprocess, overlap, "cpu", channels_last=False, batch_size=_BATCH
    )
    return whole([preprocess.apply(raw) for raw in raws], [raw.shape[:2] for raw in raws])


def _truth(kind: str, module: DataModule, row: int, raw: NDArray[Any]) -> Any:
    """What an image is: its class, its labels, or its mask in the image's own pixels."""
    if kind == "classification":
        return int(module.labels[row])
    if kind == "multilabel":
        return np.flatnonzero(module.labels[row])
    mask = module.source.read_target(row).mask  # type: ignore[attr-defined]
    return known_mask(mask, raw, module.preprocess.nodata, module.remapped)


def _row(run: Run, probs: NDArray[np.float32], truth: Any) -> dict[str, Any]:
    """One row of a table of predictions, with the columns that `result.paired.judge` needs."""
    kind, classes = run.recipe.task.kind, run.preprocess.classes
    if kind == "classification":
        return {"label": classes[truth], "pred": classes[int(probs.argmax())]}
    if kind == "multilabel":
        shares = {f"{PROBABILITY}{name}": float(p) for name, p in zip(classes, probs, strict=True)}
        return {"label": SEPARATOR.join(classes[i] for i in truth), **shares}
    if kind == "saliency":
        known = truth != IGNORE
        there = truth[known] == 1
        everything = float(f_curve(np.ones(there.shape), there)[0])
        return {"f_curve": f_curve(probs[1][known].astype(np.float64), there).tolist(), "f_everything": everything}
    pred = torch.from_numpy(probs.argmax(0))[None]
    counted = confusion_counts(pred, torch.from_numpy(truth.astype(np.int64))[None], len(classes))
    return {"confusion": counted.ravel().tolist()}
