"""The report of a classification.

Every figure on it comes from the files of the run folder: the stored predictions and what was computed from them. Only
the pictures of images and Grad-CAM need the images themselves; where those are gone the page goes without and says so.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from r2kit import explain, metrics, plots, result
from r2kit.console import duration
from r2kit.data.datamodule import DataModule
from r2kit.errors import DataError, MissingExtraError, ModelError, RunError
from r2kit.page import Chart, chart_of, template, thumbnail_of
from r2kit.plots import Tile
from r2kit.report.places import map_charts, places_of, whole_blocks_of
from r2kit.run import Run, write_atomic

_SEARCHED = 8  # batches among which one with mixing is looked for
_MISTAKES, _RIGHT, _EXPLAINED = 12, 12, 8  # images


@dataclass(frozen=True)
class _Pictures:
    """What needs the images: samples, mistakes, right answers, explanations, the map of the splits."""

    module: DataModule
    batch: list[Tile]
    batch_words: str
    mistakes: list[Tile]
    right: list[Tile]
    explained: list[Tile]
    no_explanation: str | None


def write_report(run: Run) -> Path:
    """Write the page of an evaluated run, and its figures as PNG into the run's folder of plots.

    Args:
        run: A finished and evaluated run.

    Returns:
        The HTML file.

    Raises:
        RunError: If the run was not evaluated, or its files do not belong together.
    """
    figures = stored_result(run)
    predictions = _stored_predictions(run, figures)
    pictures, gone = _pictures(run, predictions)
    page = template("report.html.j2").render(
        run=run,
        recipe=run.recipe,
        info=run.info,
        result=figures,
        calibrated=figures.get("calibrated", {}),
        sentences=result,
        bars=_bars(figures),
        tiles=_facts(run, figures),
        counts=None if pictures is None else _counts(pictures.module),
        gone=gone,
        charts=_charts(run, figures, predictions, pictures),
        batch=[] if pictures is None else [thumbnail_of(tile) for tile in pictures.batch],
        batch_words=None if pictures is None else pictures.batch_words,
        whole_blocks=pictures is not None and whole_blocks_of(pictures.module),
        mistakes=[] if pictures is None else [thumbnail_of(tile) for tile in pictures.mistakes],
        right=[] if pictures is None else [thumbnail_of(tile) for tile in pictures.right],
        explained=[] if pictures is None else [thumbnail_of(tile) for tile in pictures.explained],
        no_explanation=None if pictures is None else pictures.no_explanation,
        wrong=int((predictions["label"] != predictions["pred"]).sum()),
        commands=commands_of(run),
    )
    write_atomic(run.report, page)
    return run.report


def stored_result(run: Run, key: str = "accuracy") -> result.Result:
    """Return the contents of metrics.json, which has the figure `key`."""
    try:
        found = json.loads(run.metrics_json.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{run.path}: the run has no result yet; run r2kit evaluate {run.path}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{run.metrics_json}: cannot be read: {error}; run r2kit evaluate {run.path}") from None
    if not isinstance(found, dict) or key not in found:
        raise RunError(f"{run.metrics_json}: holds no result; run r2kit evaluate {run.path}")
    return found


def _stored_predictions(run: Run, figures: result.Result) -> pd.DataFrame:
    """The stored predictions, which must be those that the figures were computed from."""
    file = run.predictions(figures["split"])
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read: {error}; run r2kit evaluate {run.path}") from None
    label, pred = (result.labels(table, column, figures["classes"]) for column in ("label", "pred"))
    counted = metrics.confusion_matrix(label, pred, len(figures["classes"]))
    if counted.tolist() != figures["confusion"]:
        raise RunError(f"{run.path}: metrics.json and {file.name} do not agree; run r2kit evaluate {run.path}")
    return table


# ---------------------------------------------------------------------------------------------- words and numbers


def _bars(figures: result.Result) -> list[dict[str, Any]]:
    """The network's accuracy and the baselines', for bars of equal scale."""
    rows = [("this network", figures["accuracy"], True)]
    names = {"logistic": "colour alone (logistic regression)", "majority": "majority class"}
    rows += [(names[key], figures["baselines"][key]["accuracy"], False) for key in names if key in figures["baselines"]]
    return [
        {
            "name": name,
            "main": main,
            "share": result.percent(interval["value"]),
            "interval": result.interval_words(interval),
            **{end: round(100 * (interval[end] or 0.0), 2) for end in ("value", "low", "high")},
        }
        for name, interval, main in rows
    ]


def _facts(run: Run, figures: result.Result) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the figures in the row below the headline."""
    facts = [
        (
            "balanced accuracy",
            result.percent(figures["balanced_accuracy"]["value"]),
            result.interval_words(figures["balanced_accuracy"]),
        ),
        ("macro F1", result.percent(figures["macro_f1"]["value"]), result.interval_words(figures["macro_f1"])),
        (
            "calibration error",
            result.percent(figures["calibration_error"]["value"]),
            "confidence against accuracy",
        ),
    ]
    seconds = run.info.get("train_seconds")
    if seconds is not None:
        facts.append(("training time", duration(seconds), str(run.info.get("device", ""))))
    return facts


