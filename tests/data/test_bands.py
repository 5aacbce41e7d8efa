"""Bands chosen by name or position: from the recipe to the pixels, and with a run to other data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rasterio.transform import Affine

import r2kit
from r2kit.data.folder import ImageFolder
from r2kit.data.reader import choose_bands, read_image
from r2kit.errors import DataError, RecipeError
from r2kit.evaluate import evaluate
from r2kit.predict import predict
from r2kit.recipe_file import load_recipe
from r2kit.run import Run

NAMES = ("blue", "green", "red", "edge", "nir", "swir")


@pytest.fixture(scope="module")
def tiff_folder(tmp_path_factory: pytest.TempPathFactory, write_tiff: Callable[..., Path]) -> Path:
    """Two classes of 12 tiles with six named bands of uint16; only the near infrared tells the classes apart."""
    root = tmp_path_factory.mktemp("bands") / "tiles"
    rng = np.random.default_rng(0)
    for name, nir in (("bare", 900), ("crop", 3000)):
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(400, 1600, (24, 24, 6)).astype(np.uint16)
            pixels[..., 4] = rng.integers(nir - 300, nir + 300, (24, 24))
            place = Affine(1e-4, 0, number, 0, -1e-4, nir / 1000)  # no two tiles overlap
            path = root / name / f"{number:02d}.tif"
            write_tiff(path, pixels, descriptions=NAMES, transform=place, crs="EPSG:4326")
    return root


def test_names_and_positions() -> None:
    assert choose_bands(["red", "nir", 6, 1], NAMES, "x") == ("red", "nir", "swir", "blue")
    for wanted, message in (
        (["rad"], "x: no band 'rad'; there are blue, .*; did you mean 'red'"),
        ([7], "x: no band 7; there are 6, counted from 1: blue"),
        ([0], "x: no band 0;"),
        (["red", 3], "x: band 'red' is wanted twice, as red and 3"),
    ):
        with pytest.raises(DataError, match=message):
            choose_bands(wanted, NAMES, "x")


def test_a_folder_reads_the_chosen_bands_in_order(tiff_folder: Path) -> None:
    source = ImageFolder(tiff_folder, bands=["nir", 3])
    assert source.bands == ("nir", "red")
    path = source.manifest["path"].iloc[5]
    np.testing.assert_array_equal(source.read(5), read_image(path)[..., [4, 2]])
    with pytest.raises(DataError, match=r"tiles: data.bands: no band 'nri'; there are .*; did you mean 'nir'"):
        ImageFolder(tiff_folder, bands=["nri"])


def test_files_may_differ_in_bands_that_are_not_chosen(tiff_folder: Path, write_tiff: Callable[..., Path]) -> None:
    more = tiff_folder / "crop" / "more.tif"
    pixels = np.random.default_rng(1).integers(0, 3000, (24, 24, 7)).astype(np.uint16)
    write_tiff(more, pixels, descriptions=("extra", *NAMES))
    try:
        with pytest.raises(DataError, match=r"more\.tif: has 7 band\(s\) \(extra, blue"):
            ImageFolder(tiff_folder)
        source = ImageFolder(tiff_folder, bands=["nir"])
        row = source.manifest["path"].tolist().index(str(more))
        np.testing.assert_array_equal(source.read(row), pixels[..., 5:6])
        with pytest.raises(DataError, match=r"more\.tif: has 1 band\(s\) \(edge\)"):  # its fifth band is another one
            ImageFolder(tiff_folder, bands=[5])
    finally:
        more.unlink()


def test_pictures_of_one_grey_band_and_of_a_palette(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    index = np.random.default_rng(0).integers(0, 3, (4, 4, 1)).astype(np.uint8)
    colours = {0: (1, 2, 3, 255), 1: (4, 5, 6, 255), 2: (250, 251, 252, 255)}
    path = write_tiff(tmp_path / "p.tif", index, photometric="palette", colours=colours)
    np.testing.assert_array_equal(read_image(path, bands=["blue", "red"]), read_image(path)[..., [2, 0]])


def test_the_recipe_refuses_what_cannot_be() -> None:
    for bands, message in (
        ("[]", "data.bands: got .* allowed is a list, each text or a whole number or null"),
        ("[red, red]", "data.bands: 'red' is named twice"),
        ("[1.5]", "data.bands: got"),
        ("nir", "data.bands: got nir"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe({"data": {"root": "x"}}, [f"data.bands={bands}"])
    with pytest.raises(RecipeError, match=r"data.bands: source 'bluemarble' has red, green and blue"):
        load_recipe({}, ["data.bands=[red]"])
    assert load_recipe({"data": {"root": "x"}}, ["data.bands=[red, nir, 8]"]).data.bands == ("red", "nir", 8)


def test_a_run_keeps_its_bands(tiff_folder: Path, tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    recipe = {
        "data": {"root": str(tiff_folder), "bands": ["nir", 6], "image_size": 24, "workers": 0, "split": "stratified"},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 4, "batch_size": 8, "lr": 3e-3},
    }
    run = r2kit.finetune(recipe, out=tmp_path / "run", quiet=True)
    assert run.preprocess.bands == ("nir", "swir")
    assert Run.open(run.path).recipe.data.bands == ("nir", 6)
    # The same scene with its bands in another order, and one more: the names decide.
    pixels = read_image(tiff_folder / "crop" / "00.tif")
    other = write_tiff(tmp_path / "other.tif", pixels[..., ::-1], descriptions=NAMES[::-1])
    found = predict(run, [tiff_folder / "crop" / "00.tif", other])
    np.testing.assert_array_equal(found["prob_crop"].iloc[0], found["prob_crop"].iloc[1])
    measured = evaluate(run, data=tiff_folder)
    assert measured["images"] == 24
    without = write_tiff(tmp_path / "without.tif", pixels[..., :3], descriptions=NAMES[:3])
    with pytest.raises(DataError, match=r"without\.tif: no band 'nir'; there are blue, green, red"):
        predict(run, without)
