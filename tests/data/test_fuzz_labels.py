"""Damaged and absurd files of labels, by a seed: each is used, or refused in one line that names a file."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio.warp
from PIL import Image
from rasterio.transform import Affine

from r2kit.data.boxes.coco import read_coco
from r2kit.data.sources import open_source
from r2kit.data.splits import make_split
from r2kit.errors import DataError
from r2kit.recipe_file import load_recipe
from tests.data.test_fuzz import mutate
from tests.objects.toy import make_objects

ABSURD = [
    "-1",
    "1e308",
    "nan",
    "inf",
    "9" * 20,
    "null",
    '""',
    "[]",
    "{}",
    "true",
    "0",
    "../../etc/passwd",
    "\0",
    "7" * 5000,
]
VOC = """<annotation><filename>{0}.png</filename><size><width>24</width><height>24</height><depth>3</depth></size>
<object><name>a</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"""


def words(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Damage text as files get damaged, or put absurd values in place of some words."""
    if rng.integers(0, 3) == 0:
        return mutate(content, others, rng)
    pieces = re.split(r"(\W)", content.decode())
    for _ in range(int(rng.integers(1, 4))):
        pieces[int(rng.integers(0, len(pieces)))] = ABSURD[int(rng.integers(0, len(ABSURD)))]
    return "".join(pieces).encode()


