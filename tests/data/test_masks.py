"""Images with masks: what is accepted, what the values mean, and how each fault is said."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from r2kit.data.masks import open_masks, read_mask
from r2kit.data.sources import open_source
from r2kit.data.targets import IGNORE
from r2kit.errors import DataError
from r2kit.recipe import DataSpec, MaskSpec


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(seed: int, size=(12, 10)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)


def make(root: Path, masks: list[np.ndarray], folders=("images", "masks"), suffix=".png") -> Path:
    for i, mask in enumerate(masks):
        save(root / folders[0] / f"{i}{suffix}", picture(i, mask.shape[:2]))
        save(root / folders[1] / f"{i}.png", mask)
    return root


def halves(low: int, high: int, size=(12, 10)) -> np.ndarray:
    mask = np.full(size, low, dtype=np.uint8)
    mask[:, size[1] // 2 :] = high
    return mask


def opened(root: Path, **masks):
    spec = {k: masks.pop(k) for k in ("on_bad_file", "source", "allow_outside") if k in masks}
    return open_masks(DataSpec(root=str(root), workers=1, masks=MaskSpec(**masks), **spec))


def test_values_become_classes_in_the_order_of_the_values(tmp_path):
    source = opened(make(tmp_path, [halves(7, 3), halves(7, 7)]))
    assert source.classes == ("3", "7")
    assert source.target == "mask"
    assert source.strata == ("image",)
    assert np.array_equal(source.read_target(0).mask, halves(1, 0))
    assert source.pixels.tolist() == [[60, 60], [0, 120]]
    assert source.read(1).shape == (12, 10, 3)


def test_a_threshold_makes_two_classes_of_grey_masks(tmp_path):
    mask = np.tile(np.array([0, 127, 128, 250, 9], dtype=np.uint8), (4, 1))
    source = opened(make(tmp_path, [mask]), threshold=127.0, names=("land", "road"), ignore=(9,))
    assert source.classes == ("land", "road")
    assert source.read_target(0).mask[0].tolist() == [0, 0, 1, 1, IGNORE]
    assert source.pixels.tolist() == [[8, 8]]


def test_named_values_and_ignored_ones(tmp_path):
    root = make(tmp_path, [halves(255, 4), halves(0, 4)])
    source = opened(root, classes={"water": 4, "land": 0, "ice": 9}, ignore=(255,))
    assert source.classes == ("water", "land", "ice")
    assert np.array_equal(source.read_target(0).mask, halves(IGNORE, 0))
    assert source.pixels.tolist() == [[60, 0, 0], [60, 60, 0]]


def test_colours_are_classes(tmp_path):
    mask = np.zeros((4, 4, 3), dtype=np.uint8)
    mask[:2] = (0, 0, 255)
    mask[3] = (9, 9, 9)
    make(tmp_path, [mask])
    source = opened(tmp_path, classes={"land": (0, 0, 0), "water": (0, 0, 255)}, ignore=((9, 9, 9),))
    assert source.read_target(0).mask[:, 0].tolist() == [1, 1, 0, IGNORE]
    with pytest.raises(DataError, match=r"holds value \[9, 9, 9\], which no class has"):
        opened(tmp_path, classes={"land": (0, 0, 0), "water": (0, 0, 255)})
    with pytest.raises(DataError, match="holds colours, not values; name the classes by their colours"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ([halves(0, 1), halves(0, 5)], {"classes": {"a": 0, "b": 1}}, "1 of 2 .*1.png: holds value 5, which no class"),
        ([halves(0, 0)], {}, "only the value 0; at least two classes"),
        ([np.arange(120, dtype=np.uint8).reshape(12, 10)], {}, "120 values, too many to be classes; set data.masks.t"),
        ([halves(0, 1), halves(1, 255)], {}, r"255 beside 2 other values: is it a class.*data.masks.ignore=\[255\]"),
    ],
)
def test_masks_whose_values_cannot_be_classes(tmp_path, masks, options, message):
    with pytest.raises(DataError, match=message):
        opened(make(tmp_path, masks), **options)


def test_masks_of_0_and_255_are_two_classes(tmp_path):
    assert opened(make(tmp_path, [halves(0, 255)])).classes == ("0", "255")


def test_a_bad_mask_is_left_out_when_the_recipe_says_so(tmp_path):
    root = make(tmp_path, [halves(0, 1), halves(0, 1), halves(0, 1), halves(0, 7)])
    save(root / "masks" / "1.png", halves(0, 1, (6, 5)))
    (root / "masks" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    classes = {"classes": {"a": 0, "b": 1}}
    with pytest.raises(DataError, match=r"3 of 4 images cannot be used: .*1.png: is 6 x 5 pixels, its image 12 x 10"):
        opened(root, **classes)
    source = opened(root, on_bad_file="skip", **classes)
    assert source.manifest["id"].tolist() == ["images/0.png"]
    assert len(source.pixels) == len(source.contents) == 1
    assert sorted(Path(path).name for path, _ in source.skipped) == ["1.png", "2.png", "3.png"]
    save(root / "masks" / "0.png", halves(0, 9))
    with pytest.raises(DataError, match=r"0.png: holds value 9, which no class has"):
        source.read_target(0)


def test_images_without_masks_and_masks_without_images(tmp_path):
    root = make(tmp_path, [halves(0, 1), halves(0, 1)])
    (root / "masks" / "1.png").rename(root / "masks" / "one.png")
    with pytest.raises(DataError, match=r"1.png: has no mask \(1 of 2 images have none\); expected .*masks/1 with"):
        opened(root)
    save(root / "masks" / "1.png", halves(0, 1))
    with pytest.raises(DataError, match=r"one.png: has no image \(1 of 3 masks have none\)"):
        opened(root)
    (root / "masks").rename(root / "mask")
    with pytest.raises(DataError, match=r"has no folder 'masks'; did you mean 'mask'\?.*expected images/ and masks/"):
        opened(root)
    with pytest.raises(DataError, match="no such folder"):
        opened(root / "nothing")


@pytest.mark.parametrize("layout", ["{part}/{what}", "{what}/{part}"])
def test_parts_come_from_folders(tmp_path, layout):
    for part in ("train", "valid", "test"):
        folders = [layout.format(part=part, what=what) for what in ("images", "masks")]
        make(tmp_path, [halves(0, 1), halves(0, 1)], folders)
    source = opened(tmp_path)
    assert source.manifest["split"].value_counts().to_dict() == {"train": 2, "val": 2, "test": 2}


def test_a_table_names_the_mask_of_each_image(tmp_path):
    make(tmp_path, [halves(0, 1), halves(0, 1)])
    rows = {"path": ["images/0.png", "images/1.png"], "mask": ["masks/0.png", "masks/1.png"], "group": ["a", "b"]}
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    source = open_source(DataSpec(root=str(tmp_path / "t.csv"), workers=1), "mask")
    assert source.manifest["group"].tolist() == ["a", "b"]
    assert np.array_equal(source.read_target(1).mask, halves(0, 1))
    pd.DataFrame(rows).rename(columns={"mask": "masks"}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="column 'masks': rename it to 'mask'"):
        opened(tmp_path / "t.csv")
    pd.DataFrame({**rows, "mask": ["../a.png", "masks/1.png"]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="have a mask outside the table's folder"):
        opened(tmp_path / "t.csv")


def test_read_mask_takes_values_not_colours(tmp_path, write_tiff):
    values = halves(2, 5)
    palette = Image.new("P", (10, 12))
    palette.putdata(values.ravel().tolist())
    palette.putpalette([i * 3 % 256 for i in range(768)])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(values > 3).save(tmp_path / "bits.png")
    Image.fromarray(values.astype(np.uint16) * 100).save(tmp_path / "deep.png")
    write_tiff(tmp_path / "float.tif", values[..., None].astype(np.float32))
    write_tiff(tmp_path / "half.tif", values[..., None].astype(np.float32) / 4)
    assert np.array_equal(read_mask(tmp_path / "palette.png"), values)
    assert np.array_equal(read_mask(tmp_path / "bits.png"), values > 3)
    assert np.array_equal(read_mask(tmp_path / "deep.png"), values.astype(int) * 100)
    assert np.array_equal(read_mask(tmp_path / "float.tif"), values)
    with pytest.raises(DataError, match=r"half.tif: holds 0.5; the values of a mask are whole numbers"):
        read_mask(tmp_path / "half.tif")
    with pytest.raises(DataError, match="no such file"):
        read_mask(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": {"a": 0, "b": 1}, "threshold": 3.0}, "the classes name their values already"),
        ({"names": ("a", "b")}, "only a threshold needs them"),
        ({"threshold": 3.0, "names": ("a", "a")}, "both classes are 'a'"),
        ({"classes": {"a": 0, "b": (1, 2, 3)}}, "values and colours are mixed"),
        ({"classes": {"a": 0, "b": 1}, "ignore": (1,)}, "1 has two meanings"),
    ],
)
def test_meanings_that_contradict_each_other(values, message):
    with pytest.raises(ValueError, match=message):
        MaskSpec(**values)


def test_the_memory_of_a_check_follows_the_file(tmp_path):
    root = make(tmp_path, [halves(0, 1), halves(0, 1)])
    first = opened(root).fingerprint
    assert opened(root).fingerprint == first
    save(root / "masks" / "0.png", halves(1, 0))
    assert opened(root).fingerprint != first
