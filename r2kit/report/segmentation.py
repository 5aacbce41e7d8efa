"""The report of a segmentation: figures from the stored counts, and pictures of masks beside the truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from r2kit import plots
from r2kit.data.datamodule import DataModule
from r2kit.data.dense import known_mask
from r2kit.data.sources import DenseSource
from r2kit.data.stacks import name_of
from r2kit.data.targets import CLASS_COLOURS, IGNORE
from r2kit.dense.metrics import mean_iou
from r2kit.errors import DataError, MissingExtraError, RunError
from r2kit.inference import PixelClassifier
from r2kit.page import Chart, chart_of, template, thumbnail_of
from r2kit.plots import Tile
from r2kit.recipe import SegmentationSpec
from r2kit.report.classification import commands_of, stored_result
from r2kit.report.evidence import evidence_tiles
from r2kit.report.places import map_charts, places_of, whole_blocks_of
from r2kit.result import Result, interval_words, percent
from r2kit.result import segmentation as sentences
from r2kit.run import Run, write_atomic

_SHOWN = 6  # images: the worst, and some at random


@dataclass(frozen=True)
class _Pictures:
    """What needs the images: a training batch, and rows of image, truth, prediction, mistakes."""

    module: DataModule
    batch: list[Tile]
    worst: list[Tile]
    others: list[Tile]
    explained: list[Tile]
    evidence_words: str


def write_report(run: Run) -> Path:
    """Write the page of a segmentation, see `r2kit.report.write_report`."""
    figures = stored_result(run, "miou")
    table = _stored_counts(run, figures)
    pictures, gone = _pictures(run, figures, table)
    confusion, classes = np.asarray(figures["confusion"]), figures["classes"]
    charts: dict[str, Chart] = {
        "confusion": chart_of(
            run, "confusion", "Confusion matrix", lambda t: plots.confusion_figure(confusion, classes, theme=t)
        ),
        "iou": chart_of(run, "iou", "IoU of each class", lambda t: plots.iou_figure(figures["per_class"], theme=t)),
    }
    if run.metrics_csv.is_file():
        history, best = run.read_table(run.metrics_csv), run.info.get("best_epoch")
        charts["curves"] = chart_of(
            run,
            "curves",
            "Loss and pixel accuracy by epoch",
            lambda t: plots.learning_curves(history, best_epoch=best, theme=t),
        )
    charts |= map_charts(run, None if pictures is None else places_of(pictures.module))
    if pictures is not None:
        for name, tiles, title in (
            ("batch", pictures.batch, "A training batch, as the network sees it"),
            ("predictions", pictures.worst + pictures.others, "Image, truth, prediction, mistakes"),
        ):
            if tiles:
                plots.save(plots.mosaic(tiles, title=title, columns=4), run, name)
    page = template("segmentation.html.j2").render(
        run=run,
        recipe=run.recipe,
        info=run.info,
        result=figures,
        sentences=sentences,
        percent=percent,
        interval_words=interval_words,
        charts=charts,
        gone=gone,
        legend=[(name, _hex(i)) for i, name in enumerate(classes)],
        counts=None if pictures is None else _counts(pictures.module),
        whole_blocks=pictures is not None and whole_blocks_of(pictures.module),
        batch=[] if pictures is None else [thumbnail_of(tile) for tile in pictures.batch],
        worst=[] if pictures is None else [thumbnail_of(tile) for tile in pictures.worst],
        others=[] if pictures is None else [thumbnail_of(tile) for tile in pictures.others],
        explained=[] if pictures is None else [thumbnail_of(tile) for tile in pictures.explained],
        evidence_words="the images cannot be read" if pictures is None else pictures.evidence_words,
        commands=commands_of(run),
    )
    write_atomic(run.report, page)
    return run.report


def _hex(position: int) -> str:
    """The colour of a class for a style sheet."""
    return "#" + bytes(CLASS_COLOURS[position % len(CLASS_COLOURS)]).hex()


def _stored_counts(run: Run, figures: Result) -> pd.DataFrame:
    """The stored counts, which must be those that the figures were computed from."""
    file = run.predictions(figures["split"])
    try:
        table = pd.read_parquet(file)
        count = len(figures["classes"])
        found = sentences.counts(table, "confusion", (count, count)).sum(0)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{file}: cannot be read: {error}; run r2kit evaluate {run.path}") from None
    if found.tolist() != figures["confusion"]:
        raise RunError(f"{run.path}: metrics.json and {file.name} do not agree; run r2kit evaluate {run.path}")
    return table


def _counts(module: DataModule) -> dict[str, Any]:
    """Images of each part, and shares of the labelled pixels by class."""
    shares = module.pixel_shares()
    return {
        "columns": list(shares.columns),
        "images": [len(module.split.rows(part)) for part in shares.columns],
        "rows": [(str(name), [percent(value) for value in row]) for name, *row in shares.itertuples()],
    }


def _pictures(run: Run, figures: Result, table: pd.DataFrame) -> tuple[_Pictures | None, str | None]:
    """What needs the images, or why there is none."""
    try:
        module = run.datamodule()
        module.setup()
        rows = pd.Series(np.arange(len(module.source.manifest)), index=module.source.manifest["id"]).reindex(
            table["id"]
        )
        if rows.isna().any():
            return None, "the images of the stored counts are not in the data any more"
        count = len(figures["classes"])
        each = mean_iou(sentences.counts(table, "confusion", (count, count)))
        placed = table.assign(row=rows.to_numpy(np.int64), miou=each).dropna(subset="miou")
        worst = placed.sort_values(["miou", "id"]).head(_SHOWN)
        rest = placed.drop(worst.index)
        rest = rest.sample(min(_SHOWN, len(rest)), random_state=run.recipe.seed).sort_index()
        batch = next(iter(module.loader(module.split.train, train=True)))
        tiles = plots.batch_tiles(batch, module, epoch=0)
        explained = evidence_tiles(run, module, figures)
        return _Pictures(module, tiles, _tiles(run, module, worst), _tiles(run, module, rest), *explained), None
    except (DataError, MissingExtraError) as error:
        return None, str(error)


def _tiles(run: Run, module: DataModule, rows: pd.DataFrame) -> list[Tile]:
    """Four pictures of each image: itself, its mask, the predicted mask, where they differ."""
    spec, preprocess = run.recipe.task, run.preprocess
    assert isinstance(spec, SegmentationSpec)
    if rows.empty:
        return []
    classify = PixelClassifier(run.model(), preprocess, spec.overlap, channels_last=run.recipe.train.channels_last)
    source, tiles = cast(DenseSource, module.source), []
    for row in rows.itertuples():
        number = int(row.row)  # type: ignore[arg-type]
        raw = source.read(number)
        truth = known_mask(source.read_target(number).mask, raw, preprocess.nodata, module.remapped)
        (probs, seen) = next(classify([preprocess.apply(raw)], [truth.shape]))
        pred = np.where(seen, probs.argmax(0), IGNORE)
        picture = visible(module, raw)
        wrong = np.where(truth == IGNORE, IGNORE, (pred != truth).astype(np.int64))
        name = name_of(Path(str(row.path))).name
        tiles += [
            Tile(picture, f"{name}, mean IoU {percent(float(row.miou))}"),  # type: ignore[arg-type]
            Tile(plots.paint(picture, truth), "truth"),
            Tile(plots.paint(picture, pred), "prediction"),
            Tile(mistakes(picture, wrong), f"wrong {percent(float((wrong == 1).mean()))}"),
        ]
    return tiles


def visible(module: DataModule, raw: np.ndarray) -> np.ndarray:
    """Return a raw image (H, W, C) as (H, W, 3) uint8, in its own size."""
    whole = replace(module.preprocess, resize="tile")
    return plots.to_uint8(whole.denormalize(whole.apply(raw)).numpy())


def mistakes(picture: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return a picture in grey with wrong pixels in red.

    Args:
        picture: (H, W, 3) uint8.
        wrong: (H, W), 1 where wrong, 0 where right, `IGNORE` where nothing is known.
    """
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.7
    grey[wrong == 1] = (225, 40, 40)
    return grey.astype(np.uint8)
