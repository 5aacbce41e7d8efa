"""Maps of whole scenes: what they depend on and what not, what a GIS finds in them, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from typer.testing import CliRunner

from r2kit import cli
from r2kit.data.reader import open_raster
from r2kit.errors import DataError, ModelError
from r2kit.maps import MapSettings, engine, predict_map, predict_maps
from r2kit.maps.network import TileNetwork, ground_tile
from r2kit.maps.scene import Scene
from r2kit.maps.vectors import polygons_of
from r2kit.maps.writer import MapWriter, class_names, made_with
from tests.maps.conftest import write_raster


def read(path):
    with rasterio.open(path) as file:
        return file.read()


def test_a_segmentation_map_is_where_the_scene_is(finished_run, make_scene, pixel_network, tmp_path):
    pixel_network((64, 64))
    scene = make_scene(150, 200, nodata=0)
    path = predict_map(finished_run, scene, tmp_path / "map.tif")
    with rasterio.open(path) as file, rasterio.open(scene) as source:
        assert (file.height, file.width) == (150, 200)
        assert file.crs == source.crs
        assert file.transform == source.transform
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.nodata == 255
        assert file.descriptions == ("class", "confidence, %")
        assert file.scales == (1.0, 0.01)
        classes, confidence = file.read()
    assert class_names(path) == ("field", "sand", "water")
    assert (classes[10:50, 20:90] == 255).all()
    assert (confidence[10:50, 20:90] == 255).all()
    kind = (np.arange(150)[:, None] // 40 + np.arange(200)[None, :] // 56) % 3
    known = classes != 255
    assert known.sum() == 150 * 200 - 40 * 70
    assert (classes == kind)[known].mean() > 0.8  # the blur mixes the classes along their borders
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif"]


def test_a_map_depends_neither_on_workers_nor_on_memory_nor_on_an_interruption(
    finished_run, make_scene, pixel_network, tmp_path, monkeypatch
):
    pixel_network((48, 48))
    scene = make_scene(170, 210)
    whole = read(predict_map(finished_run, scene, tmp_path / "whole.tif", MapSettings(workers=0, probabilities=True)))
    many = predict_map(finished_run, scene, tmp_path / "many.tif", MapSettings(workers=3, probabilities=True))
    np.testing.assert_array_equal(read(many), whole)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_BUDGET", 1)  # as many parts as there can be
        parts = predict_map(finished_run, scene, tmp_path / "parts.tif", MapSettings(probabilities=True))
    np.testing.assert_array_equal(read(parts), whole)

    original, count = MapWriter.write, 0

    def stop(self, name, *piece):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        original(self, name, *piece)

    with monkeypatch.context() as patched:
        patched.setattr(MapWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            predict_map(finished_run, scene, tmp_path / "broken.tif", MapSettings(probabilities=True))
    assert not (tmp_path / "broken.tif").exists()
    done = json.loads((tmp_path / ".broken.tif.done.json").read_text())["done"]
    assert len(done) == 2
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(
            MapWriter, "write", lambda self, name, *piece: (seen.append(name), original(self, name, *piece))
        )
        again = predict_map(finished_run, scene, tmp_path / "broken.tif", MapSettings(probabilities=True))
    assert not set(seen) & set(done)
    np.testing.assert_array_equal(read(again), whole)


def test_the_network_gives_a_tile_the_same_bits_in_any_company(finished_run):
    import torch

    net = TileNetwork(finished_run)
    tiles = list(torch.randn(11, 3, 32, 32))
    together = net(tiles)
    for count in (1, 3, 8):
        apart = [row for first in range(0, 11, count) for row in net(tiles[first : first + count])]
        assert all(np.array_equal(a, b) for a, b in zip(together, apart, strict=True))


def test_large_tiles_go_through_the_network_in_fewer_at_once(finished_run, make_scene, pixel_network, tmp_path):
    seen = []
    for tile in (32, 256, 512):
        network = pixel_network((tile, tile))
        network._model.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
        predict_map(finished_run, make_scene(600, 700), tmp_path / f"{tile}.tif", MapSettings())
    assert {shape[0] * shape[2] * shape[3] for shape in seen} == {8 * 32**2, 2**19}
    network.device = torch.device("cuda")  # which has the memory, and wants the work
    assert network.at_once == 8


def test_averaged_maps_do_not_depend_on_how_a_tile_lies(finished_run):
    import torch

    from r2kit.inference import ORIENTATIONS, orient

    plain, averaged = TileNetwork(finished_run), TileNetwork(finished_run, tta=True)
    tile = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    turned = [orient(tile, number) for number in range(ORIENTATIONS)]
    expected = np.mean(plain(turned), axis=0)
    assert np.ptp([row[0] for row in plain(turned)]) > 1e-4
    for row in averaged(turned):
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_averaged_maps_of_pixels_come_back_to_their_places(finished_run):
    import torch

    from r2kit.inference import ORIENTATIONS, orient, restore
    from tests.maps.conftest import PixelNetwork

    network = PixelNetwork(finished_run.preprocess, (32, 32))
    network._model.conv.weight.data[..., 5:] = 0  # looks to the left: another answer for each orientation
    tile = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    each = [torch.from_numpy(network([orient(tile, k)])[0]) for k in range(ORIENTATIONS)]
    expected = torch.stack([restore(probs, k) for k, probs in enumerate(each)]).mean(0).numpy()
    assert np.abs(expected - each[0].numpy()).max() > 0.01
    network.orientations = range(ORIENTATIONS)
    np.testing.assert_allclose(network([tile])[0], expected, atol=1e-6)


def test_a_map_says_that_it_was_averaged(finished_run, make_scene, tmp_path):
    scene, out = make_scene(96, 96), str(tmp_path / "map.tif")
    runner = CliRunner()
    arguments = ["predict", str(finished_run.path), str(scene), "-o", out]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    other = runner.invoke(cli.app, [*arguments, "--tta"])
    assert isinstance(other.exception, DataError)
    assert "made with other settings" in str(other.exception)
    assert runner.invoke(cli.app, [*arguments, "--tta", "--overwrite"]).exit_code == 0
    assert "finished already" in runner.invoke(cli.app, [*arguments, "--tta"]).output


def test_a_tall_scene_opens_no_more_files_than_there_are_threads(
    finished_run, make_scene, pixel_network, tmp_path, monkeypatch
):
    opened = []
    close = Scene.close
    monkeypatch.setattr(Scene, "close", lambda scene: (opened.append(len(scene._open)), close(scene)))
    pixel_network((32, 32))
    predict_map(finished_run, make_scene(400, 40), tmp_path / "map.tif", MapSettings(workers=2))  # 17 rows of tiles
    assert opened[0] <= 4  # two that read, one that writes, the one that began


def test_gdal_keeps_few_blocks_whatever_the_machine(finished_run, make_scene, pixel_network, tmp_path, monkeypatch):
    from rasterio.env import get_gdal_config

    seen = set()
    read, write = Scene.read, MapWriter.write

    def reading(scene, window):
        seen.add(int(get_gdal_config("GDAL_CACHEMAX")))
        return read(scene, window)

    def writing(writer, *piece):
        write(writer, *piece)
        seen.add(int(get_gdal_config("GDAL_CACHEMAX")))

    monkeypatch.setattr(Scene, "read", reading)
    monkeypatch.setattr(MapWriter, "write", writing)
    pixel_network((64, 64))
    predict_map(finished_run, make_scene(150, 200), tmp_path / "map.tif")
    assert seen == {engine._GDAL_CACHE}


def test_a_classification_gives_a_grid_map(finished_run, make_scene, tmp_path):
    scene = make_scene(150, 200, nodata=0)
    path = predict_map(finished_run, scene, tmp_path / "grid.tif", MapSettings(workers=0, probabilities=True))
    with rasterio.open(path) as file:
        assert (file.height, file.width) == (7, 9)  # cells of 24 pixels, the size of the training images
        assert file.transform.a == 240.0
        assert file.transform.c == 500_000
        pixels = file.read()
        assert file.descriptions[2] == "probability of field, %"
    assert pixels[0, 1, 2] == 255  # in the hole
    assert set(np.unique(pixels[0])) <= {0, 1, 2, 255}
    known = pixels[0] != 255
    assert np.abs(pixels[2:, known].astype(int).sum(0) - 100).max() <= 2
    np.testing.assert_array_equal(pixels[1][known], pixels[2:].max(0)[known])
    net, data = TileNetwork(finished_run), rasterio.open(scene)
    raw = data.read().transpose(1, 2, 0)[72:96, 96:120]
    assert pixels[0, 3, 4] == net([net.prepare(raw)])[0].argmax()
    data.close()
    fine = predict_map(finished_run, scene, tmp_path / "fine.tif", MapSettings(cell=8))
    with rasterio.open(fine) as file:
        assert (file.height, file.width) == (19, 25)
        assert file.transform.a == 80.0
        # A cell of the coarse map and the middle one of its nine fine cells look at the same tile.
        np.testing.assert_array_equal(file.read(1)[1::3, 1::3][:6, :8], pixels[0][:6, :8])


def test_seams_vanish_with_the_overlap(finished_run, make_scene, pixel_network, tmp_path):
    scene = make_scene(192, 192)
    pixel_network((192, 192))
    whole = read(predict_map(finished_run, scene, tmp_path / "one.tif"))[1].astype(int)
    pixel_network((48, 48))
    errors = []
    for overlap in (0.0, 0.25, 0.5):
        made = predict_map(finished_run, scene, tmp_path / f"{overlap}.tif", MapSettings(overlap=overlap))
        errors.append(np.abs(read(made)[1].astype(int) - whole).mean())
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_polygons_are_in_degrees(finished_run, make_scene, pixel_network, tmp_path):
    pixel_network((64, 64))
    scene = make_scene(150, 200, nodata=0)
    predict_map(finished_run, scene, tmp_path / "map.tif", MapSettings(vector="geojson"))
    found = json.loads((tmp_path / "map.geojson").read_text())
    assert {feature["properties"]["class"] for feature in found["features"]} == {"field", "sand", "water"}
    lon, lat = found["features"][0]["geometry"]["coordinates"][0][0]
    assert 14.99 < lon < 15.04  # the middle meridian of zone 33, and 41.5 degrees north
    assert 41.5 < lat < 41.6

    pyogrio = pytest.importorskip("pyogrio")
    predict_map(finished_run, scene, tmp_path / "map2.tif", MapSettings(vector="gpkg"))
    info = pyogrio.read_info(tmp_path / "map2.gpkg")
    assert info["features"] == len(found["features"])
    assert info["crs"] == "EPSG:4326"


def test_many_scenes_and_those_that_are_done(finished_run, make_scene, tmp_path, monkeypatch, capsys):
    scenes = []
    for index in range(3):
        scenes.append(tmp_path / f"s{index}.tif")
        scenes[-1].write_bytes(make_scene(60 + index, 60).read_bytes())
    scenes[1].write_bytes(scenes[1].read_bytes()[:300])
    with pytest.raises(DataError, match="1 of 3 scenes have no map"):
        predict_maps(finished_run, scenes, tmp_path / "maps")
    assert sorted(p.name for p in (tmp_path / "maps").glob("[!.]*")) == ["s0.map.tif", "s2.map.tif"]
    stamp = (tmp_path / "maps" / "s0.map.tif").stat().st_mtime_ns
    cli_arguments = ["predict", str(finished_run.path), str(scenes[0]), str(scenes[2]), "--map", "-o"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*cli_arguments, str(tmp_path / "maps")])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("finished already") == 2
    assert (tmp_path / "maps" / "s0.map.tif").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="other settings; give --overwrite"):
        predict_maps(finished_run, scenes[:1], tmp_path / "maps", MapSettings(cell=12))
    predict_maps(finished_run, scenes[:1], tmp_path / "maps", MapSettings(cell=12, overwrite=True))
    assert (tmp_path / "maps" / "s0.map.tif").stat().st_mtime_ns != stamp


def test_what_cannot_be_mapped_is_refused(finished_run, make_scene, tmp_path, capsys):
    scene = make_scene(60, 60)
    other = write_raster(tmp_path / "grey.tif", np.zeros((9, 9, 1), np.uint8))
    wide = write_raster(tmp_path / "wide.tif", np.zeros((9, 9, 3), np.uint16), photometric="RGB")
    for path, message in (
        (tmp_path / "scen.tif", "no such file"),
        (other, "no band 'red'.*the scene has band1"),
        (wide, "another pixel type"),
    ):
        with pytest.raises(DataError, match=message):
            predict_map(finished_run, path, tmp_path / "map.tif")
    with pytest.raises(DataError, match="2 scenes; give a folder"):
        predict_maps(finished_run, [scene, scene], tmp_path / "map.tif")
    with pytest.raises(DataError, match=r"two scenes would become scene\.map\.tif"):
        predict_maps(finished_run, [scene, scene], tmp_path / "maps")
    with pytest.raises(ModelError, match="give --cell"):
        predict_map(finished_run, scene, tmp_path / "map.tif", MapSettings(tile=(64, 64)))
    for options, message in (({"overlap": 0.9}, "0 to 0.75"), ({"cell": 0}, "one pixel"), ({"vector": "shp"}, "gpkg")):
        with pytest.raises(DataError, match=message):
            MapSettings(**options)
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", str(finished_run.path), str(scene), "--cell", "8", "-o", str(tmp_path / "t.csv")])
    assert ended.value.code == 2
    assert "--cell: is for maps" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.name.endswith("done.json")]


def test_a_scene_without_a_place_has_a_map_but_no_polygons(finished_run, make_scene, tmp_path):
    scene = make_scene(60, 72, crs=None, transform=None)
    with open_raster(predict_map(finished_run, scene, tmp_path / "map.tif")) as file:
        assert file.crs is None
        assert file.shape == (3, 3)
    with pytest.raises(DataError, match="no coordinate system"):
        predict_map(finished_run, scene, tmp_path / "other.tif", MapSettings(vector="geojson"))


def test_the_tile_is_the_ground_that_reaches_the_network(finished_run):
    import dataclasses

    pre = dataclasses.replace(finished_run.preprocess, size=(64, 32))
    assert ground_tile(pre, (100, 80)) == (100, 80)
    assert ground_tile(dataclasses.replace(pre, resize="crop"), (100, 80)) == (100, 50)
    assert ground_tile(dataclasses.replace(pre, resize="pad"), (100, 80)) == (160, 80)
    assert ground_tile(dataclasses.replace(pre, resize="tile"), (100, 80)) == (64, 32)


def test_a_folder_of_scenes_has_its_maps_left_out(finished_run, make_scene, tmp_path, capsys):
    scene = make_scene(64, 96)
    folder = tmp_path / "scenes"
    folder.mkdir()
    for name in ("a.tif", "b.tif"):
        (folder / name).write_bytes(scene.read_bytes())
    for _ in range(2):  # the second time the maps lie there as well
        maps = predict_maps(finished_run, [folder], folder)
        assert [path.name for path in maps] == ["a.map.tif", "b.map.tif"]


def test_a_map_never_replaces_its_scene(finished_run, make_scene):
    scene = make_scene(64, 96)
    before = scene.read_bytes()
    with pytest.raises(DataError, match="is a scene itself"):
        predict_maps(finished_run, [scene], scene, MapSettings(overwrite=True))
    assert scene.read_bytes() == before


def test_polygons_may_be_asked_for_after_the_map(finished_run, make_scene, tmp_path):
    scene, out = make_scene(64, 96), tmp_path / "map.tif"
    areas = out.with_suffix(".geojson")
    predict_map(finished_run, scene, out)
    assert not areas.exists()
    predict_map(finished_run, scene, out, MapSettings(vector="geojson"))
    written = areas.read_text()
    assert json.loads(written)["features"]
    out.unlink()
    with pytest.raises(DataError, match="there is no map that it is of"):
        predict_map(finished_run, scene, out, MapSettings(vector="geojson"))
    assert areas.read_text() == written


def test_settings_of_the_other_kind_of_map_are_refused(finished_run, make_scene, pixel_network, tmp_path):
    scene, out = make_scene(64, 96), tmp_path / "map.tif"
    with pytest.raises(DataError, match="--overlap: is for the map of a segmentation"):
        predict_map(finished_run, scene, out, MapSettings(overlap=0.5))
    pixel_network((32, 32))
    with pytest.raises(DataError, match="--cell: is for the grid map"):
        predict_map(finished_run, scene, out, MapSettings(cell=8))
    for side in (0, -5, 31):
        with pytest.raises(DataError, match=f"--tile: got {side}, allowed are 32"):
            MapSettings(tile=(side, side))


@pytest.mark.parametrize(("crs", "corner", "pixel"), [("EPSG:4326", 179.0, 0.03), ("EPSG:32601", 100_000.0, 2000.0)])
@pytest.mark.parametrize("vector", ["geojson", "gpkg"])
def test_polygons_are_cut_at_the_antimeridian(
    finished_run, make_scene, pixel_network, tmp_path, crs, corner, pixel, vector
):
    shapely = pytest.importorskip("shapely")
    pixel_network((64, 64))
    scene, out = tmp_path / "scene.tif", tmp_path / "map.tif"
    with open_raster(make_scene(64, 96)) as dataset:
        pixels = dataset.read()
    top = 50.0 if crs == "EPSG:4326" else 5_500_000.0
    write_raster(scene, pixels.transpose(1, 2, 0), crs=crs, transform=Affine(pixel, 0, corner, 0, -pixel, top))
    predict_map(finished_run, scene, out, MapSettings(vector=vector))
    if vector == "geojson":
        features = json.loads(out.with_suffix(".geojson").read_text())["features"]
        shapes = [shapely.from_geojson(json.dumps(feature["geometry"])) for feature in features]
    else:
        raw = pytest.importorskip("pyogrio").raw.read(out.with_suffix(".gpkg"))[2]
        shapes = list(shapely.from_wkb(raw))
    bounds = np.array([shape.bounds for shape in shapes])
    assert all(shape.geom_type == "Polygon" and shape.is_valid for shape in shapes)
    assert bounds[:, 0].min() == -180.0
    assert bounds[:, 2].max() == 180.0
    assert (bounds[:, 2] - bounds[:, 0]).max() < 10.0  # none around the world


@pytest.mark.parametrize("tile", [(72, 100), (64, 64), (33, 40)])
def test_tiles_of_any_size_reach_the_network_on_the_scale_of_training(pond_run, tile):
    tiles = TileNetwork(pond_run, tile, "cpu")
    raw = np.random.default_rng(0).integers(0, 255, (*tile, 3), dtype=np.uint8)
    image = tiles.prepare(raw)
    height, width = tile
    assert tuple(image.shape) == (3, -(-height // 32) * 32, -(-width // 32) * 32)
    expected = pond_run.preprocess.normalize(torch.from_numpy(raw).permute(2, 0, 1)[None].float())[0]
    torch.testing.assert_close(image[:, :height, :width], expected)
    (found,) = tiles([image])
    with torch.inference_mode():
        logits = pond_run.model().eval()(image[None])[0, :, :height, :width]
    assert found.shape == (2, *tile)
    np.testing.assert_allclose(found, logits.softmax(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("vector", ["geojson", "gpkg"])
def test_polygons_are_known_by_what_they_hold_not_by_their_time(
    finished_run, make_scene, pixel_network, tmp_path, vector
):
    pytest.importorskip("pyogrio")
    pixel_network((32, 32))
    one, other = make_scene(64, 96), make_scene(96, 64)
    out, areas = tmp_path / "map.tif", tmp_path / f"map.{vector}"
    far = tmp_path / "far"
    far.mkdir()
    predict_map(finished_run, other, far / "map.tif", MapSettings(vector=vector))
    predict_map(finished_run, one, out, MapSettings(vector=vector))
    own = areas.read_bytes()
    predict_map(finished_run, one, out, MapSettings(vector=vector))
    assert areas.read_bytes() == own  # finished already

    shutil.copy(far / f"map.{vector}", areas)  # of another map, and newer than this one
    predict_map(finished_run, one, out, MapSettings(vector=vector))
    assert polygons_of(areas) == made_with(out) != polygons_of(far / f"map.{vector}")
    assert _shapes(areas) != _shapes(far / f"map.{vector}")
    os.utime(out, None)  # a copy of a map is newer than its polygons, which are still its own
    stamp = areas.stat().st_mtime_ns
    predict_map(finished_run, one, out, MapSettings(vector=vector))
    assert areas.stat().st_mtime_ns == stamp

    areas.write_text('{"type": "FeatureCollection", "features": []}')  # somebody's own
    with pytest.raises(DataError, match=f"map.{vector}: exists, and no map was written into it; give --overwrite"):
        predict_map(finished_run, one, out, MapSettings(vector=vector))
    predict_map(finished_run, one, out, MapSettings(vector=vector, overwrite=True))
    assert polygons_of(areas) is not None


def _shapes(areas):
    import pyogrio

    return sorted(pyogrio.raw.read(areas)[2].tolist())
