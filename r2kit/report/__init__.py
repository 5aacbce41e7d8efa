"""The report of a run: one HTML page that needs no network, no script and no other file; and its model card."""

from __future__ import annotations

from pathlib import Path

import jinja2

from r2kit.errors import RunError
from r2kit.report import card, classification, detection, multilabel, saliency, segmentation
from r2kit.run import Run, unknown_kind

__all__ = ["write_report"]


def write_report(run: Run) -> Path:
    """Write the page of an evaluated run, its figures as PNG into the run's folder of plots, and its model card.

    Args:
        run: A finished and evaluated run.

    Returns:
        The HTML file.

    Raises:
        RunError: If the run was not evaluated, or its files do not belong together.
    """
    kinds = {
        "classification": classification.write_report,
        "multilabel": multilabel.write_report,
        "segmentation": segmentation.write_report,
        "saliency": saliency.write_report,
        "detection": detection.write_report,
        "instance": detection.write_report,
    }
    kind = run.recipe.task.kind
    if kind not in kinds:
        raise unknown_kind(run, "report")
    try:
        card.write_card(run)
        return kinds[kind](run)
    except (LookupError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        # Every figure, sentence and chart rests on these files, which may be a stranger's or those of another version.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RunError(
            f"{run.path}: no report can be made of what its metrics.json and metrics.csv hold ({reason}); run r2kit "
            f"evaluate {run.path}, or see more with --debug"
        ) from error
