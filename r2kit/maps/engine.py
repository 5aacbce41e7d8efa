"""From a scene to a map: reading, the network and writing side by side, in memory that does not grow with the scene.

A segmentation gives every pixel a class: overlapping tiles are blended with a Hann window. A classification gives a
grid map, one pixel for each cell of the scene, from a tile centred on the cell.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from r2kit.console import make_console, progress
from r2kit.data.files import stamp_of
from r2kit.data.reader import find_images
from r2kit.data.stacks import name_of
from r2kit.errors import DataError, R2kitError, require
from r2kit.maps.network import SMALLEST_TILE, TileNetwork
from r2kit.maps.scene import Scene, Window2d
from r2kit.maps.tiling import Blend, Grid, hann
from r2kit.maps.vectors import polygons_of, write_polygons
from r2kit.maps.writer import MapFormat, MapWriter, made_with
from r2kit.run import Run

OVERLAP = 0.25
"""Default share of a tile that its neighbour shares: the smallest measured at which the rims of tiles do not show.
Pixels near them then differ from a map of overlap 3/4 hardly more often than all pixels do (0.17 and 0.15 %; with 1/8
0.30 and 0.20 %, with none 1.19 and 0.44 %): benchmarks/RESULTS.md, "Maps of scenes". Half of it makes 1.5 times fewer
tiles, twice of it 1.9 times as many."""
_BUDGET = 64 * 2**20  # bytes for the sums of one row of tiles; the rows being written take as much again
_GDAL_CACHE = 64 * 2**20  # bytes of GDAL's own cache of blocks, which else is a share of the machine's memory
_MAP_SUFFIX = ".map.tif"  # of the map of SCENE in a folder of maps
_CELL_ROWS = 16  # rows of a grid map that are written as one piece

Tile = tuple[Tensor, NDArray[np.bool_]] | None
"""A tile ready for the network and its missing pixels; None where there is nothing to see."""


@dataclass(frozen=True)
class MapSettings:
    """How a map is made.

    Attributes:
        tile: (H, W) of a tile in pixels of the scene, for segmentation; None takes the ground of the training images.
        overlap: Share of a tile that its neighbour shares, for segmentation, in [0, 0.75].
        cell: Pixels of the scene that one pixel of a classification's grid map stands for; None takes a tile.
        probabilities: Whether the map has a band for each class.
        tta: Whether the probabilities are averaged over the eight orientations of each tile.
        workers: Threads that read ahead.
        device: See `inference.choose_device`.
        vector: ``geojson`` or ``gpkg`` for polygons beside the map.
        overwrite: Replace a map that was made with other settings.
    """

    tile: tuple[int, int] | None = None
    overlap: float = OVERLAP
    cell: int | None = None
    probabilities: bool = False
    tta: bool = False
    workers: int = 2
    device: str = "auto"
    vector: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            DataError: If a number is out of range.
            MissingExtraError: If a GeoPackage is asked for and cannot be written here.
        """
        if not 0.0 <= self.overlap <= 0.75:
            raise DataError(f"--overlap: got {self.overlap:g}, allowed is a share of the tile from 0 to 0.75")
        if self.tile is not None and min(self.tile) < SMALLEST_TILE:
            raise DataError(f"--tile: got {min(self.tile)}, allowed are {SMALLEST_TILE} pixels of the scene or more")
        if self.cell is not None and self.cell < 1:
            raise DataError(f"--cell: got {self.cell}, allowed is one pixel of the scene or more")
        if self.vector not in (None, "geojson", "gpkg"):
            raise DataError(f"--vector: got '{self.vector}', allowed are geojson and gpkg")
        if self.vector == "gpkg":
            require("pyogrio", "pyogrio", "gis", "--vector gpkg")
            require("shapely", "shapely", "gis", "--vector gpkg")


