"""Predict the class of image files with a run's network, as CSV and Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from r2kit.data.files import SEPARATOR
from r2kit.data.given import ReadGiven
from r2kit.data.preprocess import Preprocess
from r2kit.data.reader import find_images
from r2kit.errors import DataError
from r2kit.inference import Classifier, load_images
from r2kit.recipe import MultilabelSpec
from r2kit.result import PROBABILITY
from r2kit.run import Run


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
    """Predict the class of image files, see `r2kit.predict.predict`.

    `out` ``NAME`` gives NAME.csv and NAME.parquet. ``frame.attrs["tta"]`` says whether orientations were averaged.

    Returns:
        One row an image in the order of the paths: ``path``, ``class``, ``confidence`` (the largest probability), and
        ``prob_<class>`` for each class. For several labels ``labels`` in place of ``class``: those of at least
        ``task.threshold``, separated by ``;``.
    """
    files = find_images([paths] if isinstance(paths, str | Path) else list(paths), run.recipe.data.band_files)
    preprocess = run.preprocess
    several = run.recipe.task if isinstance(run.recipe.task, MultilabelSpec) else None
    classify = Classifier(
        run.model(), device, channels_last=run.recipe.train.channels_last, several=several is not None, tta=tta
    )
    order: list[int] = []
    probs: list[NDArray[np.float64]] = []
    skipped: list[tuple[str, str]] = []
    whole = bool(run.recipe.augment.transforms)  # as the images were read that it learned from
    reader, prepare = ReadGiven(preprocess, whole=whole), _Prepare(preprocess)
    for batch in load_images(reader, files, prepare, batch_size=batch_size, workers=workers):
        skipped += [(str(files[position]), reason) for position, reason in batch.failed]
        if batch.index:
            order += batch.index
            probs.append(classify(batch.tensors[0]))
    table = _table([files[i] for i in order], preprocess.classes, probs, several)
    table.attrs["tta"] = tta
    table.attrs["skipped"] = [list(item) for item in skipped]

    written = table.attrs["written"] = "" if out is None else write_table(table, Path(out))
    if skipped and on_bad_file == "error":
        raise DataError(bad_files(skipped, len(table), written))
    return table


@dataclass(frozen=True)
class _Prepare:
    """The network's input, as validation saw it."""

    preprocess: Preprocess

    def __call__(self, raw: NDArray[Any]) -> tuple[Tensor, ...]:
        return (self.preprocess.apply(raw),)


def _table(
    files: Sequence[Path], classes: Sequence[str], probs: list[NDArray[np.float64]], several: MultilabelSpec | None
) -> pd.DataFrame:
    """Path, class or labels, confidence and all probabilities of each readable image."""
    stacked = np.concatenate(probs) if probs else np.zeros((0, len(classes)))
    names = np.asarray(classes, dtype=object)
    if several is not None:
        answer = {"labels": [SEPARATOR.join(names[row >= several.threshold]) for row in stacked]}
    else:
        answer = {"class": names[stacked.argmax(1)].tolist()}
    table = pd.DataFrame(
        {
            "path": [str(file) for file in files],
            **answer,
            "confidence": stacked.max(1) if len(stacked) else np.zeros(0),
        }
    )
    return pd.concat([table, pd.DataFrame(stacked, columns=[f"{PROBABILITY}{name}" for name in classes])], axis=1)


def write_table(table: pd.DataFrame, out: Path) -> str:
    """Write a table as CSV and Parquet; return the names of the files in words.

    Raises:
        DataError: If they cannot be written.
    """
    stem = out.with_suffix("") if out.suffix.lower() in (".csv", ".parquet") else out
    csv, parquet = Path(f"{stem}.csv"), Path(f"{stem}.parquet")
    try:
        csv.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(csv, index=False)
        table.to_parquet(parquet, index=False)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}; give another --out") from None
    return f"{csv}, {parquet}"


def bad_files(skipped: Sequence[tuple[str, str]], good: int, written: str) -> str:
    """Return one line that lists the images that could not be read, the first ten by name."""
    reasons = "; ".join(reason if path in reason else f"{path}: {reason}" for path, reason in skipped[:10])
    more = f"; and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    where = f"; the other {good} are in {written}" if written else ""
    total = good + len(skipped)
    verb = "could not be read"
    return f"{len(skipped)} of {total} images {verb}{where}; mend or remove them: {reasons}{more}"
