import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.transform import Affine

from r2kit.data.boxes import read_coco, settle
from r2kit.data.boxes.settle import rasterize
from r2kit.objects.coco import pack_mask
from r2kit.result.detection import make_table
from r2kit.write_boxes import write_coco, write_csv, write_geojson

CLASSES = ("car", "bus")
GRID = Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)


def raster(path, grid=GRID, crs="EPSG:32633"):
    with rasterio.open(
        path, "w", driver="GTiff", height=40, width=60, count=1, dtype="uint8", transform=grid, crs=crs
    ) as file:
        file.write(np.ones((1, 40, 60), dtype=np.uint8))
    return path


@pytest.fixture
def table(tmp_path):
    raster(tmp_path / "a.tif")
    raster(tmp_path / "b.tif")
    images = pd.DataFrame({"id": ["a.tif", "b.tif"], "path": [str(tmp_path / "a.tif"), str(tmp_path / "b.tif")]})
    images = images.assign(height=40, width=60, group=None, lon=np.nan, lat=np.nan)
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 5:15] = True
    mask[13:15, 8:10] = False
    found = [
        {
            "boxes": np.array([[5, 10, 15, 20], [30.25, 8, 50, 22]], dtype=np.float32),
            "labels": np.array([1, 2]),
            "scores": np.array([0.9, 0.5]),
            "masks": [pack_mask(mask), pack_mask(mask)],
        },
        {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0), "masks": []},
    ]
    return make_table(images, found, [], CLASSES), mask


def test_csv(table, tmp_path):
    write_csv(table[0], tmp_path / "out.csv")
    read = pd.read_csv(tmp_path / "out.csv")
    assert list(read.columns) == ["path", "class", "score", "x0", "y0", "x1", "y1"]
    assert read["class"].tolist() == ["car", "bus"]
    assert read["x0"].tolist() == [5, 30.25]
    assert read["path"].str.endswith("a.tif").all()


def test_coco_comes_back_through_the_reader(table, tmp_path):
    frame, mask = table
    frame = frame.assign(path=[None if p is None or pd.isna(p) else str(p).split("/")[-1] for p in frame["path"]])
    write_coco(frame, CLASSES, tmp_path / "out.json")
    listing = read_coco(tmp_path / "out.json")
    assert [row.path.name for row in listing.images] == ["a.tif", "b.tif"]
    assert listing.classes == CLASSES
    boxes = settle(listing, [(40, 60)] * 2, "error")
    np.testing.assert_allclose(boxes.corners, [[5, 10, 15, 20], [30.25, 8, 50, 22]])
    assert boxes.label.tolist() == [1, 2]
    np.testing.assert_array_equal(rasterize(boxes.masks[0], (40, 60)), mask)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["annotations"][1]["score"] == 0.5
    assert written["annotations"][0]["area"] == mask.sum()


def test_geojson_is_where_the_object_is(table, tmp_path):
    frame, mask = table
    assert write_geojson(frame, tmp_path / "out.geojson") == 2
    written = json.loads((tmp_path / "out.geojson").read_text())
    assert [f["properties"]["class"] for f in written["features"]] == ["car", "bus"]
    geometry = written["features"][0]["geometry"]
    assert geometry["type"] == "Polygon"
    assert len(geometry["coordinates"]) == 2  # the outline, and the hole in it
    # Back in the grid of the image, the polygons are the mask.
    from rasterio.features import rasterize as burn
    from rasterio.warp import transform_geom

    back = transform_geom("EPSG:4326", "EPSG:32633", geometry)
    np.testing.assert_array_equal(burn([back], (40, 60), transform=GRID).astype(bool), mask)
    area = [sum(a * d - c * b for (a, b), (c, d) in pairwise(r)) for r in geometry["coordinates"]]
    assert area[0] > 0 > area[1]


def test_boxes_without_outline_become_rectangles(table, tmp_path):
    frame = table[0].assign(mask=None)
    write_geojson(frame, tmp_path / "out.geojson")
    first = json.loads((tmp_path / "out.geojson").read_text())["features"][0]["geometry"]["coordinates"][0]
    from rasterio.warp import transform

    x, y = transform("EPSG:4326", "EPSG:32633", *np.array(first).T)
    assert min(x) == pytest.approx(500_000 + 0.5 * 5, abs=1e-2)
    assert max(y) == pytest.approx(5_000_000 - 0.5 * 10, abs=1e-2)
    assert max(x) - min(x) == pytest.approx(5, abs=1e-2)


def test_images_without_a_place_make_no_geojson(tmp_path):
    images = pd.DataFrame({"id": ["a.png"], "path": ["a.png"], "height": 4, "width": 4, "group": None})
    found = [{"boxes": np.array([[0, 0, 2, 2.0]]), "labels": np.array([1]), "scores": np.array([0.5])}]
    table = make_table(images, found, [], CLASSES)
    assert write_geojson(table, tmp_path / "out.geojson") == 0
    assert not (tmp_path / "out.geojson").exists()