def predict_maps(
    run: Run,
    scenes: Sequence[Path],
    out: Path,
    settings: MapSettings = MapSettings(),
    *,
    console: Console | None = None,
) -> list[Path]:
    """Make the maps of several scenes; those that are finished with the same settings are left as they are.

    Args:
        run: A finished run.
        scenes: Rasters.
        out: A file ending in .tif for one scene; else a folder, in which SCENE.tif becomes SCENE.map.tif.
        settings: How.
        console: Where progress is printed; None prints nothing.

    Returns:
        The maps, in the order of the scenes.

    Raises:
        DataError: If two scenes would write one map, a setting is of the other kind of map, or after all others were
            made, if one could not be.
    """
    console = console or make_console(quiet=True)
    scenes = whole_scenes(run, scenes)
    targets = map_files(scenes, out)
    network = TileNetwork(run, settings.tile, settings.device, tta=settings.tta)
    if network.dense and settings.cell is not None:
        raise DataError("--cell: is for the grid map of a classification; a segmentation gives every pixel a class")
    if not network.dense and settings.overlap != OVERLAP:
        raise DataError("--overlap: is for the map of a segmentation; for a finer map of a classification give --cell")
    failed: list[str] = []
    for number, (scene, target) in enumerate(zip(scenes, targets, strict=True), 1):
        try:
            label = f"{number}/{len(scenes)} {scene.name}"
            with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE):  # of the whole process: readers and the writer share it
                state = _make(run, network, scene, target, settings, console, label)
            console.print(f"{target}: {state}")
        except R2kitError as error:
            if len(scenes) == 1:
                raise
            failed.append(str(error))
            console.print(f"left out: {error}")
    if failed:
        raise DataError(
            f"{len(failed)} of {len(scenes)} scenes have no map, the others are written; the same command goes on: "
            + "; ".join(failed[:3])
        )
    return targets


def whole_scenes(run: Run, scenes: Sequence[Path]) -> list[Path]:
    """Return the scenes, each a file, or the stack of the files of its bands where the run's images are such stacks.

    A folder stands for all scenes below it, the maps that an earlier command put there left out.
    """
    bands = run.recipe.data.band_files
    found: list[Path] = []
    for scene in scenes:
        if scene.is_file() or (bands is None and not scene.is_dir()):
            found.append(scene)
        else:
            found += [path for path in find_images([scene], bands) if not path.name.endswith(_MAP_SUFFIX)]
    return found


def map_files(scenes: Sequence[Path], out: Path) -> list[Path]:
    """Return the map of each scene: `out` itself if it ends in .tif, else SCENE.map.tif in the folder `out`.

    Raises:
        DataError: If two scenes would write one map, or a map would replace a scene.
    """
    one = out.suffix.lower() in (".tif", ".tiff")
    if one and len(scenes) != 1:
        raise DataError(f"{out}: is one map, and there are {len(scenes)} scenes; give a folder")
    targets = [out] if one else [out / f"{name_of(scene).name}{_MAP_SUFFIX}" for scene in scenes]
    if len(set(targets)) != len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise DataError(f"{out}: two scenes would become {twice.name}; give scenes of different names")
    if own := {scene.resolve() for scene in scenes} & {target.resolve() for target in targets}:
        raise DataError(f"{min(own)}: is a scene itself, which the map would replace; give another --out")
    return targets


def predict_map(run: Run, scene: str | Path, out: str | Path, settings: MapSettings = MapSettings()) -> Path:
    """Make the map of one scene; see `predict_maps`."""
    return predict_maps(run, [Path(scene)], Path(out), settings)[0]