def files(root: Path, write_tiff: Callable[..., Path]) -> dict[str, tuple[Path, dict]]:
    """The file of labels and the recipe that reads it, of every sort of labels."""
    rng, made = np.random.default_rng(0), {}
    make_objects(root / "yolo", 3)
    for name, kind in (("boxes.json", "instance"), ("labels/00.txt", "detection"), ("classes.txt", "detection")):
        data = {"root": str(root / "yolo" / (name if name.endswith("json") else ""))}
        made[name] = (root / "yolo" / name, {"task": {"kind": kind}, "data": data})
    for name in ("voc/JPEGImages", "voc/Annotations", "table", "masked/images", "masked/masks"):
        (root / name).mkdir(parents=True)
    rows = []
    for i in range(8):
        picture = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        picture.save(root / "table" / f"{i}.png")
        picture.save(root / "masked" / "images" / f"{i}.png")
        mask = rng.integers(0, 2, (24, 24), dtype=np.uint8)
        if i % 2:
            write_tiff(root / "masked" / "masks" / f"{i}.tif", mask[..., None], compress="deflate")
        else:
            Image.fromarray(mask).save(root / "masked" / "masks" / f"{i}.png")
        if i < 3:
            picture.save(root / "voc" / "JPEGImages" / f"{i}.png")
            (root / "voc" / "Annotations" / f"{i}.xml").write_text(VOC.format(i))
        part = {"split": "train" if i < 6 else "val", "group": f"g{i}", "lon": 1.5, "lat": 2.5}
        rows.append({"path": f"{i}.png", "label": "ab"[i % 2], **part})
    table = pd.DataFrame(rows)
    made["0.xml"] = (
        root / "voc" / "Annotations" / "0.xml",
        {"task": {"kind": "detection"}, "data": {"root": str(root / "voc")}},
    )
    for name in ("0.png", "1.tif"):
        data = {"root": str(root / "masked")}
        made[f"mask {name}"] = (root / "masked" / "masks" / name, {"task": {"kind": "segmentation"}, "data": data})
    for name, write in (("t.csv", table.to_csv), ("t.parquet", table.to_parquet)):
        write(root / "table" / name, index=False)
        kind = "multilabel" if name == "t.csv" else "classification"
        data = {"root": str(root / "table" / name)}
        made[name] = (root / "table" / name, {"task": {"kind": kind}, "data": data})
    split = table.rename(columns={"path": "id"})[["id", "split"]]
    split.to_csv(root / "table" / "split.csv", index=False)
    data = {"root": str(root / "table" / "t.csv"), "split_file": str(root / "table" / "split.csv")}
    made["split.csv"] = (root / "table" / "split.csv", {"data": data})

    scene = root / "scene.tif"
    place = {"transform": Affine(10, 0, 500_000, 0, -10, 5_000_000), "crs": "EPSG:32633", "compress": "deflate"}
    write_tiff(scene, rng.integers(1, 4000, (192, 192, 2)).astype(np.uint16), **place)
    write_tiff(root / "labels.tif", rng.integers(0, 2, (192, 192, 1)).astype(np.uint8), **place)
    features = []
    for i in range(3):
        x, y = 500_000 + 500 * i, 5_000_000 - 400 * i
        square = {"type": "Polygon", "coordinates": [[(x, y), (x + 700, y), (x + 700, y - 700), (x, y - 700), (x, y)]]}
        geometry = rasterio.warp.transform_geom("EPSG:32633", "EPSG:4326", square)
        features.append({"type": "Feature", "properties": {"kind": "ab"[i % 2]}, "geometry": geometry})
    (root / "p.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    wkb = np.array([shapely.to_wkb(shapely.geometry.shape(f["geometry"])) for f in features], dtype=object)
    kinds = [np.array(["a", "b", "a"], dtype=object)]
    for name, driver in (("p.gpkg", "GPKG"), ("p.shp", "ESRI Shapefile")):
        given = {"crs": "EPSG:4326", "geometry_type": "Polygon", "driver": driver}
        pyogrio.raw.write(root / name, wkb, kinds, ["kind"], **given)
    for name in ("labels.tif", "p.geojson", "p.gpkg", "p.shp", "scene.tif"):
        labels = "labels.tif" if name == "scene.tif" else name
        spec = {"labels": str(root / labels), "tile": 64, "min_valid": 0.1}
        spec |= {"attribute": "kind"} if name.startswith("p.") else {}
        data = {"source": "rasters", "root": str(scene), "rasters": spec, "block_degrees": 0.003}
        made[name] = (root / name, {"task": {"kind": "segmentation"}, "data": data})
    return made


def use(recipe: dict) -> None:
    """Open the data, read a few rows, divide them."""
    loaded = load_recipe(recipe, ["data.workers=1"])
    source = open_source(loaded.data, loaded.target)
    for row in range(min(2, len(source.manifest))):
        source.read(row)
        if hasattr(source, "read_target") and loaded.target in ("mask", "boxes", "outlines"):
            source.read_target(row)
    make_split(source.manifest, source.strata, loaded.data, loaded.seed, source.contents)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_damaged_labels_are_used_or_refused_in_one_line(tmp_path: Path, write_tiff, seed: int) -> None:
    made = files(tmp_path, write_tiff)
    assert len(made) == 14
    rng, refused, count = np.random.default_rng(seed), 0, 12 if seed == 0 else 100
    good = {name: path.read_bytes() for name, (path, _) in made.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders warn about damage before they go on
        for name, (path, recipe) in made.items():
            use(recipe)
            damage = words if path.suffix in (".json", ".txt", ".xml", ".csv", ".geojson") else mutate
            for number in range(count):
                path.write_bytes(damage(good[name], list(good.values()), rng))
                try:
                    use(recipe)
                except DataError as error:
                    refused += 1
                    said = str(error)
                    assert "\n" not in said, (name, number, said)
                    assert len(said) < 2000, (name, number, said)
                    assert str(tmp_path) in said or said.startswith("class '"), (name, number, said)
            path.write_bytes(good[name])
    assert refused > 0.4 * count * len(made)


def test_paths_that_no_file_can_have_are_refused_by_row(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    table = tmp_path / "t.parquet"
    for path in ("a\0.png", "a" * 5000):
        pd.DataFrame({"path": ["0.png", path], "label": ["a", "b"]}).to_parquet(table)
        with pytest.raises(
            DataError, match=r"t\.parquet: 1 of 2 rows have a path that no file can have, first row 2"
        ) as e:
            use({"data": {"root": str(table)}})
        assert len(str(e.value)) < 400
    pd.DataFrame({"path": ["0.png", "a{}.png"], "label": ["a", "b"]}).to_parquet(table)
    with pytest.raises(DataError, match=r"t\.parquet: a\{\}\.png: a band has no name"):
        use({"data": {"root": str(table)}})


def test_numbers_of_thousands_of_digits_and_long_names_are_refused(tmp_path: Path) -> None:
    root = make_objects(tmp_path / "set", 2)
    text = (root / "boxes.json").read_text()
    (root / "boxes.json").write_text(text.replace('"id": 0', f'"id": {"7" * 5000}', 1))
    with pytest.raises(DataError, match=r"boxes\.json: holds a number of more digits than any id or size has"):
        read_coco(root / "boxes.json")
    (root / "boxes.json").write_text(text.replace("00.png", "n" * 5000))
    with pytest.raises(DataError, match=r"boxes\.json: images\[0\]: image 'nnn.*\.\.\.' is no path inside"):
        read_coco(root / "boxes.json")


@pytest.mark.parametrize("value", [1e9, -1e9, 1e300])
def test_an_outline_far_outside_its_image_is_refused(tmp_path: Path, value: float) -> None:
    root = make_objects(tmp_path / "set", 2)
    data = json.loads((root / "boxes.json").read_text())
    data["annotations"][0]["segmentation"] = [[2.0, 2.0, value, 2.0, 8.0, 9.0]]
    (root / "boxes.json").write_text(json.dumps(data))
    recipe = {"task": {"kind": "detection"}, "data": {"root": str(root / "boxes.json")}}
    with pytest.raises(
        DataError, match=r"boxes\.json: annotations\[0\]: a point of the outline has x = .* further outside"
    ):
        use(recipe)


def test_a_header_of_absurd_size_is_refused_before_tiles_are_listed(tmp_path: Path, write_tiff) -> None:
    place = {"transform": Affine(1, 0, 500_000, 0, -1, 5_000_000), "crs": "EPSG:32633"}
    write_tiff(tmp_path / "labels.tif", np.ones((8, 8, 1), np.uint8), **place)
    with rasterio.open(
        tmp_path / "s.tif", "w", driver="GTiff", width=2**20, height=2**20, count=1, dtype="uint8", tiled=True,
        SPARSE_OK=True, BIGTIFF="YES", blockxsize=1024, blockysize=1024, **place,
    ):  # fmt: skip
        pass
    spec = {"labels": str(tmp_path / "labels.tif"), "tile": 64}
    data = {"source": "rasters", "root": str(tmp_path / "s.tif"), "rasters": spec}
    with pytest.raises(
        DataError, match=r"s\.tif: 1048576 x 1048576 pixels are 268435456 tiles of 64, more than 4000000"
    ):
        use({"task": {"kind": "segmentation"}, "data": data})


def test_polygons_without_a_place_on_the_raster_are_refused(tmp_path: Path, write_tiff) -> None:
    made = files(tmp_path, write_tiff)
    path, recipe = made["p.geojson"]
    text = json.loads(path.read_text())
    text["features"][1]["geometry"]["coordinates"][0][1] = [1e308, 95.0]
    path.write_text(json.dumps(text))
    with pytest.raises(DataError, match=r"p\.geojson: "):
        use(recipe)
    shutil.copy(tmp_path / "labels.tif", tmp_path / "broken.tif")
    content = bytearray((tmp_path / "broken.tif").read_bytes())
    content[-200:] = bytes(200)
    (tmp_path / "labels.tif").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.tif: cannot be read at row \d+, column \d+"):
        use(made["labels.tif"][1])
