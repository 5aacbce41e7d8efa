"""Find objects in image files with a run's detector, as CSV, COCO JSON and, where images know their place, GeoJSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2kit.data.boxes.samples import fit_pieces
from r2kit.data.given import ReadGiven
from r2kit.data.preprocess import Preprocess
from r2kit.data.reader import find_images
from r2kit.data.tiles import Piece, pieces_of
from r2kit.errors import DataError
from r2kit.finder import Finder, refuse_tta
from r2kit.inference import load_images
from r2kit.objects.coco import Objects
from r2kit.objects.detectors import PIECES_AT_ONCE
from r2kit.predict.classification import bad_files
from r2kit.result.detection import make_table
from r2kit.run import Run
from r2kit.write_boxes import with_paths, write_coco, write_csv, write_geojson

SUFFIXES = (".csv", ".json", ".geojson", ".parquet")
"""Taken off the name that a person gives for the files."""


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
    """Find objects in image files, see `r2kit.predict.predict`.

    `out` ``NAME`` gives NAME.csv (one row an object: path, class, score, corners in pixels), NAME.json (COCO, with
    scores, and with outlines where there are any) and, where at least one image is georeferenced, NAME.geojson.

    Returns:
        One row an object: ``path``, ``class``, ``score``, ``x0``, ``y0``, ``x1``, ``y1`` in pixels of the image, and
        ``mask`` (COCO's run lengths, None without outlines), the images in the order of the paths.
    """
    refuse_tta(tta)
    files = find_images([paths] if isinstance(paths, str | Path) else list(paths))
    objects = find_objects(run, files, batch_size=batch_size, workers=workers, device=device)
    written = "" if out is None else write_objects(objects, run.preprocess.classes, Path(out))
    table = with_paths(objects)
    table.attrs |= objects.attrs
    table.attrs["written"] = written
    skipped = table.attrs["skipped"]
    if skipped and on_bad_file == "error":
        raise DataError(bad_files(skipped, table.attrs["images"], written))
    return table


def find_objects(run: Run, files: Sequence[Path], *, batch_size: int, workers: int, device: str) -> pd.DataFrame:
    """Find the objects in images, as the table that evaluations store (see `r2kit.result.detection`).

    Args:
        run: A finished run of a detection, with outlines or without.
        files: Images.
        batch_size: Pieces of images at once.
        workers: Processes that read images.
        device: See `inference.choose_device`.

    Returns:
        The table; ``attrs["images"]`` is how many images were read, ``attrs["skipped"]`` lists [path, reason] of those
        that could not be.
    """
    find = Finder(run, device, batch_size=min(batch_size, PIECES_AT_ONCE))
    prepare = _Prepare(run.preprocess, run.recipe.data.boxes.overlap)
    done: list[tuple[Path, tuple[int, int]]] = []
    found: list[Objects] = []
    skipped: list[tuple[str, str]] = []
    for batch in load_images(ReadGiven(run.preprocess, whole=True), files, prepare, batch_size=1, workers=workers):
        skipped += [(str(files[position]), reason) for position, reason in batch.failed]
        for position, pieces, shape in zip(batch.index, *batch.tensors, strict=True):
            size = (int(shape[0]), int(shape[1]))
            found += find(run.preprocess.normalize(pieces), [prepare.pieces(size)])
            done.append((files[position], size))
    images = pd.DataFrame(
        {
            "id": [str(path) for path, _ in done],
            "path": [str(path) for path, _ in done],
            "height": [size[0] for _, size in done],
            "width": [size[1] for _, size in done],
        }
    ).assign(group=None, lon=np.nan, lat=np.nan)
    objects = make_table(images, found, [], run.preprocess.classes)
    objects.attrs["skipped"] = [list(item) for item in skipped]
    objects.attrs["images"] = len(done)
    return objects


@dataclass(frozen=True)
class _Prepare:
    """The pieces of an image as the network sees them, in raw units, and the image's size."""

    preprocess: Preprocess
    overlap: float

    def pieces(self, shape: Sequence[int]) -> list[Piece]:
        """Where the pieces of an image of this shape lie."""
        return pieces_of(self.preprocess, shape, self.overlap)

    def __call__(self, raw: NDArray[Any]) -> tuple[Tensor, ...]:
        shape = raw.shape[:2]
        return fit_pieces(self.preprocess, raw, self.pieces(shape)), torch.tensor(shape)


def write_objects(objects: pd.DataFrame, classes: Sequence[str], out: Path) -> str:
    """Write the files of a table of objects; return their names in words.

    Raises:
        DataError: If they cannot be written.
    """
    stem = out.with_suffix("") if out.suffix.lower() in SUFFIXES else out
    names = [Path(f"{stem}{suffix}") for suffix in (".csv", ".json", ".geojson")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_csv(objects, names[0])
        write_coco(objects, classes, names[1])
        if not write_geojson(objects, names[2]):
            names.pop()
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}; give another --out") from None
    return ", ".join(str(name) for name in names)
