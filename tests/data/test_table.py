from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from r2kit.data.sources import open_source
from r2kit.data.table import ImageTable
from r2kit.errors import DataError
from r2kit.recipe import DataSpec

MakeFolder = Callable[..., Path]


@pytest.fixture
def images(make_folder: MakeFolder) -> Path:
    """Folder with images/000.png ... 005.png and nothing else."""
    make_folder({"images": 6})
    return make_folder({"images": 6})


def rows(**columns) -> pd.DataFrame:
    return pd.DataFrame(
        {"path": [f"images/{i:03d}.png" for i in range(6)], "label": ["b", "a", "b", "a", "NA", "NA"], **columns}
    )


def write(folder: Path, frame: pd.DataFrame, name: str = "index.csv") -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["index.csv", "index.parquet"])
def test_all_columns(images: Path, name: str) -> None:
    frame = rows(
        split=["train", "train", "valid", "val", "Train", "test"],
        group=[1.0, 1.0, 2.0, np.nan, 3.0, 3.0],
        lon=[1.5, None, 3, 4, 5, -180],
        lat=[1, None, 3, 4, 5, 90],
        cloud=0.5,
    )
    source = open_source(DataSpec(root=str(write(images, frame, name)), workers=1))
    assert source.classes == ("NA", "a", "b")  # text, not a missing value
    manifest = source.manifest
    assert manifest["label"].tolist() == [2, 1, 2, 1, 0, 0]
    assert manifest["id"].tolist() == frame["path"].tolist()
    assert manifest["split"].tolist() == ["train", "train", "val", "val", "train", "test"]
    # A whole number stays one text in both formats, although an empty cell makes pandas call the column float.
    groups = [None if group is None else float(group) for group in manifest["group"]]
    assert groups == [1, 1, 2, None, 3, 3]
    np.testing.assert_array_equal(manifest["lon"], [1.5, np.nan, 3, 4, 5, -180])
    assert source.read(0).shape == (20, 24, 3)
    assert len(source.contents) == 6
    assert source.skipped == []


def test_parquet_keeps_whole_numbers_whole(images: Path) -> None:
    frame = rows(group=[1, 1, 2, 2, 3, 3]).assign(label=[10, 9, 10, 9, 8, 8])
    source = ImageTable(write(images, frame, "index.parquet"))
    assert source.classes == ("10", "8", "9")
    assert source.manifest["group"].tolist() == ["1", "1", "2", "2", "3", "3"]


