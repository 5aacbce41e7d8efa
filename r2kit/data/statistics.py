"""Mean, deviation and range of every band, and whether a normalisation fits them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from r2kit.data.preprocess import Preprocess, missing_pixels
from r2kit.data.sources import Source
from r2kit.errors import DataError

MAX_IMAGES = 4000  # the standard error of a mean over this many images is far below what a network notices

MAX_SAMPLE = 2**22  # pixels kept of each band for percentiles of floats: 16 MB
PERCENTILES = (1, 2, 50, 98, 99)


def band_statistics(source: Source, rows: np.ndarray, max_images: int = MAX_IMAGES) -> pd.DataFrame:
    """Measure the bands over some images, one image in memory at a time; missing pixels do not count.

    Args:
        source: Where the images are.
        rows: Rows of the manifest.
        max_images: Of more rows, evenly spaced ones are read.

    Returns:
        One row per band (index `band`): mean, std, min, max in raw units. ``attrs["images"]``: images read.

    Raises:
        DataError: If a band has no measured pixel or does not vary at all.
    """
    if len(rows) > max_images:
        rows = rows[np.linspace(0, len(rows), max_images, endpoint=False).astype(int)]
    moments = _Moments(len(source.bands))
    for row in rows:
        moments.add(_pixels(source, int(row)))
    for band, name in enumerate(source.bands):
        if moments.count[band] == 0:
            raise DataError(f"{source.name}: band '{name}' has no measured pixel in {len(rows)} training images")
        if moments.high[band] == moments.low[band]:
            raise DataError(
                f"{source.name}: band '{name}' is {moments.low[band]:g} in every pixel of {len(rows)} training images; "
                "leave it out or check the files"
            )
    table = moments.table(source.bands)
    table.attrs["images"] = len(rows)
    return table


def describe_bands(source: Source, rows: np.ndarray) -> pd.DataFrame:
    """Describe the bands over all of some images, one image in memory at a time.

    Args:
        source: Where the images are.
        rows: Rows of the manifest.

    Returns:
        One row per band (index `band`): mean, std, min, max, p1, p2, p50, p98, p99 in raw units, NaN without a measured
        pixel; nodata_share: share of the pixels without a measurement. ``attrs["percentiles"]``: `exact` (8- and 16-bit
        integers), or how many pixels of each band they were taken from.
    """
    bands, budget = len(source.bands), max(1, MAX_SAMPLE // max(len(rows), 1))
    moments, missing, total = _Moments(bands), np.zeros(bands), 0
    counts: dict[int, np.ndarray] = {}
    sample: list[np.ndarray] = []
    kind = source.read(int(rows[0])).dtype
    low = int(np.iinfo(kind).min) if kind.kind in "iu" and kind.itemsize <= 2 else None
    for row in rows:
        pixels = _pixels(source, int(row))
        moments.add(pixels)
        missing += np.isnan(pixels).sum(axis=0)
        total += len(pixels)
        if low is not None:
            size = 256**kind.itemsize
            for band in range(bands):
                values = pixels[:, band]
                here = np.bincount((values[~np.isnan(values)] - low).astype(np.int64), minlength=size)
                counts[band] = counts.get(band, np.zeros(size, dtype=np.int64)) + here
        else:
            every = max(1, -(-len(pixels) // budget))
            sample.append(pixels[int(row) % every :: every].astype(np.float32))
    table = moments.table(source.bands)
    wanted = np.array(PERCENTILES)
    found = np.full((bands, len(wanted)), np.nan)
    values = np.concatenate(sample) if sample else np.empty((0, bands))
    if low is not None:
        for band in np.flatnonzero(moments.count > 0).tolist():
            below = np.cumsum(counts[band])
            found[band] = low + np.searchsorted(below, wanted / 100.0 * below[-1], side="left")
    else:
        for band in np.flatnonzero(moments.count > 0).tolist():
            found[band] = np.nanpercentile(values[:, band], wanted)
    for position, percent in enumerate(PERCENTILES):
        table[f"p{percent}"] = found[:, position]
    table["nodata_share"] = missing / max(total, 1)
    table.attrs["images"] = len(rows)
    table.attrs["percentiles"] = "exact" if low is not None else f"from {len(values)} evenly spaced pixels"
    return table


class _Moments:
    """Count, mean, squared deviation and range of every band, joined image by image."""

    def __init__(self, bands: int) -> None:
        self.count, self.mean, self.square = np.zeros(bands), np.zeros(bands), np.zeros(bands)
        self.low, self.high = np.full(bands, np.inf), np.full(bands, -np.inf)

    def add(self, pixels: np.ndarray) -> None:
        """Join (N, C) pixels; NaN does not count."""
        n = np.isfinite(pixels).sum(axis=0)
        measured = n > 0
        if not measured.any():
            return
        pixels = pixels[:, measured]
        # Chan, Golub, LeVeque 1979: join the moments of this image with those so far, without loss of digits.
        here = np.nanmean(pixels, axis=0)
        delta = here - self.mean[measured]
        before, n = self.count[measured], n[measured]
        self.square[measured] += np.nansum((pixels - here) ** 2, axis=0) + delta**2 * before * n / (before + n)
        self.mean[measured] += delta * n / (before + n)
        self.count[measured] += n
        self.low[measured] = np.fmin(self.low[measured], np.nanmin(pixels, axis=0))
        self.high[measured] = np.fmax(self.high[measured], np.nanmax(pixels, axis=0))

    def table(self, bands: Sequence[str]) -> pd.DataFrame:
        """Columns mean, std, min, max; NaN for a band without a measured pixel."""
        empty = self.count == 0
        columns = {
            "mean": self.mean,
            "std": np.sqrt(self.square / np.maximum(self.count, 1)),
            "min": self.low,
            "max": self.high,
        }
        index = pd.Index(bands, name="band")
        return pd.DataFrame({name: np.where(empty, np.nan, value) for name, value in columns.items()}, index=index)


def _pixels(source: Source, row: int) -> np.ndarray:
    """Pixels of an image as (N, C) float64, NaN where there is no measurement."""
    raw = source.read(row)
    missing = missing_pixels(raw, source.nodata)
    pixels = raw.reshape(-1, raw.shape[2]).astype(np.float64)
    if missing is not None and missing.any():
        pixels[missing.reshape(pixels.shape)] = np.nan
    return pixels


def check_fit(preprocess: Preprocess, statistics: pd.DataFrame) -> str | None:
    """Say what is wrong when images would reach the network far from mean 0 and deviation 1.

    Args:
        preprocess: The normalisation.
        statistics: What `band_statistics` measured.

    Returns:
        One line, or None when every band's normalised mean is within 5 and its deviation between 0.05 and 20.
    """
    mean = (statistics["mean"].to_numpy() / preprocess.scale - np.array(preprocess.mean)) / np.array(preprocess.std)
    std = statistics["std"].to_numpy() / preprocess.scale / np.array(preprocess.std)
    for band, name in enumerate(preprocess.bands):
        if abs(mean[band]) > 5 or not 0.05 <= std[band] <= 20:
            return (
                f"band '{name}' would reach the network with mean {mean[band]:.3g} and deviation {std[band]:.3g} "
                "instead of about 0 and 1: the normalisation is of data with other units"
            )
    return None
