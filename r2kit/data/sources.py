"""What every source of images offers, and the one function that opens the source a recipe names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from r2kit.data.targets import MaskTarget
from r2kit.errors import DataError
from r2kit.recipe import DataSpec, Target

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from r2kit.data.files import ImageFiles

MANIFEST_COLUMNS = ("id", "path", "label", "split", "group", "lon", "lat")


class Source(Protocol):
    """Labelled images: a table of what there is, and a way to read one row of it."""

    name: str
    """Short name for logs and run.json."""
    target: Target
    """What a row carries beside its image: one class, several classes, a mask, or boxes."""
    classes: tuple[str, ...]
    """Class names."""
    strata: tuple[str, ...]
    """Names that the labels of the manifest are positions in, and that a split keeps in proportion: the classes, or one
    name for all images where an image has no single class."""
    bands: tuple[str, ...]
    """Band names in the order of the last axis of `read`."""
    scale: float
    """Divisor that brings raw pixels to 0..1 (255 for uint8), or 1.0 where the values are physical."""
    nodata: float | None
    """Raw value that means "no measurement", if the files declare one."""
    manifest: pd.DataFrame
    """One row per usable image: id (unique str), path (str), label (int, position in strata), split ('train', 'val',
    'test' or None), group (str or None), lon, lat (degrees of the centre, NaN where unknown). With target `classes`
    also labels (tuple of positions, maybe empty); label is then the rarest of them."""
    contents: pd.DataFrame | None
    """What the files hold, one row per row of the manifest: sha256 (of the file), pixels (hash of shape, type and
    pixels), flat (of one colour), low (see `files.check_files`), height, width, crs and bounds (left, bottom, right,
    top in units of crs; None without georeference). None where the images are no files of the user's."""
    skipped: list[tuple[str, str]]
    """(path, reason) of each image that was left out."""
    in_memory: bool
    """Whether `read` costs no input/output, so that loader processes gain nothing."""
    start_method: str | None
    """How loader processes must start; None for the platform's default."""
    fingerprint: str
    """SHA-256 over ids, labels and contents: equal for a copy of the same data elsewhere."""

    def read(self, row: int) -> np.ndarray:
        """Return the image of a manifest row as (H, W, C), raw values."""
        ...


class DenseSource(Source, Protocol):
    """A source whose rows carry what belongs to the places of their image."""

    pixels: np.ndarray
    """(N, K) int64, for masks: pixels of each class in each row of the manifest."""

    def read_target(self, row: int) -> MaskTarget:
        """Return what belongs to the image of a manifest row."""
        ...


def open_source(spec: DataSpec, target: Target = "class", *, whole: bool = False) -> Source:
    """Open the source that a recipe names.

    Args:
        spec: The `data` part of a recipe.
        target: What its rows must carry, see `Recipe.target`.
        whole: Whether every pixel is wanted; else JPEGs much larger than the network's input are decoded smaller.

    Raises:
        DataError: If the data cannot be used.
        MissingExtraError: If the source needs packages of an extra that is not installed.
    """
    network = None if whole else spec.network
    if target in ("boxes", "outlines"):
        from r2kit.data.boxes.source import open_boxes

        return open_boxes(spec, outlines=target == "outlines")
    if spec.resolved_source == "rasters":
        from r2kit.data.rasters import RasterTiles

        return RasterTiles(spec, target)
    if target == "mask":
        from r2kit.data.masks import open_masks

        return open_masks(spec)
    if target == "classes" and spec.resolved_source != "table":
        raise DataError(
            f"task.kind=multilabel: source '{spec.resolved_source}' gives an image one class; list the images in a "
            "table with columns path and label, the labels separated by ';', and give data.root=TABLE.csv"
        )
    if spec.resolved_source == "bluemarble":
        from r2kit.data.bluemarble import BlueMarble

        return BlueMarble(spec.bluemarble)
    if spec.resolved_source == "torchvision":
        from r2kit.data.public import open_public

        public = open_public(spec, loader_workers(spec.workers))
        public.decode_for(network, spec.cache_gb)
        return public
    if spec.root is None:  # the recipe refuses this; kept for callers that build a spec without validation
        raise ValueError(f"data.root is needed for source '{spec.resolved_source}'")
    root, workers = Path(spec.root), loader_workers(spec.workers)
    if spec.resolved_source == "table":
        from r2kit.data.table import ImageTable

        files: ImageFiles = ImageTable(
            root,
            several=target == "classes",
            allow_outside=spec.allow_outside,
            bands=spec.bands,
            band_files=spec.band_files,
            on_bad_file=spec.on_bad_file,
            workers=workers,
        )
    else:
        from r2kit.data.folder import ImageFolder

        files = ImageFolder(
            root, bands=spec.bands, band_files=spec.band_files, on_bad_file=spec.on_bad_file, workers=workers
        )
    files.decode_for(network, spec.cache_gb)
    return files


def loader_workers(workers: int | str) -> int:
    """Resolve ``data.workers``: a number, or ``auto`` for the usable cores, at most 8."""
    if isinstance(workers, int):
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(cores, 8)


def fingerprint_of(rows: Iterable[tuple[str, int, str]]) -> str:
    """SHA-256 over (id, label, content hash) of every image, in order of the ids."""
    digest = hashlib.sha256()
    for identity, label, content in sorted(rows):
        digest.update(f"{identity}\0{label}\0{content}\n".encode())
    return digest.hexdigest()
