"""Large georeferenced rasters as a source: cut into tiles while they are read, labelled by masks or polygons.

A raster is opened by the process that reads it, on its first read: GDAL's handles and locks do not survive a fork, and
loader processes are started afresh for this source. Nothing but one tile is ever in memory.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
import rasterio.warp
from affine import Affine
from rasterio.enums import MaskFlags, Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from r2kit.data.files import is_flat, pixel_hash, raster_start_method
from r2kit.data.masks import Meaning
from r2kit.data.polygons import PlacedPolygons, Polygons, place_of
from r2kit.data.preprocess import missing_pixels
from r2kit.data.reader import choose_bands, describe_raster, find_images, keep_raster_open, open_raster
from r2kit.data.sources import fingerprint_of
from r2kit.data.stacks import name_of
from r2kit.data.targets import IGNORE, MaskTarget
from r2kit.errors import DataError, naming
from r2kit.recipe import DataSpec, Target

_MOST_TILES = 4_000_000  # each is read once before training; a header may say anything
_OUTSIDE = -1  # a pixel of a mask raster's grid without a value


class RasterTiles:
    """Tiles of one or more large rasters.

    Args:
        spec: The `data` part of a recipe, with `rasters.labels`.
        target: `mask`, or `class`: the class of most pixels, of tiles that are pure enough.

    Raises:
        DataError: If a raster or its labels cannot be used, or no tile is left.
        MissingExtraError: If polygons need packages that are not installed.
    """

    in_memory = False

    def __init__(self, spec: DataSpec, target: Target) -> None:
        assert spec.root is not None
        assert spec.rasters.labels is not None
        self.name = spec.root
        self.target: Target = target
        self.tile = spec.rasters.tile
        files = find_images([Path(spec.root)], spec.band_files)
        self._sheets, self.bands, self.scale, self.nodata = _describe(spec, files)
        labels = Path(spec.rasters.labels)
        polygons = None
        if spec.rasters.has_polygons:
            polygons = Polygons(labels, spec.rasters.attribute, spec.rasters.background)
            self._labels: list[_Labels] = [_Drawn(polygons.within(sheet.crs)) for sheet in self._sheets]
        else:
            self._labels = [_Mask(_mask_of(labels, Path(sheet.path), len(files)), sheet) for sheet in self._sheets]
        self._open = _OpenRasters()
        self.start_method: str | None = raster_start_method()

        tiles = [(s, y, x) for s, sheet in enumerate(self._sheets) for y, x in sheet.tiles(self.tile)]
        self._tiles = np.array(tiles, dtype=np.int64).reshape(-1, 3)
        self._meaning: Meaning | None = None
        found = pd.DataFrame([self._look(place) for place in tiles])
        if polygons is None:
            every = np.unique(np.concatenate([np.asarray(v, dtype=np.int64) for v in found["values"]]))
            self._meaning = Meaning.of(spec.masks, every[every != _OUTSIDE].tolist(), spec.rasters.labels)
            unknown = self._meaning.unknown(every[every != _OUTSIDE])
            if len(unknown):
                raise DataError(
                    f"{labels}: holds {self._meaning.say(unknown)}, which no class has; see data.masks.classes and "
                    "data.masks.ignore"
                )
        self.classes: tuple[str, ...] = polygons.classes if polygons is not None else self._meaning.classes  # type: ignore[union-attr]
        if len(self.classes) < 2:
            raise DataError(f"{labels}: only one class, '{self.classes[0]}'; at least two are needed")
        pixels = np.stack([self._count(v, n) for v, n in zip(found["values"], found["counts"], strict=True)])
        self._settle(spec, found, pixels)

    def _settle(self, spec: DataSpec, found: pd.DataFrame, pixels: np.ndarray) -> None:
        """Keep the tiles that can be used, and write the manifest."""
        labelled = pixels.sum(axis=1)
        keep = labelled >= spec.rasters.min_valid * self.tile**2
        label = pixels.argmax(axis=1)
        if self.target != "mask":
            keep &= pixels.max(axis=1) > spec.rasters.purity * np.maximum(labelled, 1)
        if not keep.any():
            what = "is measured and labelled enough" if self.target == "mask" else "is labelled and pure enough"
            raise DataError(
                f"{self.name}: none of {len(keep)} tiles of {self.tile} pixels {what}; do rasters and labels lie in "
                "the same place? See data.rasters.min_valid and data.rasters.purity"
            )
        rows = np.flatnonzero(keep)
        self._tiles, self.pixels = self._tiles[rows], pixels[rows]
        found, label = found.iloc[rows].reset_index(drop=True), label[rows]
        if self.target == "mask":
            self.strata: tuple[str, ...] = ("tile",)
            label = np.zeros(len(rows), dtype=np.int64)
        else:
            seen = np.unique(label)  # a class without a tile of its own cannot be learned
            if len(seen) < 2:
                raise DataError(f"{self.name}: only tiles of '{self.classes[seen[0]]}' are pure enough")
            self.classes = tuple(self.classes[k] for k in seen)
            self.strata, label = self.classes, np.searchsorted(seen, label)
            self.pixels = self.pixels[:, seen]
        sheets = [self._sheets[s] for s in self._tiles[:, 0]]
        self.manifest = pd.DataFrame(
            {
                "id": [f"{s.identity}@{y}+{x}" for s, (_, y, x) in zip(sheets, self._tiles.tolist(), strict=True)],
                "path": [s.path for s in sheets],
                "label": label,
                "split": None,
                "group": None,
                "lon": found["lon"],
                "lat": found["lat"],
            }
        )
        contents = found[["pixels", "flat", "crs", "bounds"]].copy()
        contents["low"] = None  # neighbouring tiles of one raster look alike by nature
        contents["sha256"], contents["height"], contents["width"] = found["pixels"], self.tile, self.tile
        self.contents: pd.DataFrame | None = contents
        self.skipped: list[tuple[str, str]] = []
        content = [f"{a}{b}" for a, b in zip(found["pixels"], self.pixels.tolist(), strict=True)]
        self.fingerprint = fingerprint_of(zip(self.manifest["id"], self.manifest["label"], content, strict=True))

    def read(self, row: int) -> np.ndarray:
        """Return tile `row` as (tile, tile, C); at the border filled up with the raster's own edge.

        What is transparent was not measured: a tile with such pixels has NaN there, and so is of floats.

        Raises:
            DataError: If the file has gone or cannot be read.
        """
        return self._read(self._tiles[row])

    def read_target(self, row: int) -> MaskTarget:
        """Return the mask of tile `row`; `IGNORE` also where it is filled up.

        Raises:
            DataError: If the file has gone or cannot be read.
        """
        return MaskTarget(self._encode(self._read_labels(self._tiles[row])))

    def _encode(self, raw: np.ndarray) -> np.ndarray:
        """Values of the labels as positions in the classes."""
        if self._meaning is None:
            return raw.astype(np.uint8)
        outside = raw == _OUTSIDE
        known = np.where(outside, self._meaning.values[0] if len(self._meaning.values) else 0, raw)
        return np.where(outside, np.uint8(IGNORE), self._meaning.encode(known))

    def _count(self, values: list[int], counts: list[int]) -> np.ndarray:
        """Pixels of each class (K,) from values and their counts."""
        position = self._encode(np.asarray(values, dtype=np.int64))
        return np.bincount(position, weights=np.asarray(counts), minlength=256)[: len(self.classes)].astype(np.int64)

    def _read(self, place: Any) -> np.ndarray:
        """Pixels of a tile."""
        number, y, x = (int(value) for value in place)
        sheet = self._sheets[number]
        height, width = sheet.inside(y, x, self.tile)
        with naming(sheet.path, f"cannot be read at row {y}, column {x}"):
            dataset, window = self._open.get(sheet.path), Window(x, y, width, height)
            raw = dataset.read(sheet.positions, window=window)
            if MaskFlags.per_dataset in dataset.mask_flag_enums[0]:  # a band of transparency, or a mask in the file
                outside = dataset.dataset_mask(window=window) == 0
                if outside.any():
                    raw = np.where(outside, np.float32(np.nan), raw)
        below, right = self.tile - height, self.tile - width
        filled: np.ndarray = np.pad(raw, ((0, 0), (0, below), (0, right)), mode="edge").transpose(1, 2, 0)
        return np.ascontiguousarray(filled)

    def _read_labels(self, place: Any) -> np.ndarray:
        """Values of the labels of a tile, outside the raster `_OUTSIDE` or, for polygons, `IGNORE`."""
        number, y, x = (int(value) for value in place)
        sheet = self._sheets[number]
        height, width = sheet.inside(y, x, self.tile)
        labels = self._labels[number].read(self._open, sheet, Window(x, y, width, height))
        nothing = IGNORE if self._meaning is None and isinstance(self._labels[number], _Drawn) else _OUTSIDE
        return np.pad(labels, ((0, self.tile - height), (0, self.tile - width)), constant_values=nothing)

    def _look(self, place: tuple[int, int, int]) -> dict[str, Any]:
        """What a tile holds: values of its labels where it is measured, hash, place."""
        number, y, x = place
        sheet = self._sheets[number]
        raw, labels = self._read(place), self._read_labels(place)
        missing = missing_pixels(raw, self.nodata)
        measured = labels if missing is None else labels[~missing.all(axis=2)]
        values, counts = np.unique(measured, return_counts=True)
        corners = [place_of(sheet.transform, x + dx, y + dy) for dx in (0, self.tile) for dy in (0, self.tile)]
        xs, ys = [c[0] for c in corners], [c[1] for c in corners]
        middle = [(min(xs) + max(xs)) / 2], [(min(ys) + max(ys)) / 2]
        with naming(sheet.path, "its coordinates cannot be brought to degrees"):
            lon, lat = rasterio.warp.transform(sheet.crs, "EPSG:4326", *middle)
        return {
            "values": values.tolist(),
            "counts": counts.tolist(),
            "pixels": pixel_hash(raw),
            "flat": is_flat(raw),
            "crs": sheet.crs.to_string(),
            "bounds": (min(xs), min(ys), max(xs), max(ys)),
            "lon": float(lon[0]),
            "lat": float(lat[0]),
        }


@dataclass(frozen=True)
class _Sheet:
    """One raster."""

    path: str
    identity: str
    size: tuple[int, int]
    crs: Any
    transform: Any
    positions: tuple[int, ...]

    def tiles(self, side: int) -> list[tuple[int, int]]:
        """Row and column of the corner of every tile."""
        return [(y, x) for y in range(0, self.size[0], side) for x in range(0, self.size[1], side)]

    def inside(self, y: int, x: int, side: int) -> tuple[int, int]:
        """(H, W) of the part of a tile inside the raster."""
        return min(side, self.size[0] - y), min(side, self.size[1] - x)


@dataclass
class _OpenRasters:
    """Rasters by path, opened on first use, by each process for itself."""

    datasets: dict[str, Any] = field(default_factory=dict)
    process: int = -1

    def get(self, path: str, make: Any = None) -> Any:
        """Return the open raster of a path, or what `make` makes of it."""
        if self.process != os.getpid():  # handles of another process are not ours to use, nor to close
            self.datasets, self.process = {}, os.getpid()
        key = path if make is None else f"{path}#{make.key}"
        if key not in self.datasets:
            with naming(path, "cannot be opened"):
                dataset = keep_raster_open(Path(path))
                self.datasets[key] = dataset if make is None else make.over(dataset)
        return self.datasets[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"datasets": {}, "process": -1}


@dataclass(frozen=True)
class _Drawn:
    """Labels drawn from polygons."""

    polygons: PlacedPolygons

    def read(self, rasters: _OpenRasters, sheet: _Sheet, window: Window) -> np.ndarray:
        """Positions in the classes over a window of the raster."""
        grid = sheet.transform
        left, top = place_of(grid, window.col_off, window.row_off)
        transform = Affine(grid.a, grid.b, left, grid.d, grid.e, top)
        drawn = self.polygons.draw(transform, (window.height, window.width))
        return drawn.astype(np.int64)


@dataclass(frozen=True)
class _Mask:
    """Labels of a mask raster, brought to the pixels of the image."""

    path: str
    sheet: _Sheet

    @property
    def key(self) -> str:
        """Tells the grids apart onto which one mask is brought."""
        return self.sheet.path

    def over(self, dataset: Any) -> Any:
        """The mask on the grid of the image: as it is where the grids are the same, else the nearest value."""
        if dataset.count != 1:
            raise DataError(f"{self.path}: has {dataset.count} bands; a mask raster has one")
        if dataset.crs is None:
            raise DataError(f"{self.path}: is not georeferenced, so nobody can say where its values lie")
        height, width = self.sheet.size
        same = dataset.crs == self.sheet.crs and dataset.transform.almost_equals(self.sheet.transform, 1e-6)
        if same and dataset.shape == (height, width):
            return dataset
        return WarpedVRT(
            dataset,
            crs=self.sheet.crs,
            transform=self.sheet.transform,
            height=height,
            width=width,
            resampling=Resampling.nearest,
            add_alpha=dataset.nodata is None,
        )

    def read(self, rasters: _OpenRasters, sheet: _Sheet, window: Window) -> np.ndarray:
        """Values over a window of the raster, `_OUTSIDE` where the mask has none."""
        mask = rasters.get(self.path, self)
        with naming(self.path, f"cannot be read at row {window.row_off}, column {window.col_off}"):
            values = mask.read(1, window=window)
            if values.dtype.kind not in "iuf":
                raise DataError(f"{self.path}: holds {values.dtype}; the values of a mask are whole numbers")
            if values.dtype.kind == "f":
                values = np.where(np.isfinite(values), values, _OUTSIDE)
            codes: np.ndarray = np.where(mask.read_masks(1, window=window) == 0, _OUTSIDE, values.astype(np.int64))
        return codes


_Labels = _Drawn | _Mask


def _describe(spec: DataSpec, files: list[Path]) -> tuple[list[_Sheet], tuple[str, ...], float, float | None]:
    """Headers of all rasters, and what they have in common."""
    sheets: list[_Sheet] = []
    first: tuple[Any, ...] | None = None
    for path in files:
        with naming(path, "cannot be opened as a raster"), open_raster(path) as dataset:
            info, kept, palette = describe_raster(dataset, path)
            if palette is not None:
                raise DataError(f"{path}: is a palette picture; a raster of measurements is needed")
            if dataset.crs is None or dataset.transform.is_identity:
                raise DataError(f"{path}: is not georeferenced; use data.source=folder for plain pictures")
            names = info.bands if spec.bands is None else choose_bands(spec.bands, info.bands, str(path))
            positions = tuple(kept[info.bands.index(name)] + 1 for name in names)
            identity = name_of(path).name if len(files) == 1 else f"{name_of(path).name}-{_short(path)}"
            sheets.append(_Sheet(str(path), identity, dataset.shape, dataset.crs, dataset.transform, positions))
        side = spec.rasters.tile
        if (count := -(-sheets[-1].size[0] // side) * -(-sheets[-1].size[1] // side)) > _MOST_TILES:
            raise DataError(
                f"{path}: {sheets[-1].size[0]} x {sheets[-1].size[1]} pixels are {count} tiles of {side}, more than "
                f"{_MOST_TILES}; use a larger data.rasters.tile, or a part of the raster"
            )
        common = (names, info.dtype, info.scale, None if info.nodata is None else float(info.nodata))
        if first is None:
            first = common
        elif repr(common) != repr(first):
            raise DataError(
                f"{path}: has bands {', '.join(names)} of {info.dtype} with nodata {info.nodata}, {files[0]} has "
                f"{', '.join(first[0])} of {first[1]} with nodata {first[3]}; all rasters must be alike"
            )
    assert first is not None
    return sheets, first[0], first[2], first[3]


def _short(path: Path) -> str:
    """A few letters that tell files of one name apart."""
    return hashlib.sha256(str(path).encode()).hexdigest()[:6]


def _mask_of(labels: Path, image: Path, count: int) -> str:
    """The mask raster of an image: the file itself, or the one of the same name in a folder."""
    if labels.is_dir():
        name = name_of(image).name
        for suffix in (".tif", ".tiff", ".TIF", ".TIFF"):
            if (labels / f"{name}{suffix}").is_file():
                return str(labels / f"{name}{suffix}")
        raise DataError(f"{image}: has no mask; expected {labels / name}.tif")
    if not labels.is_file():
        raise DataError(f"{labels}: no such mask raster or folder of mask rasters (data.rasters.labels)")
    return str(labels)
