"""Evaluate a run: one pass of its network over held-out images, stored, and every figure from what was stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from r2kit import result
from r2kit.evaluate import classification, detection, multilabel, saliency, segmentation
from r2kit.evaluate.target import Result, known_line
from r2kit.result import detection as result_of_detection
from r2kit.result import multilabel as result_of_multilabel
from r2kit.result import saliency as result_of_saliency
from r2kit.result import segmentation as result_of_segmentation
from r2kit.run import Run, unknown_kind

__all__ = ["evaluate", "summary_lines"]


def evaluate(
    run: Run,
    *,
    data: str | Path | None = None,
    split: str = "auto",
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    tta: bool = False,
) -> Result:
    """Run a run's network once over held-out images, store its predictions and the figures computed from them.

    The run's reported split (``test``, or ``val`` where no test images were held out) goes to `run.metrics_json`;
    anything else goes to a file of its own beside it, so that it never replaces the reported result.

    Args:
        run: A finished run.
        data: Other data laid out like the run's, every class one of the run's; None takes the run's own data.
        split: ``train``, ``val``, ``test``, or ``all`` for every image of `data`; ``auto`` is test where it exists,
            else val, else all.
        batch_size: Images at once; the result does not depend on it beyond the rounding of float32.
        workers: Processes that read images.
        device: See `inference.choose_device`.
        tta: Average the probabilities over the eight orientations of each image, at eight times the cost; the
            result goes to files of its own.

    Returns:
        The contents of the written JSON file; `task` names the kind.

    Raises:
        DataError: If images are missing or unreadable, or a class or the bands are not the run's.
        RunError: If the run holds no image of the split.
    """
    measures: dict[str, Callable[..., Result]] = {
        "classification": classification.evaluate,
        "multilabel": multilabel.evaluate,
        "segmentation": segmentation.evaluate,
        "saliency": saliency.evaluate,
        "detection": detection.evaluate,
        "instance": detection.evaluate,
    }
    kind = run.recipe.task.kind
    if kind not in measures:
        raise unknown_kind(run, "evaluate")
    return measures[kind](run, data=data, split=split, batch_size=batch_size, workers=workers, device=device, tta=tta)


def summary_lines(found: Result) -> list[str]:
    """Return a result as a few lines for a terminal."""
    lines = {
        "classification": result.summary_lines,
        "multilabel": result_of_multilabel.summary_lines,
        "segmentation": result_of_segmentation.summary_lines,
        "saliency": result_of_saliency.summary_lines,
        "detection": result_of_detection.summary_lines,
        "instance": result_of_detection.summary_lines,
    }
    warning = known_line(found)
    return [*([] if warning is None else [warning]), *lines[found.get("task", "classification")](found)]
