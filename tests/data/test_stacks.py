"""Tiles whose bands come as a file each: named by one path, read as one image, from the recipe to the map."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rasterio.transform import Affine
from typer.testing import CliRunner

from r2kit.cli import app
from r2kit.data.reader import examine_image, find_images, open_raster, read_image
from r2kit.data.stacks import files_of, name_of, parts_of, stack_files, stack_path
from r2kit.errors import DataError, RecipeError
from r2kit.recipe_file import load_recipe

BANDS = ("B02", "B8A", "B03")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def write_tile(write: Callable[..., Path], stem: str, seed: int, level: int = 1000, **options) -> np.ndarray:
    """Write STEMB02.tif and STEMB03.tif of 24 x 24 and STEMB8A.tif of 12 x 12 pixels over the same ground."""
    rng = np.random.default_rng(seed)
    Path(f"{stem}x").parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": "EPSG:32633"}
    fine = rng.integers(level, level + 500, (24, 24, 2)).astype(np.uint16)
    coarse = rng.integers(level, level + 500, (12, 12, 1)).astype(np.uint16)
    east = 500_000 + 5_000 * seed
    for number, band in enumerate(("B02", "B03")):
        grid = Affine(10, 0, east, 0, -10, 4_600_000)
        write(Path(f"{stem}{band}.tif"), fine[..., number : number + 1], transform=grid, **place, **options)
    write(Path(f"{stem}B8A.tif"), coarse, transform=Affine(20, 0, east, 0, -20, 4_600_000), **place, **options)
    return fine


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory, write_tiff: Callable[..., Path]) -> Path:
    """Two classes of 10 tiles: one class a folder each, the other with a common beginning."""
    root = tmp_path_factory.mktemp("stacks") / "tiles"
    for number in range(10):
        write_tile(write_tiff, f"{root}/bare/t{number:02d}/", number)
        write_tile(write_tiff, f"{root}/crop/t{number:02d}_", 10 + number, level=3000)
    return root


def test_paths_of_stacks() -> None:
    files = {"B02": "a/t1_B02.tif", "B03": "a/t1_B03.tif"}
    assert stack_path(files) == "a/t1_{B02,B03}.tif"
    assert parts_of("a/t1_{B02,B03}.tif") == {band: Path(file) for band, file in files.items()}
    assert name_of(Path("a/t1_{B02,B03}.tif")) == name_of(Path("a/t1/{B02,B03}.tif")) == Path("a/t1")
    for given, expected in (
        ({"B02": "a/B02.tif", "B03": "a/B03.TIF"}, "a/{B02=B02.tif,B03=B03.TIF}"),
        ({"B02": "a/x_B02_10m.tif", "B05": "a/x_B05_20m.tif"}, "a/x_{B02=B02_10m,B05=B05_20m}.tif"),
        ({"red": "a/r/1.tif", "nir": "a/n/1.tif"}, "a/{red=r/1,nir=n/1}.tif"),
        ({"red": "1.tif", "nir": "/n/2.tif"}, "{red=1,nir=/n/2}.tif"),
        ({"B02": "year=2020,a/B02.tif", "B03": "year=2020,a/B03.tif"}, "year=2020,a/{B02,B03}.tif"),
    ):
        assert stack_path(given) == expected
        assert [str(file) for file in files_of(expected)] == list(given.values())
    assert parts_of("a/t1_B02.tif") is None
    assert files_of("a/t1_B02.tif") == [Path("a/t1_B02.tif")]
    for files in ({"B02": "a{1}/B02.tif"}, {"B02": "a/B02,1.tif", "B03": "a/B03.tif"}):
        with pytest.raises(DataError, match="may not have any of"):
            stack_path(files)
    with pytest.raises(DataError, match="band B02 stands twice"):
        parts_of("t_{B02,B02}.tif")


def test_a_file_whose_name_has_braces_is_a_file(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    path = write_tiff(tmp_path / "t_{1}.tif", np.ones((4, 4, 1), np.uint8))
    assert parts_of(path) is None
    assert read_image(path).shape == (4, 4, 1)


def test_files_are_put_together_by_tile() -> None:
    names = (
        "t/1/B02.tif",
        "t/1/B03.tif",
        "t/1/B01.tif",
        "t/x_B02_10m.tif",
        "t/x_B03_20m.tif",
        "t/y.B02.tif",
        "t/q.jpg",
    )
    found = stack_files([Path(name) for name in names], ("B03", "B02"))
    expected = ["t/1/{B03,B02}.tif", "t/x_{B03=B03_20m,B02=B02_10m}.tif", "t/y.{B03,B02}.tif"]
    assert [path.as_posix() for path in found] == expected  # the last one lacks a file, and says so when it is read
    with pytest.raises(DataError, match=r"B02_20m.tif: is of band B02, and t/x_B02_10m.tif too"):
        stack_files([Path("t/x_B02_10m.tif"), Path("t/x_B02_20m.tif")], ("B02",))


def test_a_stack_is_read_on_the_finest_grid(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    fine = write_tile(write_tiff, str(tmp_path / "t_"), 0)
    info, pixels = examine_image(tmp_path / "t_{B03,B8A,B02}.tif")
    assert info.bands == ("B03", "B8A", "B02")
    assert (info.dtype, info.scale, info.crs) == ("uint16", 1.0, "EPSG:32633")
    assert info.bounds == (500_000, 4_599_760, 500_240, 4_600_000)
    np.testing.assert_array_equal(pixels[..., 0], fine[..., 1])
    np.testing.assert_array_equal(pixels[..., 2], fine[..., 0])
    coarse = read_image(tmp_path / "t_B8A.tif")[..., 0].astype(float)
    # Bilinear: a fine pixel lies a quarter of a coarse one away from the middle of its own.
    expected = 0.75**2 * coarse[3, 4] + 0.75 * 0.25 * (coarse[2, 4] + coarse[3, 3]) + 0.25**2 * coarse[2, 3]
    assert abs(float(pixels[6, 8, 1]) - expected) <= 1
    few = read_image(tmp_path / "t_{B03,B8A,B02}.tif", bands=["B02", "B8A"])
    np.testing.assert_array_equal(few, pixels[..., [2, 1]])


def test_nodata_does_not_run_into_its_neighbours(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    coarse = np.full((12, 12, 1), 4000, np.uint16)
    coarse[:6] = 0
    write_tile(write_tiff, str(tmp_path / "t_"), 0, nodata=0)
    grid = Affine(20, 0, 500_000, 0, -20, 4_600_000)
    write_tiff(tmp_path / "t_B8A.tif", coarse, nodata=0, transform=grid)
    info, pixels = examine_image(tmp_path / "t_{B02,B8A}.tif")
    assert info.nodata == 0
    assert set(np.unique(pixels[..., 1])) == {0, 4000}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": True}, r"t_\{B02,B8A\}.tif: band B8A is missing: .*t_B8A.tif is no file"),
        ({"dtype": np.float32}, "B8A is of Float32 with nodata None, B02 of UInt16"),
        ({"nodata": 7}, "with nodata 7"),
        ({"east": 500_100}, r"B8A \(12 x 12 pixels\) and B02 \(24 x 24\) do not show the same ground"),
        ({"crs": "EPSG:32634"}, "do not show the same ground"),
        ({"bands": 2}, "t_B8A.tif: holds 2 bands; one is needed"),
        ({"bytes": b"\x89PNG\r\n\x1a\n" + bytes(20)}, "t_B8A.tif is no TIFF"),
        ({"bytes": b"<VRTDataset>" + bytes(20)}, "is not a JPEG, PNG, WebP or TIFF image"),
        ({"bytes": b""}, r"is empty \(0 bytes\)"),
    ],
)
def test_files_that_do_not_go_together_are_refused(
    tmp_path: Path, write_tiff: Callable[..., Path], change: dict, message: str
) -> None:
    write_tile(write_tiff, str(tmp_path / "t_"), 0)
    path = tmp_path / "t_B8A.tif"
    path.unlink()
    if "bytes" in change:
        path.write_bytes(change["bytes"])
    elif "missing" not in change:
        pixels = np.ones((12, 12, change.get("bands", 1)), change.get("dtype", np.uint16))
        grid = Affine(20, 0, change.get("east", 500_000), 0, -20, 4_600_000)
        write_tiff(path, pixels, transform=grid, crs=change.get("crs", "EPSG:32633"), nodata=change.get("nodata"))
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / "t_{B02,B8A}.tif")


def test_a_damaged_band_ends_in_a_message_that_names_the_stack_or_the_file(
    tmp_path: Path, write_tiff: Callable[..., Path]
) -> None:
    write_tile(write_tiff, str(tmp_path / "t_"), 0)
    good, rng, messages = (tmp_path / "t_B8A.tif").read_bytes(), np.random.default_rng(0), []
    for turn in range(80):
        damaged = bytearray(good if turn % 2 else good[: rng.integers(1, len(good))])
        for place in rng.integers(0, len(damaged), 4):
            damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "t_B8A.tif").write_bytes(damaged)
        try:
            read_image(tmp_path / "t_{B02,B8A}.tif")
        except DataError as error:
            messages.append(str(error))
    assert all(str(tmp_path / "t_") in message and "\n" not in message for message in messages)
    assert len(messages) > 20


def test_a_tile_that_lacks_a_file_is_left_out_and_listed(tiles: Path, tmp_path: Path) -> None:
    from r2kit.data.folder import ImageFolder

    shutil.copytree(tiles, tmp_path / "tiles")
    (tmp_path / "tiles" / "crop" / "t03_B8A.tif").unlink()
    with pytest.raises(
        DataError, match=r"1 of 20 images cannot be used: .*t03_\{B02,B8A,B03\}.tif: band B8A is missing"
    ):
        ImageFolder(tmp_path / "tiles", band_files=BANDS)
    source = ImageFolder(tmp_path / "tiles", band_files=BANDS, on_bad_file="skip")
    assert len(source.manifest) == 19
    assert len(source.skipped) == 1


def test_folders_and_beginnings_are_found(tiles: Path) -> None:
    assert len(find_images([tiles], BANDS)) == 20
    assert find_images([tiles / "crop" / "t03"], BANDS) == [tiles / "crop" / "t03_{B02,B8A,B03}.tif"]
    assert find_images([tiles / "bare" / "t03"], BANDS) == [tiles / "bare" / "t03" / "{B02,B8A,B03}.tif"]
    with pytest.raises(DataError, match=r"none of 30 files is of a band of data.band_files \(red, nir\)"):
        find_images([tiles / "bare"], ("red", "nir"))
    with pytest.raises(DataError, match="no such file or folder"):
        find_images([tiles / "crop" / "t99"], BANDS)


def test_bands_that_nobody_asked_to_put_together_are_refused(tiles: Path, tmp_path: Path) -> None:
    from r2kit.data.folder import ImageFolder

    with pytest.raises(
        DataError, match=r'60 files are 3 bands \(B02, B03, B8A\) of 20 tiles by name; .*band_files=\[B02, B03, B8A\]"'
    ):
        ImageFolder(tiles)
    for number in range(4):
        folder = tmp_path / ("a" if number % 2 else "b")
        folder.mkdir(exist_ok=True)
        (folder / f"t{number}_B02.tif").write_bytes((tiles / "crop" / f"t0{number}_B02.tif").read_bytes())
    assert len(ImageFolder(tmp_path).manifest) == 4  # one band each is an image each


def test_a_table_names_tiles_or_has_a_column_for_each_band(tiles: Path) -> None:
    from r2kit.data.sources import open_source

    def opened(rows: pd.DataFrame, **spec):
        rows.to_csv(tiles.parent / "table.csv", index=False)
        spec = {"root": str(tiles.parent / "table.csv"), "band_files": list(BANDS), "workers": 1} | spec
        return open_source(load_recipe({"data": spec}).data)

    labels = ["bare", "crop"] * 4
    paths = [f"tiles/{name}/t{number:02d}" for number, name in enumerate(labels)]
    by_tile = opened(pd.DataFrame({"path": paths, "label": labels}))
    columns = {
        band: [
            f"{p}/{band}.tif" if label == "bare" else f"{p}_{band}.tif" for p, label in zip(paths, labels, strict=True)
        ]
        for band in BANDS
    }
    by_band = opened(pd.DataFrame({**columns, "label": labels}))
    assert by_tile.bands == by_band.bands == BANDS
    assert by_tile.manifest["path"].tolist() == by_band.manifest["path"].tolist()
    np.testing.assert_array_equal(by_tile.read(3), by_band.read(3))
    chosen = opened(pd.DataFrame({"path": paths, "label": labels}), bands=["B03", 1])
    np.testing.assert_array_equal(chosen.read(3), by_tile.read(3)[..., [2, 0]])
    with pytest.raises(DataError, match="none for B8A"):
        opened(pd.DataFrame({"B02": paths, "B03": paths, "label": labels}))
    with pytest.raises(DataError, match="has a column path beside one for each band"):
        opened(pd.DataFrame({**columns, "path": paths, "label": labels}))
    with pytest.raises(DataError, match=r"outside the table's folder, first row 1: '\{B02=../x"):
        opened(pd.DataFrame({**columns, "B02": "../x.tif", "label": labels}))
    with pytest.raises(DataError, match="outside the table's folder"):
        opened(pd.DataFrame({"path": ["t/{B02=../../x,B03}.tif", *paths[1:]], "label": labels}))


def test_from_the_check_to_the_map(tiles: Path, tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    runner = CliRunner()
    given = ["data.band_files=[B02, B8A, B03]", "data.split=stratified"]
    found = runner.invoke(app, ["data", "check", str(tiles), *given, "-o", str(tmp_path / "check")])
    assert found.exit_code == 0, found.output
    found = runner.invoke(app, ["data", "stats", str(tiles), *given])
    assert "bands of 20 images" in found.output
    assert "B8A" in found.output
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {name: test_resnet.r160_in1k}\naugment: {preset: overhead}\n", encoding="utf-8")
    small = [
        "data.image_size=32",
        "train.epochs=1",
        "train.batch_size=8",
        "data.workers=0",
        "data.cache_gb=1",
        "train.lr=1e-3",
    ]
    run = str(tmp_path / "run")
    found = runner.invoke(app, ["finetune", str(recipe), f"data.root={tiles}", *given, *small, "--out", run])
    assert found.exit_code == 0, found.output
    scene = str(tiles / "crop" / "t00")
    for paths in ([str(tiles / "crop")], [scene], [f"{scene}_{{B02,B8A,B03}}.tif"]):
        found = runner.invoke(app, ["predict", run, *paths, "-o", str(tmp_path / "answers.csv")])
        assert found.exit_code == 0, found.output
    table = pd.read_csv(tmp_path / "answers.csv")
    assert table["path"].tolist() == [f"{scene}_{{B02,B8A,B03}}.tif"]
    for path in (scene, f"{scene}_{{B02,B8A,B03}}.tif"):
        found = runner.invoke(
            app, ["predict", run, path, "-o", str(tmp_path / "map.tif"), "--cell", "8", "--overwrite"]
        )
        assert found.exit_code == 0, found.output
    with open_raster(tmp_path / "map.tif") as grid:
        assert grid.shape == (3, 3)
        assert grid.crs.to_epsg() == 32633
        assert grid.transform.a == 80.0
    assert runner.invoke(app, ["evaluate", run, "--data", str(tiles)]).exit_code == 0


def test_masks_lie_beside_stacks(tiles: Path, tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    from r2kit.data.sources import open_source

    for number in range(6):
        write_tile(write_tiff, f"{tmp_path}/images/t{number}/", number)
        mask = np.zeros((24, 24, 1), np.uint8)
        mask[: 4 + number] = 1
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_tiff(tmp_path / "masks" / f"t{number}.tif", mask)
    source = open_source(load_recipe({"data": {"root": str(tmp_path), "band_files": list(BANDS)}}).data, "mask")
    assert source.read(0).shape == (24, 24, 3)
    assert (source.read_target(2).mask == 1).sum() == 6 * 24
    spec = {"source": "rasters", "root": str(tmp_path / "images"), "band_files": list(BANDS)}
    spec["rasters"] = {"labels": str(tmp_path / "masks"), "tile": 16}
    rasters = open_source(load_recipe({"data": spec}).data, "mask")
    assert rasters.bands == BANDS
    np.testing.assert_array_equal(rasters.read(0), source.read(0)[:16, :16])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "bluemarble"}, "band_files: source 'bluemarble' has whole images"),
        ({"band_files": ["B02", "B02"], "root": "x"}, "band_files: 'B02' is named twice"),
        ({"band_files": ["B02", "a,b"], "root": "x"}, "holds one of"),
    ],
)
def test_what_cannot_be_stacked_is_refused(data: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"data": {"band_files": ["B02", "B03"], **data}})
    with pytest.raises(RecipeError, match="boxes are of whole images"):
        load_recipe({"data": {"band_files": ["B02", "B03"], "root": "x"}, "task": {"kind": "detection"}})
