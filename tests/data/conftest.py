"""Small data sets that several tests of the data package use."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine

from r2kit.data.bluemarble import BlueMarble
from r2kit.recipe import BlueMarbleSpec


@pytest.fixture(scope="session")
def tiles(cache: Path) -> BlueMarble:
    return BlueMarble(BlueMarbleSpec(tile=64, max_per_class=40))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write noise images of a colour per class: make_folder({"a": 3, "train/b": 2}) -> root."""

    def make(counts: dict[str, int], suffix: str = ".png", size: tuple[int, int] = (20, 24)) -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / "tiles"
        for position, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (*size, 3)) + 20 * position
                Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{number:03d}{suffix}")
        return root

    return make


@pytest.fixture(scope="session")
def write_tiff() -> Callable[..., Path]:
    """Write (H, W, C) as GeoTIFF: write_tiff(path, pixels, nodata=0, descriptions=(...)) -> path."""

    def write(path: Path, pixels: np.ndarray, **options) -> Path:
        """Write (H, W, C) with rasterio; `transform` and `crs` make it georeferenced."""
        options = {"transform": Affine(10, 0, 500_000, 0, -10, 4_600_000), "crs": "EPSG:32633", **options}
        descriptions, roles, colours = (options.pop(k, None) for k in ("descriptions", "roles", "colours"))
        height, width, count = pixels.shape
        with rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=count, dtype=pixels.dtype, **options
        ) as file:
            if roles:
                file.colorinterp = roles
            file.write(pixels.transpose(2, 0, 1))
            if descriptions:
                file.descriptions = descriptions
            if colours:
                file.write_colormap(1, colours)
        return path

    return write