def _make(
    run: Run, network: TileNetwork, path: Path, target: Path, settings: MapSettings, console: Console, label: str
) -> str:
    """Make one map, or find it made; return what was done."""
    scene = Scene(path, run.preprocess)
    try:
        if settings.vector is not None and scene.crs is None:
            raise DataError(f"{path}: has no coordinate system, so its areas have no place; leave out --vector")
        form = _format(run, network, scene, settings)
        areas = None if settings.vector is None else target.with_suffix(f".{settings.vector}")
        if target.exists():
            if made_with(target) == form.fingerprint:
                # Polygons are no setting of the map: they may be asked for later, or an end came before them.
                if areas is None or (areas.exists() and (of := polygons_of(areas)) == form.fingerprint):
                    return "finished already"
                if areas.exists() and of is None and not settings.overwrite:
                    raise DataError(
                        f"{areas}: exists, and no map was written into it; give --overwrite or another --out"
                    )
                write_polygons(target, areas, form.fingerprint)
                return f"finished already; written: {areas}"
            if not settings.overwrite:
                raise DataError(f"{target}: exists, made with other settings; give --overwrite or another --out")
        elif areas is not None and areas.exists() and not settings.overwrite:
            raise DataError(f"{areas}: exists, and there is no map that it is of; give --overwrite or another --out")
        writer = MapWriter(target, form)
        make = _dense if network.dense else _grid
        # One pool for the whole scene: every thread that reads keeps a file open until the end.
        with ThreadPoolExecutor(settings.workers) if settings.workers else nullcontext() as pool:
            make(network, scene, writer, settings, pool, lambda steps: progress(steps, label, console))
        writer.finish()
        if areas is not None:
            write_polygons(target, areas, form.fingerprint)
        return f"{form.size[0]} x {form.size[1]} pixels, {len(form.classes)} classes"
    finally:
        scene.close()


