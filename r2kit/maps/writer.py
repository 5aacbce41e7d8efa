"""Writing a map piece by piece so that a killed program goes on where it was, and finishing it for a GIS."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from r2kit.data.reader import keep_raster_open, open_raster
from r2kit.errors import DataError
from r2kit.run import write_atomic

PERCENT = 0.01
"""Confidence and probabilities are stored as whole percents; a pixel times this is the share."""
_BLOCK = 256
_ENCODED = 2**20  # pixels that are encoded at once
_TAG = "R2KIT_SETTINGS"


@dataclass(frozen=True)
class MapFormat:
    """What a map holds.

    Attributes:
        size: (H, W) in pixels.
        crs: Coordinate system, as rasterio has it; None without.
        transform: From (column, row) to coordinates.
        classes: Names; a pixel of the first band is a position in it.
        probabilities: Whether a band for each class follows class and confidence.
        settings: What the map depends on: equal settings make equal maps.
    """

    size: tuple[int, int]
    crs: Any
    transform: Any
    classes: tuple[str, ...]
    probabilities: bool
    settings: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def dtype(self) -> str:
        """uint8, or uint16 for more classes than it can number."""
        return "uint8" if len(self.classes) <= 254 else "uint16"

    @property
    def nodata(self) -> int:
        """The value of a pixel about which nothing is said, in every band."""
        return 255 if self.dtype == "uint8" else 65535

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Names of the bands."""
        extra = tuple(f"probability of {name}, %" for name in self.classes) if self.probabilities else ()
        return ("class", "confidence, %", *extra)

    def encode(self, probs: NDArray[np.float32], missing: NDArray[np.bool_]) -> NDArray[Any]:
        """Turn probabilities (K, H, W) into the pixels of the bands (2 or 2 + K, H, W).

        Args:
            probs: NaN counts as missing.
            missing: (H, W), true where the map says nothing.
        """
        pixels = np.empty((len(self.descriptions), *probs.shape[1:]), dtype=self.dtype)
        rows = max(
            1, _ENCODED // max(1, probs.shape[2])
        )  # some at a time: what is made on the way is four times as large
        for top in range(0, probs.shape[1], rows):
            some = slice(top, top + rows)
            pixels[:, some] = self._encode(probs[:, some], missing[some])
        return pixels

    def _encode(self, probs: NDArray[np.float32], missing: NDArray[np.bool_]) -> NDArray[Any]:
        """`encode` all at once."""
        missing = missing | np.isnan(probs[0])
        safe = np.where(missing, 0.0, probs)
        percents = np.rint(safe * 100.0)
        bands = [safe.argmax(axis=0), percents.max(axis=0), *(percents if self.probabilities else ())]
        pixels = np.stack(bands).astype(self.dtype)
        pixels[:, missing] = self.nodata
        return pixels


class MapWriter:
    """A map in the making beside its final place: ``.NAME.part.tif`` and a list of the pieces that are done.

    Args:
        path: Where the finished map goes.
        form: What it holds.

    Raises:
        DataError: If the folder cannot be written.
    """

    def __init__(self, path: Path, form: MapFormat) -> None:
        self.path = path
        self.form = form
        self._draft = path.with_name(f".{path.name}.part.tif")
        self._journal = path.with_name(f".{path.name}.done.json")
        self.done: set[str] = set()
        """Names of the pieces that an earlier try has written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._resume():
                self._start()
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}; give another --out") from None

    def write(self, name: str, pixels: NDArray[Any], top: int, left: int) -> None:
        """Write one piece: (bands, H, W) pixels from row `top` and column `left` on.

        The pixels are on disk before the piece counts as done.
        """
        try:
            with keep_raster_open(self._draft, mode="r+") as dataset:
                dataset.write(pixels, window=Window(left, top, pixels.shape[2], pixels.shape[1]))
            with self._draft.open("rb") as file:
                os.fsync(file.fileno())
            self.done.add(name)
            write_atomic(self._journal, json.dumps({"settings": self.form.fingerprint, "done": sorted(self.done)}))
        except (OSError, rasterio.errors.RasterioError) as error:
            raise DataError(
                f"{self.path}: cannot be written: {error}; what is done is kept, the same command goes on"
            ) from None

    def finish(self) -> None:
        """Make the cloud-optimised GeoTIFF with overviews, and remove the draft."""
        part = self.path.with_name(f".{self.path.name}.cog.tif")
        try:
            rasterio.shutil.copy(
                str(self._draft),
                str(part),
                driver="COG",
                COMPRESS="DEFLATE",
                BLOCKSIZE=512,
                OVERVIEW_RESAMPLING="NEAREST",  # a class is a name: the mean of two of them is a third
                BIGTIFF="IF_SAFER",
            )
            os.replace(part, self.path)
        except (OSError, rasterio.errors.RasterioError) as error:
            part.unlink(missing_ok=True)
            raise DataError(f"{self.path}: cannot be written: {error}; the same command goes on") from None
        self._draft.unlink()
        self._journal.unlink()

    def _resume(self) -> bool:
        """Take up an earlier try with the same settings, if there is one."""
        try:
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if journal.get("settings") != self.form.fingerprint or not self._draft.is_file():
            return False
        self.done = set(journal["done"])
        return True

    def _start(self) -> None:
        """Make the draft: not compressed, because pieces are written into blocks that hold others."""
        form = self.form
        self._journal.unlink(missing_ok=True)
        self._draft.unlink(missing_ok=True)
        profile = {
            "height": form.size[0],
            "width": form.size[1],
            "count": len(form.descriptions),
            "dtype": form.dtype,
            "nodata": form.nodata,
            "crs": form.crs,
            "transform": form.transform,
            "tiled": True,
            "blockxsize": _BLOCK,
            "blockysize": _BLOCK,
            "bigtiff": "IF_SAFER",
            "sparse_ok": True,
        }
        with keep_raster_open(self._draft, "GTiff", "w", profile) as dataset:
            dataset.descriptions = form.descriptions
            dataset.scales = (1.0, *(PERCENT for _ in form.descriptions[1:]))
            dataset.colorinterp = [ColorInterp.gray, *(ColorInterp.undefined for _ in form.descriptions[1:])]
            names = {f"CLASS_{i}": name for i, name in enumerate(form.classes)}
            dataset.update_tags(**names, **{_TAG: form.fingerprint})


def made_with(path: Path) -> str | None:
    """Return the fingerprint of the settings that a finished map was made with; None for any other file."""
    try:
        with open_raster(path) as dataset:
            found = dataset.tags().get(_TAG)
    except (OSError, rasterio.errors.RasterioError):
        return None
    return None if found is None else str(found)


def class_names(path: Path) -> tuple[str, ...]:
    """Return the class names that a map carries, in the order of its pixel values.

    Raises:
        DataError: If the file is no map of r2kit.
    """
    try:
        with open_raster(path) as dataset:
            tags = dataset.tags()
    except (OSError, rasterio.errors.RasterioError) as error:
        raise DataError(f"{path}: cannot be read as a map: {error}") from None
    names: list[str] = []
    while f"CLASS_{len(names)}" in tags:
        names.append(tags[f"CLASS_{len(names)}"])
    if not names:
        raise DataError(f"{path}: names no classes (tags CLASS_0, CLASS_1, ...); it is no map made by r2kit predict")
    return tuple(names)
