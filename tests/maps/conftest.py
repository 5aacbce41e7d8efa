"""A scene with three kinds of ground, and a segmentation that needs no training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import Affine
from torch import nn

from r2kit.data.reader import keep_raster_open
from r2kit.maps import engine
from r2kit.maps.network import TileNetwork
from tests.conftest import COLOURS


class Blur(nn.Module):
    """Three classes from the colour around a pixel: what stands beyond the tile's rim matters, as for any network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 9, padding=4, bias=False)
        nn.init.constant_(self.conv.weight, 0.0)
        for label, band in enumerate((1, 0, 2)):  # field is green, sand is red, water is blue
            self.conv.weight.data[label, band] = 1 / 81

    def forward(self, image):
        return 4 * self.conv(image)


class PixelNetwork(TileNetwork):
    """A `TileNetwork` around `Blur`, without a run."""

    def __init__(self, preprocess, tile: tuple[int, int]) -> None:
        import dataclasses

        self.dense, self.classes, self.tile = True, preprocess.classes, tile
        self._preprocess = dataclasses.replace(preprocess, size=tile, resize="squash")
        self._size, self._fill = tile, (0, 0)
        self.device, self._layout = torch.device("cpu"), torch.contiguous_format
        self.orientations = range(1)
        self._model = Blur().eval()


def write_raster(path: Path, pixels: np.ndarray, **profile) -> Path:
    """Write (H, W, C) as GeoTIFF, with or without a place."""
    height, width, count = pixels.shape
    profile |= {"height": height, "width": width, "count": count, "dtype": pixels.dtype}
    with keep_raster_open(path, "GTiff", "w", profile) as file:
        file.write(pixels.transpose(2, 0, 1))
    return path


@pytest.fixture
def pixel_network(monkeypatch, finished_run) -> Callable[..., PixelNetwork]:
    """Make maps with `Blur`: pixel_network((64, 64)) puts it in the place of the run's network."""

    def use(tile: tuple[int, int]) -> PixelNetwork:
        network = PixelNetwork(finished_run.preprocess, tile)
        monkeypatch.setattr(engine, "TileNetwork", lambda run, given=None, device="auto", *, tta=False: network)
        return network

    return use


@pytest.fixture(scope="session")
def make_scene(tmp_path_factory) -> Callable[..., Path]:
    """Write a scene of stripes of the test classes' colours: make_scene(150, 200, nodata=0) -> path."""

    def make(height: int, width: int, **options) -> Path:
        rng = np.random.default_rng(height * 10_007 + width)
        colours = np.array([COLOURS[name] for name in sorted(COLOURS)])
        kind = (np.arange(height)[:, None] // 40 + np.arange(width)[None, :] // 56) % 3
        pixels = np.clip(colours[kind] + rng.normal(0, 25, (height, width, 3)), 1, 255).astype(np.uint8)
        if "nodata" in options:
            pixels[10:50, 20:90] = options["nodata"]
        path = tmp_path_factory.mktemp("scenes") / "scene.tif"
        profile = {"crs": "EPSG:32633", "transform": Affine(10, 0, 500_000, 0, -10, 4_600_000), **options}
        return write_raster(path, pixels, photometric="RGB", **profile)

    return make
