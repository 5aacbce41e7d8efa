"""What the reports of all tasks have in common: where the evidence for answers lies, and where the images lie."""

from __future__ import annotations

import shlex

import numpy as np

from r2kit import explain, plots
from r2kit.data.datamodule import DataModule
from r2kit.errors import DataError, ModelError
from r2kit.page import Chart
from r2kit.plots import Tile
from r2kit.report.places import map_charts, places_of
from r2kit.result import Result
from r2kit.run import Run

_EXPLAINED = 4  # images
_TILES = 8  # of a large image, which would otherwise take longer than all the rest of the report
_WORDS = {
    "gradcam": "Grad-CAM of the deepest stage that still says where",
    "hirescam": "HiResCAM of the deepest stage that still says where",
}


def evidence_tiles(run: Run, module: DataModule, figures: Result) -> tuple[list[Tile], str]:
    """Return pairs of a held-out image, drawn by the run's seed, and the same under the evidence for the answer.

    In a segmentation where one class has more than half of the pixels, it is the surroundings, and the evidence is for
    the most frequent of the others that is found in the image.

    Args:
        run: The run.
        module: Its data.
        figures: Its result.

    Returns:
        The pictures, and how they were made; or none, and why.
    """
    if not explain.available():
        again = f"r2kit report {shlex.quote(str(run.path))}"
        return [], f'it needs captum: pip install "r2kit[explain]" and then {again}'
    rows = np.random.default_rng(run.recipe.seed).permutation(module.split.rows(figures["split"]))
    tiles: list[Tile] = []
    wanted = _wanted(figures)
    try:
        explainer = explain.Explainer(run)
        for row in rows[: 2 * _EXPLAINED]:
            raw = module.source.read(int(row))
            look = next(
                (found for name in wanted if (found := explainer.look(raw, name, tiles=_TILES)) is not None), None
            )
            if look is None:
                continue
            tiles += [
                Tile(look.picture, str(module.source.manifest["id"].iloc[int(row)])),
                Tile(look.overlay, f"evidence for {look.question.words}"),
            ]
            if len(tiles) == 2 * _EXPLAINED:
                break
    except (DataError, ModelError) as error:
        return [], str(error)
    if not tiles:
        return [], "nothing is found in the images that were tried"
    plots.save(plots.mosaic(tiles, title="Where the evidence for the answer lies"), run, "gradcam")
    return tiles, f"{_WORDS[explainer.method]}: bright where the evidence for the named class lies"


def _wanted(figures: Result) -> list[str | None]:
    """The classes to explain, the first one that is found counts; None is what the run answers."""
    rows = sorted(figures.get("per_class", []), key=lambda row: -row.get("pixels", 0))
    pixels = sum(row.get("pixels", 0) for row in rows)
    if not pixels or 2 * rows[0]["pixels"] <= pixels:
        return [None]
    return [row["class"] for row in rows[1:4]]


def counts_of(run: Run) -> list[tuple[str, int]]:
    """Return the number of images in each part."""
    held = run.read_table(run.split_file, ["split"])["split"].value_counts()
    return [(part, int(held.get(part, 0))) for part in ("train", "val", "test")]


def look_at_data(
    run: Run, module: DataModule | None, figures: Result, charts: dict[str, Chart]
) -> tuple[list[Tile], str]:
    """Return what `evidence_tiles` does, and put the maps of the parts and of the blocks among the charts.

    Args:
        run: The run.
        module: Its data; None where they cannot be read any more.
        figures: Its result.
        charts: Those of the page; gains what `map_charts` returns.
    """
    charts |= map_charts(run, None if module is None else places_of(module))
    if module is None:
        return [], "the images cannot be read"
    return evidence_tiles(run, module, figures)
