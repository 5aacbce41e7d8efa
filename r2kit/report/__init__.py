"""The report of a run: one HTML page that needs no network, no script and no other file; and its model card."""

from __future__ import annotations

from pathlib import Path

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
    card.write_card(run)
    return kinds[kind](run)
