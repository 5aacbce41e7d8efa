"""The report of a detection: figures from the stored boxes, and the boxes over their images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from r2kit import plots
from r2kit.data.datamodule import DataModule
from r2kit.draw import draw_comparison
from r2kit.errors import DataError
from r2kit.objects.coco import SIZE_WORDS
from r2kit.page import Chart, chart_of, template, thumbnail_of
from r2kit.plots import Tile
from r2kit.report.classification import commands_of, stored_result
from r2kit.report.evidence import counts_of, look_at_data
from r2kit.result.detection import read_objects, summary_lines
from r2kit.run import Run, write_atomic

_PICTURE = 720  # pixels of the longer side
_SEEN = 400  # of an image of a batch, and of one with its evidence: boxes are small in it
_SHOWN = 8  # images with boxes


def write_report(run: Run) -> Path:
    """Write the page of an evaluated run, see `r2kit.report.write_report`."""
    figures = stored_result(run, "map")
    table = run.read_table(run.predictions(figures["split"]))
    pictures, batch, gone, module = _pictures(run, figures, table)
    charts = _charts(run)
    explained, evidence_words = look_at_data(run, module, figures, charts)
    page = template("report_detection.html.j2").render(
        run=run,
        recipe=run.recipe,
        info=run.info,
        result=figures,
        lines=summary_lines(figures),
        sizes=SIZE_WORDS,
        counts=counts_of(run),
        gone=gone,
        charts=charts,
        batch=[thumbnail_of(tile, _SEEN) for tile in batch],
        pictures=[thumbnail_of(tile, _PICTURE) for tile in pictures],
        explained=[thumbnail_of(tile, _SEEN) for tile in explained],
        evidence_words=evidence_words,
        commands=commands_of(run),
    )
    write_atomic(run.report, page)
    return run.report


def _charts(run: Run) -> dict[str, Chart]:
    """Loss and average precision by epoch."""
    if not run.metrics_csv.is_file():
        return {}
    history, best = run.read_table(run.metrics_csv), run.info.get("best_epoch")
    alt = "Loss and average precision by epoch"
    return {"curves": chart_of(run, "curves", alt, lambda t: plots.learning_curves(history, best_epoch=best, theme=t))}


def _pictures(
    run: Run, figures: Any, table: pd.DataFrame
) -> tuple[list[Tile], list[Tile], str | None, DataModule | None]:
    """Images with their boxes, a training batch; why there are none where the images are gone; and the data."""
    try:
        module = run.datamodule()
        module.setup()
        batch = plots.batch_tiles(next(iter(module.train_dataloader())), module, epoch=0)
        tiles = _compared(module, figures, table, run.recipe.seed)
    except DataError as error:
        return [], [], str(error), None
    plots.save(plots.mosaic(batch, title="A training batch, as the network sees it"), run, "batch")
    plots.save(plots.mosaic(tiles, title="Held-out images", columns=2, cell=2.2), run, "predictions")
    return tiles, batch, None, module


def _compared(module: DataModule, figures: Any, table: pd.DataFrame, seed: int) -> list[Tile]:
    """The images with most mistakes, and as many drawn at random, with what was found and missed."""
    classes = figures["classes"]
    images, found, truth = read_objects(table, classes)
    threshold = 0.5 if figures["best_score"] is None else figures["best_score"]["score"]
    row_of = {identity: row for row, identity in enumerate(module.source.manifest["id"])}
    if missing := [identity for identity in images["id"] if identity not in row_of]:
        raise DataError(f"{missing[0]} is not in the data any more")
    tiles = []
    for index in range(len(images)):
        raw = module.source.read(row_of[images["id"].iloc[index]])
        drawn, count = draw_comparison(_visible(module, raw), found[index], truth[index], len(classes), threshold)
        said = f"{images['id'].iloc[index]}: {count['right']} right, {count['wrong']} wrong, {count['missed']} missed"
        tiles.append((count["wrong"] + count["missed"], Tile(drawn, said)))
    worst = sorted(range(len(tiles)), key=lambda i: (-tiles[i][0], i))[: _SHOWN // 2]
    rest = [i for i in range(len(tiles)) if i not in worst]
    drawn_rows = np.random.default_rng(seed).permutation(rest)[: _SHOWN - len(worst)]
    return [tiles[i][1] for i in [*worst, *sorted(int(i) for i in drawn_rows)]]


def _visible(module: DataModule, raw: Any) -> Any:
    """An image in its own size as a picture (H, W, 3)."""
    whole = replace(module.preprocess, resize="squash", size=raw.shape[:2])
    return plots.to_uint8(whole.denormalize(whole.apply(raw)).numpy())
