"""Masks of sea, land and lake, and of salient objects, under Blue Marble tiles."""

import numpy as np
import pytest
import rasterio

from r2kit.data.bluemarble import MASK_VALUES
from r2kit.data.masks import open_masks
from r2kit.data.surfaces import BlueMarbleMasks, salient_tiles, surface_tiles
from r2kit.errors import DataError
from r2kit.recipe import BlueMarbleSpec, DataSpec


@pytest.fixture(scope="module")
def surface(cache) -> BlueMarbleMasks:
    return BlueMarbleMasks(BlueMarbleSpec(tile=64, max_per_class=60))


def at(source, lon, lat) -> int:
    """The class at a place, of the tile that holds it."""
    place = source.manifest
    half = 64 * 180 / 2700 / 2
    row = int(np.flatnonzero((abs(place["lon"] - lon) < half) & (abs(place["lat"] - lat) < half))[0])
    column = int((lon - (place["lon"][row] - half)) / (2 * half) * 64)
    line = int((place["lat"][row] + half - lat) / (2 * half) * 64)
    return int(source.read_target(row).mask[line, column])


def test_places_have_the_surface_that_maps_show(cache):
    source = BlueMarbleMasks(BlueMarbleSpec(tile=64, max_per_class=None))
    assert source.classes == ("sea", "land", "lake")
    # Rows of the land mask are stored south-up: taken north-up, none of these would hold.
    assert at(source, 12.5, 42.5) == 1  # Italy
    assert at(source, 15.5, 42.9) == 0  # the Adriatic
    assert at(source, -87.0, 47.7) == 2  # Lake Superior
    assert at(source, 33.0, -1.0) == 2  # Lake Victoria
    assert at(source, 19.0, -34.0) == 1  # the Cape


def test_every_tile_has_two_surfaces_and_lakes_are_a_stratum(surface):
    shares = surface.pixels / surface.pixels.sum(axis=1, keepdims=True)
    assert (np.sort(shares, axis=1)[:, 1] >= 0.05).all()
    assert surface.strata == ("coast", "lake")
    assert ((shares[:, 2] >= 0.01) == (surface.manifest["label"] == 1)).all()
    assert surface.manifest["label"].value_counts().max() == 60


def test_files_hold_what_memory_holds(surface):
    with rasterio.open(surface.manifest["path"][5]) as image, rasterio.open(surface.manifest["mask"][5]) as mask:
        assert image.bounds == mask.bounds
        assert np.array_equal(image.read().transpose(1, 2, 0), surface.read(5))
        assert np.array_equal(mask.read(1), surface.read_target(5).mask)
        assert (image.bounds.left + image.bounds.right) / 2 == pytest.approx(surface.manifest["lon"][5])


def test_objects_are_lakes_in_land_or_islands_in_sea(cache):
    source = BlueMarbleMasks(BlueMarbleSpec(tile=32, masks="salient"))
    assert source.classes == ("background", "object")
    share = source.pixels[:, 1] / source.pixels.sum(axis=1)
    assert ((share >= 0.02) & (share <= 0.5)).all()
    assert len(source.manifest) > 100


def test_choosing_tiles():
    sea, land, lake = (MASK_VALUES[name] for name in ("sea", "land", "lake"))
    grid = np.full((16, 32), land, dtype=np.uint8)
    grid[3:5, 3:6] = lake  # a lake in land
    grid[:8, 8:16] = sea
    grid[3:6, 11:14] = land  # an island
    grid[:8, 16:20] = sea  # a coast
    grid[8:, :8] = lake  # nothing but lake
    places, label = salient_tiles(grid, 8)
    assert places.tolist() == [[0, 0], [0, 1]]
    assert label.tolist() == [1, 0]
    places, label = surface_tiles(grid, 8)
    assert places.tolist() == [[0, 0], [0, 1], [0, 2]]
    assert label.tolist() == [1, 0, 0]


def test_sources_without_masks_are_refused():
    assert open_masks(DataSpec(bluemarble=BlueMarbleSpec(tile=64, max_per_class=60))).target == "mask"
    with pytest.raises(DataError, match="'torchvision' has no masks, and this task learns from masks"):
        open_masks(DataSpec.model_validate({"source": "torchvision", "name": "eurosat"}))
