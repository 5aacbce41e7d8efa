"""A scene: a large raster that is read window by window, never whole."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from r2kit.data.preprocess import Preprocess, missing_pixels
from r2kit.data.reader import describe_raster, keep_raster_open
from r2kit.data.stacks import parts_of
from r2kit.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Window2d:
    """A window of a scene, in pixels; it may reach beyond the scene."""

    top: int
    left: int
    height: int
    width: int


class Scene:
    """A raster seen with the bands of a run.

    Every thread has its own open file, because GDAL's must not be shared.

    Args:
        path: A GeoTIFF.
        preprocess: The run's: its bands, in its order, are what is read; its means stand in where nothing was measured.

    Raises:
        DataError: If the file cannot be read, lacks a band, or has pixels of another type than the run was trained on.
    """

    def __init__(self, path: Path, preprocess: Preprocess) -> None:
        self.path = path
        self._local = threading.local()
        self._open: list[Any] = []
        self._lock = threading.Lock()
        if not path.is_file() and parts_of(path) is None:
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{path}: no such file{did_you_mean(path.name, near)}")
        dataset = self._dataset()
        info, kept, palette = describe_raster(dataset, path)
        if palette is not None:
            raise DataError(
                f"{path}: is a palette image; convert it to bands, e.g. with rio or gdal_translate -expand rgb"
            )
        missing = [band for band in preprocess.bands if band not in info.bands]
        if missing:
            raise DataError(
                f"{path}: no band '{missing[0]}', the run was trained on {', '.join(preprocess.bands)}; the scene has "
                f"{', '.join(info.bands)}{did_you_mean(missing[0], info.bands)}"
            )
        if info.scale != preprocess.scale:
            raise DataError(
                f"{path}: pixels of type {info.dtype} are divided by {info.scale:g}, and in the run by "
                f"{preprocess.scale:g}; the scene is of another pixel type than the run's images"
            )
        self.size: tuple[int, int] = (dataset.height, dataset.width)
        """(H, W) in pixels."""
        self.crs = dataset.crs
        self.transform = dataset.transform
        self._bands = [kept[info.bands.index(band)] + 1 for band in preprocess.bands]
        self._nodata = info.nodata
        self._dtype = np.dtype(info.dtype)
        mean = np.asarray(preprocess.mean) * preprocess.scale
        self._fill = (np.rint(mean) if self._dtype.kind in "iu" else mean).astype(self._dtype)

    def read(self, window: Window2d) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read a window.

        Returns:
            (H, W, C) raw pixels, the band's mean where nothing was measured; and (H, W), true where the scene ends or
            no band was measured.

        Raises:
            DataError: If the file is damaged there.
        """
        raw = np.empty((window.height, window.width, len(self._bands)), dtype=self._dtype)
        raw[:] = self._fill
        missing = np.ones((window.height, window.width), dtype=bool)
        top, left = max(window.top, 0), max(window.left, 0)
        bottom = min(window.top + window.height, self.size[0])
        right = min(window.left + window.width, self.size[1])
        if bottom <= top or right <= left:
            return raw, missing
        inside = Window(left, top, right - left, bottom - top)
        try:
            dataset = self._dataset()
            pixels = dataset.read(self._bands, window=inside).transpose(1, 2, 0)
            valid = dataset.dataset_mask(window=inside) > 0
        except Exception as error:  # whatever GDAL makes of damaged bytes
            raise DataError(f"{self.path}: cannot be read at row {top}, column {left}: {error}") from error
        unmeasured = missing_pixels(pixels, self._nodata)
        if unmeasured is not None:
            pixels = np.where(unmeasured, self._fill, pixels)
            valid &= ~unmeasured.all(axis=2)
        place = (slice(top - window.top, bottom - window.top), slice(left - window.left, right - window.left))
        raw[place] = np.where(valid[..., None], pixels, self._fill)
        missing[place] = ~valid
        return raw, missing

    def overview(self, longest: int) -> NDArray[Any]:
        """Return the whole scene (h, w, C) as raw pixels, its longer side of `longest` pixels at most.

        The file's own overviews are used where it has them; else all of it is read.

        Raises:
            DataError: If the file is damaged.
        """
        factor = min(1.0, longest / max(self.size))
        height, width = (max(1, round(side * factor)) for side in self.size)
        try:
            pixels = self._dataset().read(self._bands, out_shape=(len(self._bands), height, width))
        except Exception as error:  # whatever GDAL makes of damaged bytes
            raise DataError(f"{self.path}: cannot be read: {error}") from error
        raw = pixels.transpose(1, 2, 0)
        unmeasured = missing_pixels(raw, self._nodata)
        return raw if unmeasured is None else np.where(unmeasured, self._fill, raw)

    def close(self) -> None:
        """Close the files of all threads."""
        with self._lock:
            for dataset in self._open:
                dataset.close()
            self._open.clear()
        self._local = threading.local()

    def _dataset(self) -> Any:
        """The open file of this thread."""
        if not hasattr(self._local, "dataset"):
            try:
                self._local.dataset = keep_raster_open(self.path)
            except Exception as error:  # rasterio's errors, and whatever a damaged header makes GDAL say
                raise DataError(f"{self.path}: cannot be opened as a raster: {error}") from error
            with self._lock:
                self._open.append(self._local.dataset)
        return self._local.dataset
