"""Where the images of a run lie, and how right it is in each place: for the reports of all tasks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from r2kit import plots
from r2kit.data.datamodule import DataModule
from r2kit.page import Chart, chart_of
from r2kit.result.paired import FIGURES, Judged, judge_run, stored_predictions
from r2kit.run import Run


def places_of(module: DataModule) -> pd.DataFrame:
    """Return place and split of every image that is in a split."""
    parts = {part: module.split.rows(part) for part in ("train", "val", "test")}
    rows = np.concatenate(list(parts.values())).astype(np.int64)
    places = module.source.manifest.iloc[rows][["lon", "lat"]].reset_index(drop=True)
    return places.assign(split=np.repeat(list(parts), [len(part) for part in parts.values()]))


def whole_blocks_of(module: DataModule) -> bool:
    """Return whether no block of a held-out image holds a training image."""
    split = module.split
    if split.blocks is None:
        return False
    held = np.concatenate([split.val, split.test]).astype(np.int64)
    return not set(split.blocks[split.train]) & set(split.blocks[held])


def map_charts(run: Run, places: pd.DataFrame | None) -> dict[str, Chart]:
    """Return the maps that a run has data for.

    Args:
        run: An evaluated run.
        places: Of all images, see `places_of`; None where the data are gone.

    Returns:
        `split`, where the images of each part lie, and `blocks`, the headline figure of the task in each block or
        group that was held out together; each only where images have places.
    """
    charts = {}
    if places is not None and places["lon"].notna().any():
        charts["split"] = chart_of(
            run, "split_map", "Map of the splits", lambda theme: plots.split_map(places, theme=theme)
        )
    table = stored_predictions(run)
    if "kind" in table:  # of objects: a row an image, and a row an object
        table = table[table["kind"] == "image"]
    if (table["lon"].notna() & table["group"].notna()).any():
        degrees = run.recipe.data.block_degrees if run.read_table(run.split_file)["block"].notna().any() else None
        figure = FIGURES[run.recipe.task.kind]
        shares = figure_by_group(judge_run(run))
        charts["blocks"] = chart_of(
            run,
            "block_accuracy",
            f"{figure[0].upper()}{figure[1:]} by block",
            lambda theme: plots.block_map(table, shares, figure, degrees=degrees, others=places, theme=theme),
        )
    return charts


def figure_by_group(judged: Judged) -> pd.Series:
    """Return the headline figure by group; NaN where a group cannot give it, as where it holds no object."""
    assert judged.group is not None
    rows = pd.Series(np.arange(len(judged.ids))).groupby(judged.group).indices
    return pd.Series({name: judged.at(np.asarray(at, dtype=np.int64)).value for name, at in rows.items()}, dtype=float)
