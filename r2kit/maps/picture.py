"""A map as a picture: its classes in colours with their names, beside the scene that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rasterio.enums import Resampling

from r2kit.data.reader import open_raster
from r2kit.errors import DataError
from r2kit.maps.writer import class_names

_LONGEST = 1200  # pixels that are drawn of a longer side


def map_figure(
    map_file: str | Path, scene: str | Path | None = None, colours: Mapping[str, str] | None = None
) -> Figure:
    """Return a picture of a map of classes, north up as the map is.

    Args:
        map_file: A map that `predict_map` made.
        scene: The raster that it was made of, shown to its left: its first three bands, or its first one in grey.
        colours: The colour of each class by its name, as matplotlib writes colours; None for ten that differ.

    Raises:
        DataError: If the file is no map of r2kit, or a class of it has no colour.
    """
    names = class_names(Path(map_file))
    if colours is not None and (bare := [name for name in names if name not in colours]):
        raise DataError(f"colours: class '{bare[0]}' of {map_file} has none; its classes are {', '.join(names)}")
    with open_raster(Path(map_file)) as dataset:
        bounds, nodata = dataset.bounds, dataset.nodata
        classes = dataset.read(1, out_shape=_shape(dataset.shape), masked=False)
    extent = (bounds.left, bounds.right, bounds.bottom, bounds.top)
    panels = 1 if scene is None else 2
    wide = (bounds.right - bounds.left) / (bounds.top - bounds.bottom)
    figure = Figure(figsize=(4.2 * panels * min(wide, 2.0) ** 0.5, 4.2 / min(wide, 2.0) ** 0.5 + 0.9), dpi=100)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if scene is not None:
        with open_raster(Path(scene)) as dataset:
            bands = [1, 2, 3] if dataset.count >= 3 else [1, 1, 1]
            pixels = dataset.read(bands, out_shape=(3, *_shape(dataset.shape)), resampling=Resampling.average)
        axes[0].imshow(_visible(pixels), extent=extent, interpolation="nearest")
        axes[0].set_title("scene")
    # Ten colours that differ, twenty where ten are too few, and again from the start.
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    chosen = [palette(i % palette.N) if colours is None else to_rgba(colours[name]) for i, name in enumerate(names)]
    shown = np.ma.masked_equal(classes, -1 if nodata is None else nodata)
    axes[-1].imshow(
        shown, ListedColormap(chosen), extent=extent, vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest"
    )
    axes[-1].set_title("map")
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, chosen, strict=True)]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(names), 6), frameon=False)
    figure.tight_layout(rect=(0.0, 0.1, 1.0, 1.0))
    return figure


def _shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the size to draw of (H, W) pixels."""
    factor = max(1.0, max(shape) / _LONGEST)
    return max(1, round(shape[0] / factor)), max(1, round(shape[1] / factor))


def _visible(pixels: np.ndarray) -> np.ndarray:
    """Return bands (3, H, W) as a picture (H, W, 3): bytes as they are, others stretched from 2 % to 98 %."""
    picture = np.moveaxis(pixels, 0, -1)
    if picture.dtype == np.uint8:
        return picture
    low, high = np.nanpercentile(picture.astype(np.float64), [2.0, 98.0], axis=(0, 1))
    stretched: np.ndarray = np.nan_to_num((picture - low) / np.maximum(high - low, 1e-12)).clip(0.0, 1.0)
    return stretched
