"""The report of images with several labels: figures from the stored predictions, and pictures with their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from r2kit import plots
from r2kit.data.datamodule import DataModule
from r2kit.errors import DataError, MissingExtraError, RunError
from r2kit.page import Chart, chart_of, template, thumbnail_of
from r2kit.plots import Tile
from r2kit.report.classification import commands_of, stored_result
from r2kit.report.evidence import look_at_data
from r2kit.result import Result, interval_words, percent
from r2kit.result import multilabel as sentences
from r2kit.run import Run, write_atomic

_SHOWN = 12  # images: those with most labels wrong, and some at random


def write_report(run: Run) -> Path:
    """Write the page of a run of several labels, see `r2kit.report.write_report`."""
    figures = stored_result(run, "map")
    table = _stored_predictions(run, figures)
    charts: dict[str, Chart] = {
        "labels": chart_of(
            run,
            "labels",
            "Average precision of each label",
            lambda t: plots.labels_figure(figures["per_class"], theme=t),
        )
    }
    if run.metrics_csv.is_file():
        history, best = run.read_table(run.metrics_csv), run.info.get("best_epoch")
        charts["curves"] = chart_of(
            run,
            "curves",
            "Loss and mean average precision by epoch",
            lambda t: plots.learning_curves(history, best_epoch=best, theme=t),
        )
    worst, others, batch, counts, gone, module = _pictures(run, table, figures["classes"])
    explained, evidence_words = look_at_data(run, module, figures, charts)
    for name, tiles, title in (
        ("batch", batch, "A training batch, as the network sees it"),
        ("predictions", worst + others, "Held-out images: their labels, + wrongly given, - missed"),
    ):
        if tiles:
            plots.save(plots.mosaic(tiles, title=title), run, name)
    page = template("multilabel.html.j2").render(
        run=run,
        recipe=run.recipe,
        info=run.info,
        result=figures,
        sentences=sentences,
        percent=percent,
        interval_words=interval_words,
        charts=charts,
        counts=counts,
        gone=gone,
        batch=[thumbnail_of(tile) for tile in batch],
        worst=[thumbnail_of(tile) for tile in worst],
        others=[thumbnail_of(tile) for tile in others],
        explained=[thumbnail_of(tile) for tile in explained],
        evidence_words=evidence_words,
        commands=commands_of(run),
    )
    write_atomic(run.report, page)
    return run.report


def _stored_predictions(run: Run, figures: Result) -> pd.DataFrame:
    """The stored predictions, which must be those that the figures were computed from."""
    file = run.predictions(figures["split"])
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read: {error}; run r2kit evaluate {run.path}") from None
    held = sentences.held_labels(table, "label", figures["classes"])
    if held.sum(axis=0).tolist() != [row["support"] for row in figures["per_class"]]:
        raise RunError(f"{run.path}: metrics.json and {file.name} do not agree; run r2kit evaluate {run.path}")
    return table


def _pictures(
    run: Run, table: pd.DataFrame, classes: list[str]
) -> tuple[list[Tile], list[Tile], list[Tile], dict[str, Any] | None, str | None, DataModule | None]:
    """Images with most labels wrong, others, a training batch, counts; why there are none; and the data."""
    try:
        module = run.datamodule()
        module.setup()
        rows = pd.Series(np.arange(len(module.source.manifest)), index=module.source.manifest["id"]).reindex(
            table["id"]
        )
        if rows.isna().any():
            return [], [], [], None, "the images of the stored predictions are not in the data any more", None
        held, given = (sentences.held_labels(table, column, classes) for column in ("label", "pred"))
        wrong = (held != given).sum(axis=1)
        placed = table.assign(row=rows.to_numpy(np.int64), wrong=wrong)
        worst = placed[placed["wrong"] > 0].sort_values(["wrong", "id"], ascending=[False, True]).head(_SHOWN)
        rest = placed.drop(worst.index)
        rest = rest.sample(min(_SHOWN, len(rest)), random_state=run.recipe.seed).sort_index()
        batch = plots.batch_tiles(next(iter(module.loader(module.split.train, train=True))), module, epoch=0)
        by_part = module.counts()
        counts = {
            "columns": list(by_part.columns),
            "rows": [(str(name), [int(n) for n in row]) for name, *row in by_part.itertuples()],
            "sums": [len(module.split.rows(part)) for part in by_part.columns],
        }
        return _tiles(module, worst), _tiles(module, rest), batch, counts, None, module
    except (DataError, MissingExtraError) as error:
        return [], [], [], None, str(error), None


def _tiles(module: DataModule, rows: pd.DataFrame) -> list[Tile]:
    """Images with their labels: right ones plain, + wrongly given, - missed."""
    tiles = []
    for row in rows.itertuples():
        shown = module.preprocess.denormalize(module.preprocess.apply(module.source.read(int(row.row))))  # type: ignore[arg-type]
        held, given = set(sentences.labels_of(str(row.label))), set(sentences.labels_of(str(row.pred)))
        words = [
            *sorted(held & given),
            *(f"+{n}" for n in sorted(given - held)),
            *(f"-{n}" for n in sorted(held - given)),
        ]
        tiles.append(Tile(plots.to_uint8(shown.numpy()), ", ".join(words) or "no label", held == given))
    return tiles