def _counts(module: DataModule) -> dict[str, Any]:
    """Images by class and split, with sums."""
    table = module.counts()
    return {
        "columns": list(table.columns),
        "rows": [(str(name), [int(n) for n in row]) for name, row in zip(table.index, table.to_numpy(), strict=True)],
        "sums": [int(n) for n in table.sum()],
    }


def commands_of(run: Run) -> list[str]:
    """Return what to type to get this run again."""
    path = shlex.quote(str(run.path))
    given = shlex.split(str(run.info.get("command", ""))) if _splits(str(run.info.get("command", ""))) else []
    commands = [f"pip install -e .   # in a checkout of r2kit {run.info['versions']['r2kit']}"]
    if given and Path(given[0]).name == "r2kit":
        commands.append(f"{shlex.join(['r2kit', *given[1:]])}   # how it was made")
    again = shlex.quote(f"{run.path}-again")
    if "fastai" not in run.info:  # whose training no recipe can say
        commands.append(f"r2kit finetune {shlex.quote(str(run.recipe_file))} --out {again}   # the same run again")
    return [*commands, f"r2kit evaluate {path}", f"r2kit report {path}"]


def _splits(text: str) -> bool:
    """Whether a recorded command can be split into words."""
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------- charts


def _charts(
    run: Run, figures: result.Result, predictions: pd.DataFrame, pictures: _Pictures | None
) -> dict[str, Chart]:
    """Every chart that the run has data for, drawn in both themes; the light one is kept as PNG."""
    classes = figures["classes"]
    probs, label = result.probabilities(predictions, classes), result.labels(predictions, "label", classes)
    reliability = metrics.reliability(probs, label, figures["calibration_error"]["bins"])
    confusion = np.asarray(figures["confusion"])
    charts = {
        "confusion": chart_of(
            run, "confusion", "Confusion matrix", lambda t: plots.confusion_figure(confusion, classes, theme=t)
        ),
        "recall": chart_of(
            run, "recall", "Recall of each class", lambda t: plots.recall_figure(figures["per_class"], theme=t)
        ),
        "reliability": chart_of(
            run, "reliability", "Reliability diagram", lambda t: plots.reliability_figure(reliability, theme=t)
        ),
    }
    if run.metrics_csv.is_file():
        history, best = run.read_table(run.metrics_csv), run.info.get("best_epoch")
        charts["curves"] = chart_of(
            run,
            "curves",
            "Loss and accuracy by epoch",
            lambda t: plots.learning_curves(history, best_epoch=best, theme=t),
        )
    charts |= map_charts(run, None if pictures is None else places_of(pictures.module))
    if pictures is not None:
        for name, tiles, title in (
            ("batch", pictures.batch, "A training batch, as the network sees it"),
            ("predictions", pictures.mistakes + pictures.right, "Held-out images: true class → prediction, confidence"),
            ("gradcam", pictures.explained, "Grad-CAM: where the evidence for the prediction lies"),
        ):
            if tiles:
                plots.save(plots.mosaic(tiles, title=title), run, name)
    return charts


# ------------------------------------------------------------------------------------------------------ pictures