def test_coordinates_come_from_the_file_unless_the_table_has_them(tmp_path: Path, write_tiff) -> None:
    for i in range(2):
        write_tiff(tmp_path / f"{i}.tif", np.full((4, 4, 1), i, dtype=np.uint16) + np.arange(4, dtype=np.uint16))
    frame = pd.DataFrame({"path": ["0.tif", "1.tif"], "label": ["a", "b"], "lon": [7.0, None], "lat": [50.0, None]})
    found = ImageTable(write(tmp_path, frame)).manifest
    assert (found["lon"][0], found["lat"][0]) == (7.0, 50.0)
    assert (round(found["lon"][1], 2), round(found["lat"][1], 2)) == (15.0, 41.55)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="label"), r"no column 'label'; it has path"),
        (
            lambda f: f.rename(columns={"label": "Lable"}),
            r"no column 'label'; it has path, Lable; did you mean 'Lable'",
        ),
        (lambda f: f.rename(columns={"path": "filename"}), "column 'filename': rename it to 'path'"),
        (lambda f: f.assign(Group=1), "column 'Group': rename it to 'group' if it holds that"),
        (lambda f: f.assign(longitude=1.0), "column 'longitude': rename it to 'lon'"),
        (lambda f: f.assign(lon=1.0), "has only one of the columns lon and lat"),
        (
            lambda f: f.assign(lon=200.0, lat=0),
            r"6 of 6 rows have a lon that is no number of degrees within 180, .*'200",
        ),
        (lambda f: f.assign(lon="x", lat=0), r"6 of 6 rows have a lon that is no number"),
        (
            lambda f: f.assign(lon=[1, 2, 3, 4, 5, None], lat=0),
            r"1 of 6 rows have only one of lon and lat, first row 6",
        ),
        (lambda f: f.assign(split="trian"), r"split 'trian' is unknown \(6 row\(s\)\); allowed .*did you mean 'train'"),
        (
            lambda f: f.assign(split=["train"] * 5 + [""]),
            r"1 of 6 rows have no split while others have one, first row 6",
        ),
        (lambda f: f.assign(split="test"), r"no row has the split train; leave the column out"),
        (
            lambda f: f.assign(split=["train"] * 4 + ["val"] * 2),
            r"2 of 6 rows are of a label without a train row, .* 5",
        ),
        (lambda f: f.assign(label=["b", ""] * 3), r"3 of 6 rows have no label, first row 2: 'images/001\.png'"),
        (lambda f: f.assign(label="b"), r"only one label, 'b'"),
        (
            lambda f: f.assign(path="images/000.png"),
            r"is listed with the labels b and a and NA; an image has one label",
        ),
        (lambda f: pd.concat([f, f[:1]]), r"'images/000\.png' is listed 2 times"),
        (lambda f: f.assign(path=["images/../images/001.png", *f["path"][1:]]), "'images/001.png' is listed"),
        (
            lambda f: f.assign(path=["../x.png", *f["path"][1:]]),
            r"outside the table's folder, .*data\.allow_outside=true",
        ),
        (lambda f: f.assign(path=["images/../../x.png", *f["path"][1:]]), r"1 of 6 rows have a path outside .*'\.\./x"),
        (lambda f: f.assign(path=["/etc/passwd", *f["path"][1:]]), r"first row 1: '/etc/passwd'"),
        (lambda f: f[:0], "holds no row"),
    ],
)
def test_what_is_wrong_is_one_line(images: Path, change, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ImageTable(write(images, change(rows())))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(images / "index.csv"))


def test_missing_files_are_counted(images: Path) -> None:
    frame = rows()
    frame.loc[:3, "path"] = [f"gone/{i}.png" for i in range(4)]
    frame["label"] = ["a", "b", "a", "b", "a", "b"]
    path = write(images, frame)
    with pytest.raises(
        DataError, match=r"4 of 6 images cannot be used: .*gone/0\.png: no such file;.*; and 1 more; mend"
    ):
        ImageTable(path)
    source = ImageTable(path, on_bad_file="skip")
    assert (len(source.manifest), len(source.skipped)) == (2, 4)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path;label\nx.png;a\n")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "c.csv").write_text("path,label\nx.png,a,3,4\n")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "e.csv").write_text("")
    for name, message in (
        ("a.csv", r"no column 'path'; it has path;label.*separate the columns by commas"),
        ("b.csv", "cannot be read as a table of images"),
        ("c.csv", "more cells in a row than columns"),
        ("d.parquet", "cannot be read as a table of images"),
        ("e.csv", "cannot be read as a table of images"),
        ("f.csv", "no such file"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            ImageTable(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_outside_paths_where_allowed(images: Path) -> None:
    inner = images / "tables"
    inner.mkdir()
    frame = rows().assign(path=[f"../images/{i:03d}.png" for i in range(5)] + [str(images / "images/005.png")])
    source = open_source(DataSpec(root=str(write(inner, frame)), allow_outside=True, workers=1))
    assert source.read(5).shape == (20, 24, 3)


def test_the_same_pixels_under_two_labels_are_refused(images: Path) -> None:
    (images / "images/001.png").write_bytes((images / "images/000.png").read_bytes())
    path = write(images, rows())
    with pytest.raises(
        DataError,
        match=r"000\.png: is of class 'b', and images/001\.png with the same pixels of 'a'; .*data\.on_bad_file",
    ):
        ImageTable(path)
    with pytest.raises(DataError, match=r"2 of 6 images cannot be used"):
        ImageTable(path)
    assert len(ImageTable(path, on_bad_file="skip").manifest) == 4
