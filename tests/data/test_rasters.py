"""Large rasters cut into tiles while they are read, labelled by mask rasters and by polygons in any coordinates."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
import torch
from rasterio.transform import Affine

from r2kit.data.datamodule import DataModule
from r2kit.data.dense import MaskSamples
from r2kit.data.polygons import place_of
from r2kit.data.preprocess import Preprocess
from r2kit.data.rasters import RasterTiles
from r2kit.data.sources import open_source
from r2kit.data.statistics import band_statistics
from r2kit.data.targets import IGNORE
from r2kit.errors import DataError, RecipeError
from r2kit.recipe import AugmentSpec, DataSpec
from r2kit.recipe_file import load_recipe

GRID = Affine(10, 0, 500_000, 0, -10, 4_600_000)  # EPSG:32633
NODATA = -99


def values_of(height: int, width: int) -> np.ndarray:
    """A pixel says where it is: row * 1000 + column."""
    return (np.arange(height)[:, None] * 1000 + np.arange(width)).astype(np.float32)


def write(path: Path, band: np.ndarray, transform: Affine = GRID, crs: str = "EPSG:32633", **options) -> Path:
    bands = band if band.ndim == 3 else band[None]
    profile = {"driver": "GTiff", "height": bands.shape[1], "width": bands.shape[2], "count": len(bands)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **profile, dtype=bands.dtype, transform=transform, crs=crs, **options) as out:
        out.write(bands)
    return path


@pytest.fixture
def scene(tmp_path) -> Path:
    """150 x 100 pixels with two bands; the upper left 40 x 40 was not measured."""
    band = values_of(150, 100)
    band[:40, :40] = NODATA
    return write(tmp_path / "scene.tif", np.stack([band, np.where(band == NODATA, NODATA, -band)]), nodata=NODATA)


def spec(root: Path, labels: Path, **options) -> DataSpec:
    rasters = {"labels": str(labels), "tile": 32, **options.pop("rasters", {})}
    return DataSpec.model_validate({"source": "rasters", "root": str(root), "rasters": rasters, **options})


def halves(height=150, width=100) -> np.ndarray:
    """1 in the left half, 2 in the right one."""
    return np.where(np.arange(width) < width // 2, 1, 2).astype(np.uint8) * np.ones((height, 1), dtype=np.uint8)


def at(source, y, x) -> int:
    return int(np.flatnonzero([identity.endswith(f"@{y}+{x}") for identity in source.manifest["id"]])[0])


def test_tiles_hold_their_pixels_and_their_classes(scene, tmp_path):
    source = RasterTiles(spec(scene, write(tmp_path / "mask.tif", halves())), "mask")
    assert source.classes == ("1", "2")
    assert source.bands == ("band1", "band2")
    assert source.nodata == NODATA
    row = at(source, 32, 32)
    raw, mask = source.read(row), source.read_target(row).mask
    assert np.array_equal(raw[10, 5], [42_037, -42_037])
    assert (raw[:8, :8] == NODATA).all()
    assert mask[0].tolist() == [0] * 18 + [1] * 14
    assert source.pixels[row].tolist() == [18 * 32 - 64, 14 * 32]  # what was not measured does not count
    # A tile of which less than half is measured is left out.
    assert not any(identity.endswith("@0+0") for identity in source.manifest["id"])
    lon, lat = rasterio.warp.transform("EPSG:32633", "EPSG:4326", [500_000 + 480], [4_600_000 - 480])
    assert source.manifest["lon"][row] == pytest.approx(lon[0])
    assert source.manifest["lat"][row] == pytest.approx(lat[0])


def test_tiles_at_the_border_are_filled_up_and_what_is_filled_up_has_no_class(scene, tmp_path):
    source = RasterTiles(spec(scene, write(tmp_path / "mask.tif", halves())), "mask")
    row = at(source, 128, 64)  # 22 of 32 rows lie inside
    raw, mask = source.read(row), source.read_target(row).mask
    assert raw.shape == (32, 32, 2)
    assert np.array_equal(raw[21, :, 0], raw[31, :, 0])
    assert (mask[22:] == IGNORE).all()
    assert (mask[:22] == 1).all()
    # 4 of 32 columns are too few.
    assert not any(identity.endswith("@32+96") for identity in source.manifest["id"])


def test_bands_are_chosen_by_name_and_position(scene, tmp_path):
    source = RasterTiles(spec(scene, write(tmp_path / "mask.tif", halves()), bands=["band2", 1]), "mask")
    assert source.bands == ("band2", "band1")
    assert np.array_equal(source.read(at(source, 32, 32))[10, 5], [-42_037, 42_037])


# rasterio 1.4 multiplies as affine 3 is giving up.
@pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
def test_a_mask_on_another_grid_and_in_other_coordinates_is_brought_to_the_pixels(scene, tmp_path):
    # The same halves with pixels of 5 m, covering the upper two thirds alone.
    fine = np.repeat(np.repeat(halves(100, 100), 2, axis=0), 2, axis=1)
    finer = write(tmp_path / "fine.tif", fine, Affine(5, 0, 500_000, 0, -5, 4_600_000))
    source = RasterTiles(spec(scene, finer), "mask")
    assert source.read_target(at(source, 32, 32)).mask[0].tolist() == [0] * 18 + [1] * 14
    lower = source._encode(source._read_labels((0, 96, 64)))
    assert (lower[4:] == IGNORE).all()
    assert (lower[:4] == 1).all()
    # The same in degrees.
    with rasterio.open(finer) as src:
        grid, width, height = rasterio.warp.calculate_default_transform(
            src.crs, "EPSG:4326", src.width, src.height, *src.bounds
        )
        turned = np.zeros((height, width), dtype=np.uint8)
        rasterio.warp.reproject(fine, turned, src_transform=src.transform, src_crs=src.crs, dst_transform=grid,
                                dst_crs="EPSG:4326")  # fmt: skip
    source = RasterTiles(spec(scene, write(tmp_path / "degrees.tif", turned, grid, "EPSG:4326", nodata=0)), "mask")
    row = source.read_target(at(source, 32, 32)).mask[10]
    assert abs((row == 0).sum() - 18) <= 1
    assert set(row.tolist()) == {0, 1}


def geojson(path: Path, boxes: list[tuple[float, float, float, float, str | None]], crs="EPSG:32633") -> Path:
    """Boxes in pixels of the scene (left, top, right, bottom, kind), written in degrees."""
    features = []
    for left, top, right, bottom, kind in boxes:
        corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        xs, ys = zip(*(place_of(GRID, *corner) for corner in corners), strict=True)
        lon, lat = rasterio.warp.transform(crs, "EPSG:4326", xs, ys)
        ring = [list(point) for point in zip(lon, lat, strict=True)]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "properties": {"kind": kind}, "geometry": geometry})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_polygons_in_degrees_label_pixels_in_metres(scene, tmp_path):
    file = geojson(tmp_path / "fields.geojson", [(40, 40, 60, 60, "wheat"), (50, 50, 90, 70, "maize")])
    source = RasterTiles(spec(scene, file, rasters={"attribute": "kind"}), "mask")
    assert source.classes == ("background", "maize", "wheat")
    mask = source.read_target(at(source, 32, 32)).mask
    truth = np.zeros((32, 32), dtype=np.uint8)
    truth[8:28, 8:28] = 2
    truth[18:32, 18:32] = 1  # the later polygon of the file lies on top
    assert (mask != truth).mean() < 0.02
    known = RasterTiles(spec(scene, file, rasters={"attribute": "kind", "background": None, "min_valid": 0.2}), "mask")
    assert known.classes == ("maize", "wheat")
    assert (known.read_target(at(known, 32, 32)).mask[:7] == IGNORE).all()
    alone = RasterTiles(spec(scene, file), "mask")
    assert alone.classes == ("background", "object")


def test_a_geopackage_serves_as_well(scene, tmp_path):
    import pyogrio
    import shapely

    box = shapely.box(*place_of(GRID, 40, 60), *place_of(GRID, 60, 40))
    pyogrio.raw.write(
        tmp_path / "f.gpkg", np.array([shapely.to_wkb(box)]), [np.array(["wheat"], dtype=object)], np.array(["kind"]),
        geometry_type="Polygon", crs="EPSG:32633",
    )  # fmt: skip
    source = RasterTiles(spec(scene, tmp_path / "f.gpkg", rasters={"attribute": "kind"}), "mask")
    mask = source.read_target(at(source, 32, 32)).mask
    assert np.array_equal(np.argwhere(mask == 1)[[0, -1]], [[8, 8], [27, 27]])


def test_tiles_of_one_class_for_a_classifier(scene, tmp_path):
    source = open_source(spec(scene, write(tmp_path / "mask.tif", halves())), "class")
    assert source.strata == source.classes == ("1", "2")
    assert source.manifest["label"][at(source, 64, 0)] == 0
    assert source.manifest["label"][at(source, 64, 64)] == 1
    assert not any(identity.endswith("@64+32") for identity in source.manifest["id"])  # 18 of 32 columns: not pure
    loose = open_source(spec(scene, tmp_path / "mask.tif", rasters={"purity": 0.5}), "class")
    assert loose.manifest["label"][at(loose, 64, 32)] == 0


def test_a_source_crosses_into_another_process(scene, tmp_path):
    source = RasterTiles(spec(scene, write(tmp_path / "mask.tif", halves())), "mask")
    first = source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy._open.datasets == {}
    assert np.array_equal(copy.read(0), first)
    copy._open.process = -5  # as after a fork: handles of the parent are not used
    assert np.array_equal(copy.read(0), first)
    assert source.start_method in ("forkserver", "spawn")


def test_blocks_divide_the_tiles_of_a_scene(tmp_path):
    big = write(tmp_path / "big.tif", np.stack([values_of(320, 320)]))
    data = spec(big, write(tmp_path / "mask.tif", halves(320, 320)), block_degrees=0.01, image_size=32, workers=2)
    module = DataModule(data, AugmentSpec(), seed=0, batch_size=8, target="mask")
    module.setup()
    assert module.split.kind == "blocks"
    train = set(module.split.blocks[module.split.train])
    assert not train & set(module.split.blocks[module.split.test])
    batch = next(iter(module.train_dataloader()))  # read by processes that start afresh
    assert batch["image"].shape == (8, 1, 32, 32)
    assert batch["mask"].shape == (8, 32, 32)


def test_several_rasters_and_a_folder_of_masks(scene, tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        write(tmp_path / "in" / f"{name}.tif", values_of(64, 64))
        write(tmp_path / "out" / f"{name}.tif", np.full((64, 64), value, dtype=np.uint8))
    source = RasterTiles(spec(tmp_path / "in", tmp_path / "out"), "mask")
    assert len(source.manifest) == 8
    assert source.pixels.sum(axis=0).tolist() == [4096, 4096]
    (tmp_path / "out" / "b.tif").unlink()
    with pytest.raises(DataError, match=r"b.tif: has no mask; expected .*out/b.tif"):
        RasterTiles(spec(tmp_path / "in", tmp_path / "out"), "mask")
    write(tmp_path / "in" / "c.tif", values_of(64, 64), nodata=3)
    write(tmp_path / "out" / "b.tif", np.ones((64, 64), dtype=np.uint8))
    with pytest.raises(DataError, match=r"c.tif: has bands band1 of float32 with nodata 3.*all rasters must be alike"):
        RasterTiles(spec(tmp_path / "in", tmp_path / "out"), "mask")


def test_labels_that_cannot_be_used(scene, tmp_path):
    mask = write(tmp_path / "mask.tif", halves())
    file = geojson(tmp_path / "f.geojson", [(40, 40, 60, 60, "wheat"), (0, 0, 5, 5, None)])
    far = write(tmp_path / "far.tif", halves(), Affine(10, 0, 900_000, 0, -10, 4_600_000))
    point = {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [15, 41]}}
    (tmp_path / "p.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [point]}))
    (tmp_path / "n.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    for labels, options, message in (
        (file, {"attribute": "knd"}, "no attribute 'knd'; it has kind; did you mean 'kind'"),
        (file, {"attribute": "kind"}, r"1 polygon\(s\) have no kind, first feature 2"),
        (tmp_path / "p.geojson", {}, "feature 1 is a Point, not a polygon"),
        (tmp_path / "n.geojson", {}, "holds no polygon"),
        (tmp_path / "no.gpkg", {}, "no such file"),
        (far, {}, "at least two classes are needed|none of 20 tiles"),
        (tmp_path / "no.tif", {}, "no such mask raster"),
    ):
        with pytest.raises(DataError, match=message):
            RasterTiles(spec(scene, labels, rasters=options), "mask")
    with pytest.raises(DataError, match="holds value 2, which no class has"):
        RasterTiles(spec(scene, mask, masks={"classes": {"a": 1, "b": 7}}), "mask")
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(DataError, match=r"text.tif: cannot be opened as a raster"):
        RasterTiles(spec(tmp_path / "text.tif", mask), "mask")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data={source: rasters, root: a.tif}", "data.rasters.labels: source 'rasters' needs the rasters and what"),
        ("data={source: folder, root: a, rasters: {labels: b.tif}}", "only source 'rasters' reads them"),
        ("data={source: rasters, root: a, rasters: {labels: b.tif, attribute: c}}", "only polygons have attributes"),
    ],
)
def test_recipes_that_contradict_themselves(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, [override])


@pytest.mark.parametrize("inside", [True, False], ids=["band", "mask"])
def test_what_is_transparent_was_not_measured(tmp_path, inside):
    # An orthophoto: its collar is black, and a map of it leaves the collar without a class.
    rgb = np.full((3, 64, 96), 90, np.uint8) + np.arange(96, dtype=np.uint8)
    opaque = np.full((64, 96), 255, np.uint8)
    opaque[:, :12], opaque[:32, 64:] = 0, 0
    rgb[:, opaque == 0] = 0
    scene = tmp_path / "ortho.tif"
    if inside:
        write(scene, np.concatenate([rgb, opaque[None]]), photometric="RGB", alpha="YES")
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            write(scene, rgb, photometric="RGB")
            with rasterio.open(scene, "r+") as out:
                out.write_mask(opaque)
    labels = write(tmp_path / "mask.tif", halves(64, 96))
    source = RasterTiles(spec(scene, labels), "mask")
    assert source.bands == ("red", "green", "blue")
    assert not any(identity.endswith("@0+64") for identity in source.manifest["id"])  # nothing but collar
    row = at(source, 32, 0)
    raw = source.read(row)
    assert np.isnan(raw[:, :12]).all()
    assert (raw[:, 12:] == rgb[:, 32:, 12:32].transpose(1, 2, 0)).all()
    assert source.pixels[row].tolist() == [20 * 32, 0]
    assert source.read(at(source, 32, 32)).dtype == np.uint8
    statistics = band_statistics(source, np.arange(len(source.manifest)))
    assert statistics["min"].min() > 90  # black does not count
    prep = Preprocess(
        source.bands,
        *(tuple(float(value) / 255 for value in statistics[key]) for key in ("mean", "std")),
        *(255.0, (32, 32), "squash", "bilinear", source.classes),
    )
    samples = MaskSamples(source, np.zeros(9, np.int64), prep, AugmentSpec(preset="none"), 0, train=False)
    batch = samples.collate([samples[(0, row)]])
    assert (batch["mask"][0, :, :12] == IGNORE).all()
    assert batch["image"][0, :, :, :12].abs().max() < 0.02
    assert torch.isfinite(batch["image"]).all()
