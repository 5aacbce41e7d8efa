"""Predict image files with a run's network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import pandas as pd

from r2kit.predict import classification, detection, segmentation
from r2kit.run import Run, unknown_kind

__all__ = ["predict"]


def predict(
    run: Run,
    paths: str | Path | Iterable[str | Path],
    *,
    out: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    tta: bool = False,
    on_bad_file: Literal["error", "skip"] = "error",
) -> pd.DataFrame:
    """Predict image files; what is predicted is the kind of task of the run.

    Class names, bands and preprocessing are the run's. An image that cannot be read does not stop the others.

    Args:
        run: A finished run.
        paths: Image files and folders; a folder stands for all images below it.
        out: Where to write; what is written is said by the module of each kind of task. None writes nothing.
        batch_size: Images at once; the result does not depend on it beyond the rounding of float32.
        workers: Processes that read images.
        device: See `inference.choose_device`.
        tta: Average the probabilities over the eight orientations of each image, at eight times the cost.
        on_bad_file: ``error`` writes what could be read and then raises; ``skip`` returns it. Either way
            ``frame.attrs["skipped"]`` of the returned table lists [path, reason] of each image left out.

    Returns:
        A table of what was predicted, with the column ``path``.

    Raises:
        DataError: If there is no image, or one could not be read and `on_bad_file` is ``error``.
    """
    kinds: dict[str, Callable[..., pd.DataFrame]] = {
        "classification": classification.predict,
        "multilabel": classification.predict,
        "segmentation": segmentation.predict,
        "saliency": segmentation.predict,
        "detection": detection.predict,
        "instance": detection.predict,
    }
    kind = run.recipe.task.kind
    if kind not in kinds:
        raise unknown_kind(run, "predict")
    return kinds[kind](
        run, paths, out=out, batch_size=batch_size, workers=workers, device=device, tta=tta, on_bad_file=on_bad_file
    )
