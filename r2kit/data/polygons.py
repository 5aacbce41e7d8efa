"""Polygons of a vector file as labels: read with pyogrio, brought to a raster's coordinates, drawn tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio.features
import rasterio.warp
from affine import Affine

from r2kit.data.targets import IGNORE
from r2kit.errors import DataError, did_you_mean, naming, require


class Polygons:
    """The polygons of a file and the class of each.

    Args:
        path: GeoJSON, GeoPackage or shapefile.
        attribute: The one that names the class; None: all are `object`.
        background: Class of everything outside; None: not known.

    Raises:
        MissingExtraError: If pyogrio or shapely is not installed.
        DataError: If the file cannot be read, has no polygon, no coordinate system, or lacks the attribute.
    """

    def __init__(self, path: Path, attribute: str | None, background: str | None) -> None:
        for package in ("pyogrio", "shapely"):
            require(package, package, "seg", "polygons as labels (data.rasters.labels)")
        import pyogrio
        import shapely

        if not path.is_file():
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{path}: no such file{did_you_mean(path.name, near)}")
        with naming(path, "cannot be read as polygons"):
            fields = pyogrio.read_info(path)["fields"].tolist()
            if attribute is not None and attribute not in fields:
                has = f"it has {', '.join(fields)}" if fields else "it has none"
                raise DataError(f"{path}: no attribute '{attribute}'; {has}{did_you_mean(attribute, fields)}")
            meta, _, wkb, columns = pyogrio.raw.read(path, columns=[] if attribute is None else [attribute])
            shapes = shapely.from_wkb(wkb)
        kinds = shapely.get_type_id(shapes)  # 3 and 6: polygons and their collections
        wrong = np.flatnonzero(~np.isin(kinds, (3, 6)) & (kinds >= 0))
        if len(wrong):
            raise DataError(f"{path}: feature {wrong[0] + 1} is a {shapes[wrong[0]].geom_type}, not a polygon")
        kept = np.flatnonzero((kinds >= 0) & ~shapely.is_empty(shapes))
        if len(kept) == 0:
            raise DataError(f"{path}: holds no polygon")
        if not meta["crs"]:
            raise DataError(f"{path}: names no coordinate system, so nobody can say where its polygons lie")
        values = ["object"] * len(shapes) if attribute is None else [_text(value) for value in columns[0]]
        unnamed = [i for i in kept.tolist() if not values[i]]
        if unnamed:
            raise DataError(f"{path}: {len(unnamed)} polygon(s) have no {attribute}, first feature {unnamed[0] + 1}")
        found = sorted({values[i] for i in kept.tolist()})
        self.classes: tuple[str, ...] = tuple(found)
        if background is not None:
            self.classes = (background, *(name for name in found if name != background))
        self.fill = IGNORE if background is None else 0
        self.path = path
        self.crs = str(meta["crs"])
        self.shapes = [shapes[i] for i in kept.tolist()]
        self.position = [self.classes.index(values[i]) for i in kept.tolist()]

    def within(self, crs: Any) -> PlacedPolygons:
        """Return the polygons in another coordinate system."""
        from shapely.geometry import mapping, shape

        with naming(self.path, "its polygons cannot be brought to the coordinates of the raster"):
            there = rasterio.warp.transform_geom(self.crs, crs, [mapping(one) for one in self.shapes])
            placed = [shape(one) for one in there]
        lost = next((i for i, one in enumerate(placed) if one.is_empty or not np.isfinite(one.bounds).all()), None)
        if lost is not None:
            raise DataError(
                f"{self.path}: polygon {lost + 1} has no place in the coordinates of the raster; is its coordinate "
                f"system, {self.crs}, the right one?"
            )
        return PlacedPolygons(placed, self.position, self.fill)


class PlacedPolygons:
    """Polygons in the coordinates of a raster.

    Args:
        shapes: Shapely geometries.
        position: The class of each.
        fill: The value outside all of them.
    """

    def __init__(self, shapes: Sequence[Any], position: Sequence[int], fill: int) -> None:
        from shapely import STRtree

        self.shapes = list(shapes)
        self.position = list(position)
        self.fill = fill
        self._tree = STRtree(self.shapes)

    def draw(self, transform: Affine, size: tuple[int, int]) -> np.ndarray:
        """Draw the polygons over a window of a raster; of those that overlap the later one in the file is seen.

        Args:
            transform: From pixels of the window to coordinates.
            size: (H, W) of the window.

        Returns:
            (H, W) uint8: the class of the polygon that holds the centre of each pixel.
        """
        from shapely.geometry import Polygon

        height, width = size
        corners = [place_of(transform, x, y) for x, y in ((0, 0), (width, 0), (width, height), (0, height))]
        near = sorted(self._tree.query(Polygon(corners)).tolist())
        if not near:
            return np.full(size, self.fill, dtype=np.uint8)
        drawn: np.ndarray = rasterio.features.rasterize(
            [(self.shapes[i], self.position[i]) for i in near],
            out_shape=size,
            fill=self.fill,
            transform=transform,
            dtype="uint8",
        )
        return drawn


def place_of(transform: Affine, x: float, y: float) -> tuple[float, float]:
    """Return the coordinates of a column and a row; not `transform * (x, y)`, which the affine package is giving up."""
    return transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f


def _text(value: Any) -> str:
    """An attribute as the name of a class: whole floats without a fraction, nothing for null."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)
