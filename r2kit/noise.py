"""Labels that are likely wrong, ranked by predictions of networks that did not learn them.

The predictions are those of the test images of runs, for example of the k folds of one recipe: every image is judged by
the run that held it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from r2kit import result
from r2kit.data.check_page import page, thumbnail
from r2kit.data.table import write_table
from r2kit.errors import DataError, RunError
from r2kit.run import Run

_SHOWN = 60  # pictures on the page


def rank_labels(probs: NDArray[np.float64], label: NDArray[np.int64]) -> pd.DataFrame:
    """Score how well each label agrees with out-of-fold probabilities.

    Args:
        probs: (N, K) of images that the network did not learn; rows sum to 1.
        label: (N,) given classes.

    Returns:
        One row an image: `self_confidence` (probability of the given label), `normalised_margin` (that minus the
        largest other one, in [0, 1]), `suggested` (class number) and `issue` (bool): whether the image counts among
        another class at that class's own mean confidence.

    Source: Northcutt et al. 2021, "Confident learning", arXiv:1911.00068, sec. 3.1; scores as in cleanlab.rank.
    """
    rows = np.arange(len(label))
    own = probs[rows, label]
    others = probs.copy()
    others[rows, label] = -np.inf
    count = np.bincount(label, minlength=probs.shape[1])
    confidence = np.bincount(label, own, minlength=probs.shape[1]) / np.maximum(count, 1)
    threshold = np.where(count > 0, confidence, np.inf)  # a class without an image attracts none
    above = np.where(probs >= threshold, probs, -np.inf)
    confident = above.argmax(axis=1)
    issue = (confident != label) & np.isfinite(above.max(axis=1))
    return pd.DataFrame(
        {
            "self_confidence": own,
            "normalised_margin": (own - others.max(axis=1) + 1.0) / 2.0,
            "suggested": np.where(issue, confident, others.argmax(axis=1)),
            "issue": issue,
        }
    )


def rank_noise(runs: Sequence[Run], out: Path) -> pd.DataFrame:
    """Rank the labels of the test images of runs by self-confidence, the likely wrong ones first, and write them down.

    Args:
        runs: Evaluated classifications of the same classes; together they hold out each image once at most.
        out: Folder for ``noise.csv`` and ``noise.html``; made if need be.

    Returns:
        Columns rank, id, path, label, suggested, self_confidence, normalised_margin, issue.

    Raises:
        RunError: If a run is no classification, has no predictions of test images, or two runs tested one image.
        DataError: If `out` cannot be written.
    """
    tables = []
    classes = runs[0].preprocess.classes
    for run in runs:
        if run.recipe.task.kind != "classification":
            raise RunError(f"{run.path}: noise is ranked for classification, and this run is of {run.recipe.task.kind}")
        if run.preprocess.classes != classes:
            raise RunError(f"{run.path}: its classes are not those of {runs[0].path}")
        try:
            tables.append(pd.read_parquet(run.predictions("test")).assign(run=str(run.path)))
        except OSError:
            raise RunError(
                f"{run.path}: no predictions of test images, which the network did not learn; run r2kit evaluate "
                f"{run.path} --split test"
            ) from None
    table = pd.concat(tables, ignore_index=True)
    if (twice := table["id"].duplicated()).any():
        raise RunError(f"{table['id'][twice].iloc[0]} was tested by two of the runs; give the k folds of one recipe")
    probs, label = result.probabilities(table, classes), result.labels(table, "label", classes)
    scored = rank_labels(probs, label)
    scored["suggested"] = np.asarray(classes, dtype=object)[scored["suggested"]]
    ranked = pd.concat([table[["id", "path", "label", "run"]], scored], axis=1)
    ranked = ranked.sort_values(["self_confidence", "id"], ignore_index=True)
    ranked.insert(0, "rank", np.arange(1, len(ranked) + 1))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_table(ranked, out / "noise.csv")
        (out / "noise.html").write_text(_page(runs, ranked), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
    return ranked


def describe(row: dict[Any, Any]) -> str:
    """Return the given and the suggested class of a ranked image in words."""
    return f"is '{row['label']}' ({100 * row['self_confidence']:.0f} %), or '{row['suggested']}'?"


def _page(runs: Sequence[Run], ranked: pd.DataFrame) -> str:
    """The self-contained page, with pictures of the first ones where the images are still there."""
    pictures, gone = [], None
    try:
        module = runs[0].datamodule()
        module.setup()
        source = module.source
        row_of = pd.Series(np.arange(len(source.manifest)), index=source.manifest["id"])
        for row in ranked.head(_SHOWN).to_dict("records"):
            url = thumbnail(source.read(int(row_of[row["id"]])), source)
            words = f"{row['rank']}: {row['id']}: {describe(row)}"
            pictures.append({"url": url, "caption": words})
    except (DataError, KeyError) as error:
        gone = f"the images cannot be read ({error})"
    issues = int(ranked["issue"].sum())
    return page("noise.html.j2").render(
        runs=[str(run.path) for run in runs], images=len(ranked), issues=issues, pictures=pictures, gone=gone
    )
