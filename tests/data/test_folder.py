import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r2kit.data import files as files_module
from r2kit.data.folder import ImageFolder
from r2kit.errors import DataError

MakeFolder = Callable[..., Path]


def test_one_folder_per_class(make_folder: MakeFolder) -> None:
    root = make_folder({"water": 2, "Forest": 3, "urban/deep": 1})
    source = ImageFolder(root)
    assert source.classes == ("Forest", "urban", "water")
    assert source.manifest["label"].tolist() == [0, 0, 0, 1, 2, 2]
    assert source.manifest["id"].tolist()[3] == "urban/deep/000.png"
    assert source.manifest["split"].isna().all()
    assert source.manifest["lon"].isna().all()
    assert (source.bands, source.scale, source.nodata) == (("red", "green", "blue"), 255.0, None)
    np.testing.assert_array_equal(source.read(4), np.asarray(Image.open(root / "water" / "000.png")))


@pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
def test_folders_of_parts(make_folder: MakeFolder, validation: str) -> None:
    source = ImageFolder(make_folder({"train/a": 2, "train/b": 2, f"{validation}/a": 1, f"{validation}/b": 1}))
    assert source.classes == ("a", "b")
    assert sorted(source.manifest["split"]) == ["train"] * 4 + ["val"] * 2


def test_train_may_be_a_class(make_folder: MakeFolder) -> None:
    assert ImageFolder(make_folder({"train": 2, "car": 2})).classes == ("car", "train")


def test_hidden_and_archive_folders_are_no_classes(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 1, "b": 1, ".thumbs": 1, "__MACOSX": 1})
    assert ImageFolder(root).classes == ("a", "b")


def test_layouts_that_cannot_be_used(tmp_path: Path, make_folder: MakeFolder) -> None:
    root = make_folder({"a": 1, "b": 1})
    (root / "empty").mkdir()
    for path, message in (
        (root.parent / "tilse", r"tilse: no such folder; did you mean 'tiles'\?"),
        (root / "a" / "000.png", "is a file; data.root is a folder"),
        (root / "a", "has no class folders; expected root/CLASS/image"),
        (root, r"class 'empty' has no image; known suffixes are \.jpg"),
    ):
        with pytest.raises(DataError, match=message):
            ImageFolder(path)
    shutil.rmtree(root / "empty")
    shutil.rmtree(root / "b")
    with pytest.raises(DataError, match="only one class, 'a'"):
        ImageFolder(root)


def test_part_layouts_that_cannot_be_used(make_folder: MakeFolder) -> None:
    root = make_folder({"train/forest": 1, "train/water": 1, "val/forest": 1, "val/watr": 1})
    with pytest.raises(DataError, match=r"class 'watr' has no folder in train; did you mean 'water'\?"):
        ImageFolder(root)
    shutil.rmtree(root / "val" / "watr")
    (root / "masks").mkdir()
    with pytest.raises(DataError, match="masks: stands beside train; only folders named train, val and test may"):
        ImageFolder(root)


def spoil(root: Path) -> None:
    (root / "a" / "000.png").write_bytes(b"")
    whole = (root / "b" / "001.png").read_bytes()
    (root / "b" / "001.png").write_bytes(whole[: len(whole) // 2])


def test_unreadable_images_stop_or_are_listed(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 3, "b": 3})
    spoil(root)
    with pytest.raises(DataError) as caught:
        ImageFolder(root)
    message = str(caught.value)
    assert message.startswith("2 of 6 images cannot be used: ")
    assert "a/000.png: is empty (0 bytes)" in message
    assert "b/001.png: cannot be decoded" in message
    assert message.endswith("data.on_bad_file=skip")
    assert "\n" not in message

    source = ImageFolder(root, on_bad_file="skip")
    assert [Path(path).name for path, _ in source.skipped] == ["000.png", "001.png"]
    assert len(source.manifest) == 4
    assert source.read(0).shape == (20, 24, 3)


def test_many_unreadable_images_are_counted_not_all_named(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 9, "b": 2})
    for number in range(9):
        (root / "a" / f"{number:03d}.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"9 of 11 images .*; and 6 more; mend"):
        ImageFolder(root)
    with pytest.raises(DataError, match=r"class 'a' has no usable image, e\.g\. is not a JPEG"):
        ImageFolder(root, on_bad_file="skip")


def test_mixed_bands_and_types_are_refused(make_folder: MakeFolder, write_tiff: Callable[..., Path]) -> None:
    root = make_folder({"a": 3, "b": 3})
    write_tiff(root / "a" / "n.tif", np.ones((20, 24, 4), dtype=np.uint16))
    with pytest.raises(DataError, match=r"a/n\.tif: has 4 band\(s\) .* of uint16, most others have 3 .* of uint8"):
        ImageFolder(root)
    assert len(ImageFolder(root, on_bad_file="skip").manifest) == 6


def test_different_nodata_is_refused(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    for i, (name, nodata) in enumerate([("a", 0), ("a", 0), ("b", None), ("b", 255)]):
        (tmp_path / name).mkdir(exist_ok=True)
        write_tiff(tmp_path / name / f"{i}.tif", np.full((4, 4, 2), i, dtype=np.int16), nodata=nodata)
    with pytest.raises(DataError, match=r"b/3\.tif: declares nodata 255, others 0"):
        ImageFolder(tmp_path)
    assert ImageFolder(tmp_path, on_bad_file="skip").nodata == 0.0


def test_checks_are_remembered_until_a_file_changes(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder({"a": 3, "b": 3})
    first = ImageFolder(root)
    checked: list[str] = []
    check = files_module._check_file
    monkeypatch.setattr(files_module, "_check_file", lambda *args: checked.append(args[1]) or check(*args))
    again = ImageFolder(root)
    assert checked == []
    assert again.fingerprint == first.fingerprint
    assert again.manifest.equals(first.manifest)

    spoil(root)
    with pytest.raises(DataError, match="2 of 6"):
        ImageFolder(root)
    assert sorted(checked) == ["a/000.png", "b/001.png"]
    assert ImageFolder(root, on_bad_file="skip").fingerprint != first.fingerprint


def test_a_damaged_memory_is_forgotten(make_folder: MakeFolder, cache: Path) -> None:
    root = make_folder({"a": 2, "b": 2})
    ImageFolder(root)
    for path in (cache / "checked").iterdir():
        path.write_bytes(b"no parquet")
    assert len(ImageFolder(root).manifest) == 4


def test_a_copy_has_the_same_fingerprint(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder({"a": 2, "b": 2})
    copy = Path(shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copy))
    assert ImageFolder(copy).fingerprint == ImageFolder(root).fingerprint
    (copy / "a" / "001.png").rename(copy / "b" / "007.png")
    assert ImageFolder(copy).fingerprint != ImageFolder(root).fingerprint


def test_a_file_that_vanishes_later_is_named(make_folder: MakeFolder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    root = make_folder({"a": 2, "b": 2})
    source = ImageFolder(root)
    (root / "a" / "000.png").unlink()
    with pytest.raises(DataError, match=r"a/000\.png: no such file"):
        source.read(0)
