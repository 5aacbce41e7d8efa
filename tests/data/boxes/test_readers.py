"""COCO, YOLO and VOC describe the same boxes; whatever is wrong in a file is named by file and line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r2kit.data.boxes import read_coco, read_voc, read_yolo, settle
from r2kit.data.boxes.settle import rasterize
from r2kit.errors import DataError

# In pixels of an image 40 wide and 20 high: x0, y0, x1, y1, class
TRUTH = [(4.0, 2.0, 12.0, 10.0, "car"), (20.0, 5.0, 40.0, 20.0, "bus")]
SIZE = (20, 40)


def picture(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path


def yolo(root: Path, text: str | None = None, names: str = "car\nbus\n") -> Path:
    picture(root / "images" / "a.png")
    picture(root / "images" / "empty.png")
    lines = [
        f"{['car', 'bus'].index(name)} {(x0 + x1) / 80} {(y0 + y1) / 40} {(x1 - x0) / 40} {(y1 - y0) / 20}"
        for x0, y0, x1, y1, name in TRUTH
    ]
    (root / "labels").mkdir(exist_ok=True)
    (root / "labels" / "a.txt").write_text("\n".join(lines) if text is None else text)
    if names:
        (root / "classes.txt").write_text(names)
    return root


def voc(root: Path, objects: str | None = None, head: str = "", size: str = "") -> Path:
    picture(root / "JPEGImages" / "a.jpg")
    picture(root / "JPEGImages" / "empty.jpg")
    listed = "".join(
        f"<object><name>{name}</name><bndbox>\n<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>\n"
        for x0, y0, x1, y1, name in TRUTH
    )
    (root / "Annotations").mkdir(exist_ok=True)
    body = listed if objects is None else objects
    (root / "Annotations" / "a.xml").write_text(f"{head}<annotation>{size}\n{body}</annotation>")
    (root / "Annotations" / "empty.xml").write_text("<annotation></annotation>")
    return root


def coco_data(**changes) -> dict:
    data = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
            {"id": 9, "file_name": "empty.png", "width": 40, "height": 20},
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 5, "name": "bus"}],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": {"car": 3, "bus": 5}[name], "bbox": [x0, y0, x1 - x0, y1 - y0]}
            for i, (x0, y0, x1, y1, name) in enumerate(TRUTH)
        ],
    }
    return {**data, **changes}


def coco(root: Path, **changes) -> Path:
    for name in ("a.png", "empty.png"):
        picture(root / "images" / name)
    file = root / "boxes.json"
    file.write_text(json.dumps(coco_data(**changes)))
    return file


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_the_three_formats_say_the_same(tmp_path, kind):
    if kind == "coco":
        listing = read_coco(coco(tmp_path))
    elif kind == "yolo":
        listing = read_yolo(yolo(tmp_path))
    else:
        listing = read_voc(voc(tmp_path), ("car", "bus"))
    assert [row.path.stem for row in listing.images] == ["a", "empty"]
    assert listing.classes == ("car", "bus")
    boxes = settle(listing, [SIZE, SIZE], "error")
    assert boxes.image.tolist() == [0, 0]
    np.testing.assert_allclose(boxes.corners, [row[:4] for row in TRUTH], atol=1e-4)
    assert boxes.corners.dtype == np.float32
    assert boxes.label.tolist() == [1, 2]
    assert not boxes.crowd.any()
    assert boxes.bad == []
    # An image without an object is an image.
    assert boxes.of(1) == slice(2, 2)
    assert boxes.of(0) == slice(0, 2)


def test_voc_classes_come_from_the_files_sorted(tmp_path):
    assert read_voc(voc(tmp_path)).classes == ("bus", "car")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.1", r"a\.txt:1: 4 fields"),
        ("0 0.5 0.5 0.1 0.1\n\n9 0.5 0.5 0.1 0.1", r"a\.txt:3: class number 9, and there are 2 classes, 0 to 1"),
        ("0 0.5 nan 0.1 0.1", r"a\.txt:1: a coordinate is 'nan'; a finite number"),
        ("0 0.5 x 0.1 0.1", r"a\.txt:1: a coordinate is 'x'"),
        ("0 20 10 8 8", r"a\.txt:1: coordinates 20 10 8 8 are no shares of the image"),
        ("car 0.5 0.5 0.1 0.1", r"a\.txt:1: the class number is 'car'"),
    ],
)
def test_yolo_lines_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_yolo(yolo(tmp_path, text))


def test_yolo_layouts(tmp_path):
    root = yolo(tmp_path / "plain", names="")
    with pytest.raises(DataError, match=r"names no classes; add a classes\.txt"):
        read_yolo(root)
    assert read_yolo(root, ("car", "bus")).classes == ("car", "bus")
    (root / "data.yaml").write_text("names:\n  0: auto\n  1: 'omnibus'\n")
    assert read_yolo(root).classes == ("auto", "omnibus")
    (root / "data.yaml").write_text("names: {0: auto, 5: omnibus}\n")
    with pytest.raises(DataError, match=r"data\.yaml: key names must be a list"):
        read_yolo(root)
    (root / "labels" / "gone.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(DataError, match=r"gone\.txt: has no image"):
        read_yolo(root, ("car", "bus"))

    parted = tmp_path / "parts"
    for part in ("train", "valid"):
        yolo(parted / part, names="")
    assert {row.part for row in read_yolo(parted, ("car", "bus")).images} == {"train", "val"}
    with pytest.raises(DataError, match="has no images/ and labels/"):
        read_yolo(tmp_path)
    with pytest.raises(DataError, match="no such folder; did you mean 'parts'"):
        read_yolo(tmp_path / "part")


def test_yolo_polygons_become_boxes_with_outlines(tmp_path):
    listing = read_yolo(yolo(tmp_path, "0 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5"))
    boxes = settle(listing, [SIZE, SIZE], "error")
    np.testing.assert_allclose(boxes.corners, [[4, 2, 12, 10]], atol=1e-4)
    assert boxes.outlined
    pixels = rasterize(boxes.masks[0], SIZE)
    assert pixels[2:10, 4:12].all()
    assert pixels.sum() == 64


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("<object><bndbox/></object>", r"a\.xml:2: the object has no <name>"),
        ("\n<object><name>car</name></object>", r"a\.xml:3: the object has no <bndbox>"),
        ("<object><name>car</name><bndbox><xmin>1</xmin></bndbox></object>", r"a\.xml:2: the <bndbox> has no <ymin>"),
        (
            "<object><name>car</name><bndbox><xmin>1</xmin><ymin>2</ymin>\n<xmax>oops</xmax></bndbox></object>",
            r"a\.xml:3: xmax is 'oops'",
        ),
        ("<object>", r"a\.xml:2: is no XML: mismatched tag"),
        ("<object><name>truck</name><bndbox/></object>", r"a\.xml:2: the <bndbox> has no|class 'truck'"),
    ],
)
def test_voc_files_that_cannot_be_used(tmp_path, objects, message):
    with pytest.raises(DataError, match=message):
        read_voc(voc(tmp_path, objects), ("car", "bus"))


def test_voc_unknown_class_names_the_line(tmp_path):
    with pytest.raises(DataError, match=r"a\.xml:2: class 'car' is not one of cars, bus; did you mean 'cars'"):
        read_voc(voc(tmp_path), ("cars", "bus"))


def test_xml_entities_are_never_expanded(tmp_path):
    bomb = '<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;&x;&x;">]>\n'
    with pytest.raises(DataError, match=r"a\.xml:1: declares a document type"):
        read_voc(voc(tmp_path, head=bomb))
    outside = '<?xml version="1.0"?>\n<!DOCTYPE a SYSTEM "file:///etc/hostname">\n'
    with pytest.raises(DataError, match=r"a\.xml:2: declares a document type"):
        read_voc(voc(tmp_path, head=outside))
    with pytest.raises(DataError, match="nested deeper than"):
        read_voc(voc(tmp_path, "<a>" * 100 + "</a>" * 100))


def test_voc_parts_and_missing_images(tmp_path):
    root = voc(tmp_path)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"empty\.xml: is in none of train\.txt"):
        read_voc(root)
    (root / "ImageSets" / "Main" / "val.txt").write_text("empty 1\n")
    assert [row.part for row in read_voc(root).images] == ["train", "val"]
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.xml:1: names no image"):
        read_voc(root)
    name = "<filename>other.jpg</filename><object><name>car</name></object>"
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{name}</annotation>")
    listing = read_voc(root, ("car",))
    assert [(Path(path).name, "is not there" in reason) for path, reason in listing.missing] == [("other.jpg", True)]
    (root / "Annotations" / "a.xml").write_text("<annotation><filename>../../x.jpg</filename></annotation>")
    with pytest.raises(DataError, match="is no path inside"):
        read_voc(root)


def annotation(**changes) -> list[dict]:
    return [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 1, 5, 5], **changes}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": annotation(image_id=8)}, r"annotations\[0\]: image_id 8 is the id of no image"),
        ({"annotations": annotation(category_id=4)}, r"annotations\[0\]: category_id 4 is the id of no category"),
        ({"annotations": annotation(bbox=[1, 2, 3])}, r"annotations\[0\]: bbox is \[1, 2, 3\]"),
        ({"annotations": annotation(bbox=[1, 2, 3, None])}, r"annotations\[0\]: a number of bbox is None"),
        ({"annotations": annotation(segmentation=[[1, 2, 3]])}, "a polygon needs at least three points"),
        ({"annotations": annotation(segmentation={"counts": [1]})}, "segmentation needs size"),
        ({"annotations": annotation(iscrowd=2)}, "iscrowd is 2"),
        ({"annotations": annotation(image_id="7")}, "image_id is '7'; a whole number"),
        ({"annotations": [3]}, r"annotations\[0\]: is int, expected an object"),
        ({"categories": [{"id": 3, "name": "car"}, {"id": 3, "name": "bus"}]}, r"categories\[1\]: id 3 comes twice"),
        ({"categories": [{"id": 3, "name": "car"}, {"id": 4, "name": "car"}]}, "class 'car' is listed twice"),
        ({"categories": []}, "names no class"),
        ({"images": {}}, "is no COCO JSON: it has no list 'images'"),
        ({"images": [{"id": 7, "file_name": "/etc/passwd"}]}, "is no path inside"),
        ({"images": [{"id": 7, "file_name": "a.png"}] * 2}, r"images\[1\]: id 7 comes twice"),
        ({"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "a.png"}]}, "an image has one entry"),
    ],
)
def test_coco_entries_that_cannot_be_used(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_coco(coco(tmp_path, **changes))


def test_coco_files_that_cannot_be_used(tmp_path):
    file = coco(tmp_path)
    file.write_text('{"images": [],\n"annotations": [}')
    with pytest.raises(DataError, match=r"boxes\.json:2: is no JSON"):
        read_coco(file)
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"nested too deeply|is no JSON"):
        read_coco(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no UTF-8 text"):
        read_coco(file)
    with pytest.raises(DataError, match=r"no such file; did you mean 'boxes\.json'"):
        read_coco(tmp_path / "boxs.json")


def test_coco_images_that_are_not_there_take_their_boxes_along(tmp_path):
    file = coco(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    listing = read_coco(file)
    assert [row.path.name for row in listing.images] == ["empty.png"]
    assert listing.boxes == []
    assert listing.missing[0][0].endswith("a.png")


def test_coco_folder_with_parts(tmp_path):
    for part in ("train", "val"):
        picture(tmp_path / f"{part}2017" / f"{part}.png")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        images = [{"id": 1, "file_name": f"{part}.png"}]
        data = coco_data(images=images, annotations=annotation(image_id=1))
        (tmp_path / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(data))
    listing = read_coco(tmp_path)
    assert [row.part for row in listing.images] == ["train", "val"]
    assert [row.image for row in listing.boxes] == [0, 1]
    assert listing.root == tmp_path
    single = read_coco(tmp_path / "annotations" / "instances_val2017.json")
    assert [row.path.name for row in single.images] == ["val.png"]
    assert single.root == tmp_path


def test_coco_outlines_and_crowds(tmp_path):
    from faster_coco_eval.core import mask as coco_mask

    pixels = np.zeros(SIZE, dtype=np.uint8)
    pixels[3:9, 5:14] = 1
    packed = coco_mask.encode(np.asfortranarray(pixels))
    text = {"size": list(SIZE), "counts": packed["counts"].decode()}
    flat = pixels.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = {"size": list(SIZE), "counts": np.diff([0, *edges, flat.size]).tolist()}
    polygon = [[5.0, 3.0, 14.0, 3.0, 14.0, 9.0, 5.0, 9.0]]
    entries = [
        {**annotation(segmentation=outline, iscrowd=crowd)[0], "id": at}
        for at, (outline, crowd) in enumerate([(text, 0), (runs, 1), (polygon, 0)])
    ]
    boxes = settle(read_coco(coco(tmp_path, annotations=entries)), [SIZE, SIZE], "error")
    assert boxes.crowd.tolist() == [False, True, False]
    assert boxes.outlined
    for outline in boxes.masks:
        np.testing.assert_array_equal(rasterize(outline, SIZE), pixels.astype(bool))


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ({"size": [20, 40], "counts": [3, 5]}, "do not add up to 20 x 40"),
        ({"size": [40, 20], "counts": [800]}, "the run lengths are for"),
        ({"size": [20, 40], "counts": "zzzzzzzzzzzzzzzzzzzzz"}, "no text that COCO writes"),
        ({"size": [20, 40], "counts": "PPYo"}, "do not add up|no text"),
        ({"size": [20, 40], "counts": [-1, 801]}, "do not add up"),
    ],
)
def test_broken_run_lengths_are_refused_before_any_decoder_sees_them(tmp_path, outline, message):
    listing = read_coco(coco(tmp_path, annotations=annotation(segmentation=outline)))
    with pytest.raises(DataError, match=message):
        settle(listing, [SIZE, SIZE], "error")


@pytest.mark.parametrize(
    ("box", "reason", "kept"),
    [
        ([-0.6, 1, 8, 8], None, [0, 1, 7.4, 9]),
        ([-4, 1, 8, 8], "reaches out of the image of 40 x 20", [0, 1, 4, 9]),
        ([35, 15, 9, 9], "reaches out", [35, 15, 40, 20]),
        ([50, 1, 8, 8], "lies outside the image", None),
        ([5, 5, 0, 8], "has no area", None),
        ([5, 5, -3, 8], "has no area", None),
        ([5, 5, 0.4, 8], "less than a pixel", None),
    ],
)
def test_boxes_that_do_not_fit(tmp_path, box, reason, kept):
    listing = read_coco(coco(tmp_path, annotations=annotation(bbox=box)))
    mended = settle(listing, [SIZE, SIZE], "mend")
    np.testing.assert_allclose(mended.corners, np.reshape([] if kept is None else [kept], (-1, 4)), atol=1e-5)
    if reason is None:
        assert mended.bad == []
        assert len(settle(listing, [SIZE, SIZE], "error").corners) == 1
        return
    assert reason in mended.bad[0].reason
    assert mended.bad[0].mended == ("left out" if kept is None else "cut")
    with pytest.raises(DataError, match=rf"1 of 1 boxes do not fit: .*annotations\[0\].*{reason}.*on_bad_box=mend"):
        settle(listing, [SIZE, SIZE], "error")


def test_an_image_of_another_size_than_declared_is_refused(tmp_path):
    listing = read_coco(coco(tmp_path))
    with pytest.raises(DataError, match="is 40 x 20 pixels, and it is 20 x 40"):
        settle(listing, [(40, 20), SIZE], "error")


def test_fuzzed_files_end_in_one_clear_error(tmp_path):
    """Bits flipped and ends cut off anywhere: a listing or a DataError, nothing else."""
    rng = np.random.default_rng(1)
    cases = [
        (coco(tmp_path / "coco"), coco(tmp_path / "coco"), read_coco),
        (yolo(tmp_path / "yolo") / "labels" / "a.txt", tmp_path / "yolo", read_yolo),
        (voc(tmp_path / "voc") / "Annotations" / "a.xml", tmp_path / "voc", read_voc),
    ]
    for file, root, read in cases:
        good = file.read_bytes()
        said: list[str] = []
        for _ in range(150):
            broken = bytearray(good)
            for at in rng.integers(0, len(good), 3):
                broken[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(bytes(broken[: int(rng.integers(1, len(good) + 1))]))
            try:
                listing = read(root)
                settle(listing, [SIZE] * len(listing.images), "mend")
            except DataError as error:
                said.append(str(error))
        assert len(said) > 30
        assert all(str(tmp_path) in line and "\n" not in line for line in said)
