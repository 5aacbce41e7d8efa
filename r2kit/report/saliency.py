"""The report of a task of salient objects: the measures, and pictures of maps beside the truth."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from r2kit import plots
from r2kit.data.datamodule import DataModule
from r2kit.data.dense import known_mask
from r2kit.data.sources import DenseSource
from r2kit.data.targets import IGNORE
from r2kit.errors import DataError, MissingExtraError, RunError
from r2kit.inference import PixelClassifier
from r2kit.page import Chart, chart_of, template, thumbnail_of
from r2kit.plots import Tile
from r2kit.recipe import SaliencySpec
from r2kit.report.classification import commands_of, stored_result
from r2kit.report.evidence import counts_of, look_at_data
from r2kit.report.segmentation import visible
from r2kit.result import interval_words, percent
from r2kit.result import saliency as sentences
from r2kit.run import Run, write_atomic

_SHOWN = 8  # images


def write_report(run: Run) -> Path:
    """Write the page of a run of salient objects, see `r2kit.report.write_report`."""
    figures = stored_result(run, "max_f")
    file = run.predictions(figures["split"])
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read: {error}; run r2kit evaluate {run.path}") from None
    charts: dict[str, Chart] = {}
    if run.metrics_csv.is_file():
        history, best = run.read_table(run.metrics_csv), run.info.get("best_epoch")
        charts["curves"] = chart_of(
            run,
            "curves",
            "Loss and F-measure by epoch",
            lambda t: plots.learning_curves(history, best_epoch=best, theme=t),
        )
    tiles, batch, gone, module = _pictures(run, table)
    explained, evidence_words = look_at_data(run, module, figures, charts)
    if tiles:
        plots.save(plots.mosaic(tiles, title="Image, truth, prediction", columns=3), run, "predictions")
    rows = [
        ("largest F-measure", figures["max_f"]),
        ("weighted F-measure", figures["weighted_f"]),
        ("S-measure", figures["s_measure"]),
        ("largest E-measure", figures["max_e"]),
        ("mean absolute error", figures["mae"]),
    ]
    page = template("saliency.html.j2").render(
        run=run,
        recipe=run.recipe,
        info=run.info,
        result=figures,
        sentences=sentences,
        rows=[(name, percent(value["value"]), interval_words(value)) for name, value in rows],
        charts=charts,
        gone=gone,
        pictures=[thumbnail_of(tile) for tile in tiles],
        batch=[thumbnail_of(tile) for tile in batch],
        counts=counts_of(run),
        explained=[thumbnail_of(tile) for tile in explained],
        evidence_words=evidence_words,
        commands=commands_of(run),
    )
    write_atomic(run.report, page)
    return run.report


def _pictures(run: Run, table: pd.DataFrame) -> tuple[list[Tile], list[Tile], str | None, DataModule | None]:
    """Image, truth and map of the weakest and some other images, a batch; why there are none; and the data."""
    try:
        module = run.datamodule()
        module.setup()
        ids = module.source.manifest["id"]
        rows = pd.Series(np.arange(len(ids)), index=ids).reindex(table["id"])
        if rows.isna().any():
            return [], [], "the images of the stored measures are not in the data any more", None
        placed = table.assign(row=rows.to_numpy(np.int64)).sort_values(["weighted_f", "id"])
        worst = placed.head(_SHOWN // 2)
        rest = placed.drop(worst.index)
        rest = rest.sample(min(_SHOWN // 2, len(rest)), random_state=run.recipe.seed)
        batch = plots.batch_tiles(next(iter(module.loader(module.split.train, train=True))), module, epoch=0)
        return _tiles(run, module, pd.concat([worst, rest])), batch, None, module
    except (DataError, MissingExtraError) as error:
        return [], [], str(error), None


def _tiles(run: Run, module: DataModule, rows: pd.DataFrame) -> list[Tile]:
    """Three pictures of each image."""
    spec, preprocess = run.recipe.task, run.preprocess
    assert isinstance(spec, SaliencySpec)
    classify = PixelClassifier(run.model(), preprocess, spec.overlap, channels_last=run.recipe.train.channels_last)
    source, tiles = cast(DenseSource, module.source), []
    for row in rows.itertuples():
        number = int(row.row)  # type: ignore[arg-type]
        raw = source.read(number)
        truth = known_mask(source.read_target(number).mask, raw, preprocess.nodata, module.remapped)
        probs, _ = next(classify([preprocess.apply(raw)], [truth.shape]))
        shown = np.where(truth == IGNORE, 128, np.where(truth == 1, 255, 0)).astype(np.uint8)
        name = f"{row.id}, weighted F {percent(float(row.weighted_f))}"  # type: ignore[arg-type]
        tiles += [Tile(visible(module, raw), name), Tile(_grey(shown), "truth")]
        tiles.append(Tile(_grey(np.rint(255 * probs[1]).astype(np.uint8)), "prediction"))
    return tiles


def _grey(values: np.ndarray) -> np.ndarray:
    """(H, W) uint8 as (H, W, 3)."""
    return np.repeat(values[..., None], 3, axis=2)
