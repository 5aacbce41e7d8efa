"""Mean, deviation and range of every band, and whether a normalisation fits them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from r2kit.data.preprocess import Preprocess, missing_pixels
from r2kit.data.sources import Source
from r2kit.errors import DataError

MAX_IMAGES = 4000  # the standard error of a mean over this many images is far below what a network notices


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
    bands = len(source.bands)
    count, mean, square = np.zeros(bands), np.zeros(bands), np.zeros(bands)
    low, high = np.full(bands, np.inf), np.full(bands, -np.inf)
    for row in rows:
        raw = source.read(int(row))
        missing = missing_pixels(raw, source.nodata)
        pixels = raw.reshape(-1, bands).astype(np.float64)
        if missing is not None and missing.any():
            pixels[missing.reshape(-1, bands)] = np.nan
        n = np.isfinite(pixels).sum(axis=0)
        measured = n > 0
        if not measured.any():
            continue
        pixels = pixels[:, measured]
        # Chan, Golub, LeVeque 1979: join the moments of this image with those so far, without loss of digits.
        here = np.nanmean(pixels, axis=0)
        delta = here - mean[measured]
        total = count[measured] + n[measured]
        square[measured] += np.nansum((pixels - here) ** 2, axis=0) + delta**2 * count[measured] * n[measured] / total
        mean[measured] += delta * n[measured] / total
        count[measured] = total
        low[measured] = np.fmin(low[measured], np.nanmin(pixels, axis=0))
        high[measured] = np.fmax(high[measured], np.nanmax(pixels, axis=0))
    for band, name in enumerate(source.bands):
        if count[band] == 0:
            raise DataError(f"{source.name}: band '{name}' has no measured pixel in {len(rows)} training images")
        if high[band] == low[band]:
            raise DataError(
                f"{source.name}: band '{name}' is {low[band]:g} in every pixel of {len(rows)} training images; "
                "leave it out or check the files"
            )
    table = pd.DataFrame(
        {"mean": mean, "std": np.sqrt(square / count), "min": low, "max": high},
        index=pd.Index(source.bands, name="band"),
    )
    table.attrs["images"] = len(rows)
    return table


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