def _format(run: Run, network: TileNetwork, scene: Scene, settings: MapSettings) -> MapFormat:
    """What the map of a scene holds, and what it depends on."""
    cell = None if network.dense else (settings.cell or min(network.tile))
    made_from: dict[str, Any] = {
        "run": run.info["id"],
        "weights": hashlib.sha256(run.weights_file.read_bytes()).hexdigest(),
        "scene": [scene.path.name, stamp_of(scene.path)],
        "tile": list(network.tile),
        "overlap": settings.overlap if network.dense else None,
        "cell": cell,
        "probabilities": settings.probabilities,
        "tta": settings.tta,
    }
    size, transform = scene.size, scene.transform
    if cell is not None:
        size = (-(-scene.size[0] // cell), -(-scene.size[1] // cell))
        t = transform  # written out: the operator for this differs between the releases of affine
        transform = Affine(t.a * cell, t.b * cell, t.c, t.d * cell, t.e * cell, t.f)
    return MapFormat(size, scene.crs, transform, network.classes, settings.probabilities, made_from)


def _dense(
    network: TileNetwork,
    scene: Scene,
    writer: MapWriter,
    settings: MapSettings,
    pool: ThreadPoolExecutor | None,
    show: Callable[[Any], Any],
) -> None:
    """Give every pixel a class, row of tiles by row of tiles."""
    grid = Grid(scene.size, network.tile, round(settings.overlap * min(network.tile)))
    weights, tops = hann(network.tile), grid.tops
    classes = len(network.classes)
    parts = grid.bands(classes, _BUDGET)
    todo = [(part, row) for part in range(len(parts)) for row in range(len(tops)) if f"{part}-{row}" not in writer.done]
    blend, reached = Blend(classes, network.tile[0], parts[0]), (-1, -1)
    with ThreadPoolExecutor(1) as disk:
        pending: Future[None] | None = None
        for part, row in show(todo):
            columns = parts[part]
            lefts = [x for x in grid.lefts if x < columns[1] and x + network.tile[1] > columns[0]]
            fresh = [row]
            if reached != (part, row - 1):  # after an interruption: the sums that the rows above left behind
                blend = Blend(classes, network.tile[0], columns)
                fresh = [r for r in range(row + 1) if tops[r] + network.tile[0] > tops[row]]
            for number, r in enumerate(fresh):
                if number:
                    blend.skip(tops[r] - tops[fresh[number - 1]])
                windows = [Window2d(tops[r], left, *network.tile) for left in lefts]
                for window, values in _through(network, scene, windows, pool):
                    if values is not None:
                        blend.add(values, weights, window.left)
            reached = (part, row)
            bottom = tops[row + 1] if row + 1 < len(tops) else scene.size[0]
            height = min(bottom, scene.size[0]) - tops[row]
            probs = blend.take(height)
            if pending is not None:
                pending.result()
            pending = disk.submit(_write_strip, scene, writer, f"{part}-{row}", probs, tops[row], columns[0])
        if pending is not None:
            pending.result()


def _write_strip(scene: Scene, writer: MapWriter, name: str, probs: NDArray[np.float32], top: int, left: int) -> None:
    """Write finished rows of a segmentation; pixels without a measurement stay without a class."""
    _, missing = scene.read(Window2d(top, left, *probs.shape[1:]))
    writer.write(name, writer.form.encode(probs, missing), top, left)


def _grid(
    network: TileNetwork,
    scene: Scene,
    writer: MapWriter,
    settings: MapSettings,
    pool: ThreadPoolExecutor | None,
    show: Callable[[Any], Any],
) -> None:
    """Give every cell a class."""
    cell = settings.cell or min(network.tile)
    height, width = writer.form.size
    offset = [(cell - side) // 2 for side in network.tile]  # from a cell's corner to the corner of the tile around it
    pieces = [top for top in range(0, height, _CELL_ROWS) if f"{top}" not in writer.done]
    for top in show(pieces):
        rows = min(_CELL_ROWS, height - top)
        windows = [
            Window2d((top + r) * cell + offset[0], c * cell + offset[1], *network.tile)
            for r in range(rows)
            for c in range(width)
        ]
        probs = np.full((len(network.classes), rows * width), np.nan, dtype=np.float32)
        for place, (_, values) in enumerate(_through(network, scene, windows, pool)):
            if values is not None:
                probs[:, place] = values
        probs = probs.reshape(-1, rows, width)
        writer.write(f"{top}", writer.form.encode(probs, np.zeros((rows, width), dtype=bool)), top, 0)


def _through(
    network: TileNetwork, scene: Scene, windows: Sequence[Window2d], pool: ThreadPoolExecutor | None
) -> Iterator[tuple[Window2d, NDArray[np.float32] | None]]:
    """Every window with what the network says about it, in order; None where there is nothing to see."""
    waiting: list[tuple[Window2d, Tile]] = []

    def flush() -> Iterator[tuple[Window2d, NDArray[np.float32] | None]]:
        found = iter(network([tile[0] for _, tile in waiting if tile is not None]))
        for window, tile in waiting:
            yield window, None if tile is None else next(found)
        waiting.clear()

    count = network.at_once
    for window, tile in _read_ahead(lambda w: _tile(network, scene, w), windows, pool, 2 * count):
        waiting.append((window, tile))
        if sum(tile is not None for _, tile in waiting) == count:
            yield from flush()
    yield from flush()


def _tile(network: TileNetwork, scene: Scene, window: Window2d) -> Tile:
    """A tile ready for the network; None where too little was measured: nothing, or for a single class under half."""
    raw, missing = scene.read(window)
    if missing.all() if network.dense else missing.mean() > 0.5:
        return None
    return network.prepare(raw), missing


def _read_ahead(
    read: Callable[[Window2d], Tile], windows: Iterable[Window2d], pool: ThreadPoolExecutor | None, ahead: int
) -> Iterator[tuple[Window2d, Tile]]:
    """Windows and their tiles, in order, read by threads `ahead` tiles ahead; decoders release the interpreter lock."""
    if pool is None:
        yield from ((window, read(window)) for window in windows)
        return
    queue: deque[tuple[Window2d, Future[Tile]]] = deque()
    for window in windows:
        queue.append((window, pool.submit(read, window)))
        if len(queue) > ahead:
            first, tile = queue.popleft()
            yield first, tile.result()
    while queue:
        first, tile = queue.popleft()
        yield first, tile.result()