def _pictures(run: Run, predictions: pd.DataFrame) -> tuple[_Pictures | None, str | None]:
    """What needs the images, or why there is none."""
    try:
        module = run.datamodule()
        module.setup()
        rows = pd.Series(np.arange(len(module.source.manifest)), index=module.source.manifest["id"])
        row = rows.reindex(predictions["id"])
        if row.isna().any():
            return None, "the images of the stored predictions are not in the data any more"
        placed = predictions.assign(row=row.to_numpy(np.int64), confidence=_confidence(predictions))
        wrong = placed[placed["label"] != placed["pred"]].sort_values(["confidence", "id"], ascending=[False, True])
        right = placed[placed["label"] == placed["pred"]]
        right = right.sample(min(_RIGHT, len(right)), random_state=run.recipe.seed).sort_index()
        tiles, mixed = _batch(module)
        few = wrong.head(_EXPLAINED // 2)
        chosen = pd.concat([few, right.head(_EXPLAINED - len(few))])
        explained, why_not = _explain(run, module, chosen)
        return (
            _Pictures(
                module, tiles, mixed, _tiles(module, wrong.head(_MISTAKES)), _tiles(module, right), explained, why_not
            ),
            None,
        )
    except (DataError, MissingExtraError) as error:
        return None, str(error)


def _batch(module: DataModule) -> tuple[list[Tile], str]:
    """A batch of the first epoch, one with mixing if there is any among the first few, and what was done to it."""
    spec = module.augment
    for index, batch in enumerate(module.loader(module.split.train, train=True)):
        mixed = module.mix(batch, 0, index) is not batch
        if index == 0 or mixed:
            tiles = plots.batch_tiles(batch, module, epoch=0, batch_index=index)
            words = f"Batch {index + 1} of the first epoch, with the labels that it teaches"
            words += "; augmented" if spec.varies else "; not augmented"
            if spec.mixup or spec.cutmix:
                shares = f"MixUp in {100 * spec.mixup:.0f} % and CutMix in {100 * spec.cutmix:.0f} % of the batches"
                words += f" and {'mixed' if mixed else 'not mixed'} ({shares})"
        if mixed or not (spec.mixup or spec.cutmix) or index == _SEARCHED - 1:
            break
    return tiles, f"{words}."


def _confidence(predictions: pd.DataFrame) -> NDArray[np.float64]:
    """The largest probability of each image."""
    columns = [column for column in predictions if str(column).startswith(result.PROBABILITY)]
    return predictions[columns].to_numpy(np.float64).max(axis=1)


def _caption(row: Any) -> str:
    """True class, prediction where it differs, and confidence."""
    said = row.label if row.label == row.pred else f"{row.label} → {row.pred}"
    return f"{said} {100 * row.confidence:.0f} %"


def _tiles(module: DataModule, rows: pd.DataFrame) -> list[Tile]:
    """Held-out images with what was said about them."""
    tiles = []
    for row in rows.itertuples():
        image = module.preprocess.apply(module.source.read(int(row.row)))  # type: ignore[arg-type]
        shown = plots.to_uint8(module.preprocess.denormalize(image).numpy())
        tiles.append(Tile(shown, _caption(row), str(row.label) == str(row.pred)))
    return tiles


def _explain(run: Run, module: DataModule, rows: pd.DataFrame) -> tuple[list[Tile], str | None]:
    """Pairs of an image and the same under its Grad-CAM map; or why there are none."""
    if not explain.available():
        again = f"r2kit report {shlex.quote(str(run.path))}"
        return [], f'Grad-CAM needs captum: pip install "r2kit[explain]" and then {again}'
    if rows.empty:
        return [], "there are no images"
    images = torch.stack([module.preprocess.apply(module.source.read(int(row))) for row in rows["row"]])
    target = torch.from_numpy(result.labels(rows, "pred", module.classes))
    try:
        heat = explain.gradcam(run.model(), images, target)
    except ModelError as error:
        return [], str(error)
    tiles = []
    for tile, row, evidence in zip(_tiles(module, rows), rows.itertuples(), heat, strict=True):
        tiles += [tile, Tile(plots.overlay(tile.image, evidence), f"evidence for {row.pred}", tile.right)]
    return tiles, None
