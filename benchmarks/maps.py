"""Maps of scenes: the most memory that a large one takes, and the seams that tiles leave by their overlap.

    python benchmarks/maps.py memory RUN [--side 30000] [--rows 30000]
    python benchmarks/maps.py seams RUN [--side 512]

`memory` writes a scene of random ground block by block and maps it; the network is one 1x1 convolution, so that
reading, blending and writing are what is measured, and RUN gives bands and classes. `seams` maps a piece of NASA's Blue
Marble with the network of RUN, and compares every overlap with the map of overlap 3/4.
"""

import argparse
import dataclasses
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from affine import Affine
from rasterio.windows import Window
from torch import nn

from r2kit.data.reader import keep_raster_open, open_raster
from r2kit.maps import MapSettings, engine, predict_map
from r2kit.maps.network import TileNetwork
from r2kit.maps.tiling import starts
from r2kit.run import Run

OVERLAPS = (0.0, 0.125, 0.25, 0.5)
REFERENCE = 0.75
NEAR = 4  # pixels from the rim of a tile
BLOCK = 2048
TOP, LEFT = 500, 2600  # Europe and the Mediterranean


class Small(TileNetwork):
    """A `TileNetwork` of one 1x1 convolution."""

    def __init__(
        self, run: Run, tile: tuple[int, int] | None = None, device: str = "auto", *, tta: bool = False
    ) -> None:
        self.dense, self.classes, self.tile = True, run.preprocess.classes, tile or (512, 512)
        self._preprocess = dataclasses.replace(run.preprocess, size=self.tile, resize="squash")
        self._size, self._fill = self.tile, (0, 0)
        self.device, self._layout = torch.device("cpu"), torch.contiguous_format
        self.orientations = range(8 if tta else 1)
        self._model = nn.Conv2d(len(run.preprocess.bands), len(self.classes), 1).eval()


def peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def write_scene(path: Path, rows: int, side: int) -> None:
    rng = np.random.default_rng(0)
    profile = {"height": rows, "width": side, "count": 3, "dtype": "uint8", "photometric": "RGB", "tiled": True}
    profile |= {"crs": "EPSG:32633", "transform": Affine(10, 0, 500_000, 0, -10, 4_600_000), "compress": "deflate"}
    block = np.repeat(np.repeat(rng.integers(0, 255, (3, BLOCK // 32, BLOCK // 32), dtype=np.uint8), 32, 1), 32, 2)
    with keep_raster_open(path, "GTiff", "w", profile | {"blockxsize": 512, "blockysize": 512}) as file:
        for top in range(0, rows, BLOCK):
            for left in range(0, side, BLOCK):
                height, width = min(BLOCK, rows - top), min(BLOCK, side - left)
                file.write(block[:, :height, :width], window=Window(left, top, width, height))


def memory(run: Run, rows: int, side: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scene = Path(folder) / "scene.tif"
        writer = multiprocessing.get_context("spawn").Process(target=write_scene, args=(scene, rows, side))
        writer.start()
        writer.join()  # a process of its own: what it took is not this one's peak
        before, start = peak_mb(), time.perf_counter()
        engine.TileNetwork = Small
        made = predict_map(run, scene, Path(folder) / "map.tif", MapSettings(device="cpu"))
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{rows} x {side} pixels, scene {scene.stat().st_size / 1e6:.0f} MB, map {made.stat().st_size / 1e6:.0f} MB"
        )
        print(f"peak resident memory {peak_mb():.0f} MB (before the map {before:.0f} MB), {minutes:.1f} minutes")


def seams(run: Run, side: int) -> None:
    from r2kit.data.bluemarble import load_grids, raw_files, write_geotiff

    image = load_grids(*raw_files())[0][TOP : TOP + side, LEFT : LEFT + side]
    with tempfile.TemporaryDirectory() as folder:
        scene = Path(folder) / "scene.tif"
        write_geotiff(scene, image, LEFT / 15 - 180, 90 - TOP / 15)
        tile = TileNetwork(run).tile
        found = {}
        for overlap in (REFERENCE, *OVERLAPS):
            out = Path(folder) / f"map-{overlap}.tif"
            predict_map(run, scene, out, MapSettings(overlap=overlap, probabilities=True, device="cpu"))
            with open_raster(out) as file:
                pixels = file.read()
            found[overlap] = pixels[0], pixels[2:].astype(float) / 100
        label, probs = found[REFERENCE]
        print(f"{side} x {side} pixels in tiles of {tile[0]} x {tile[1]}, beside overlap {REFERENCE:g}")
        print("overlap  tiles  pixels of another class  within 4 px of a rim  mean |p - p'|  step at rims / elsewhere")
        for overlap in OVERLAPS:
            tops = starts(side, tile[0], round(overlap * min(tile)))
            rims = np.array(sorted(set(tops[1:]) | {t + tile[0] for t in tops[:-1]}))
            near = np.zeros(side, dtype=bool)
            for rim in rims:
                near[max(rim - NEAR, 0) : rim + NEAR] = True
            at = near[:, None] | near[None, :]
            other = found[overlap][0] != label
            gap = np.abs(found[overlap][1] - probs).mean()
            step = np.abs(np.diff(found[overlap][1], axis=1)).mean(axis=(0, 1))
            ratio = step[rims - 1].mean() / np.delete(step, rims - 1).mean()
            print(
                f"{overlap:7.3f}  {len(tops) ** 2:5d}  {100 * other.mean():21.2f} %  {100 * other[at].mean():18.2f} %  "
                f"{gap:13.4f}  {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "seams"])
    parser.add_argument("run")
    parser.add_argument("--side", type=int)
    parser.add_argument("--rows", type=int)
    given = parser.parse_args()
    opened = Run.open(given.run)
    if given.what == "memory":
        side = given.side or 30_000
        memory(opened, given.rows or side, side)
    else:
        seams(opened, given.side or 512)
