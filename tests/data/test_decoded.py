"""Decoded images on disk: the same pixels, never out of date, bounded, shared by processes."""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r2kit.data.decoded import DecodedImages, trial
from r2kit.data.reader import read_image
from r2kit.data.sources import open_source
from r2kit.errors import DataError
from r2kit.recipe import DataSpec

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("R2KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_same_pixels_from_the_cache_and_none_without_it(make_folder: MakeFolder, folder: Path) -> None:
    root = make_folder({"a": 4, "b": 4}, suffix=".jpg", size=(100, 140))
    plain = open_source(DataSpec(root=str(root), image_size=16))
    expected = [plain.read(row) for row in range(8)]
    assert not folder.exists()
    cached = open_source(DataSpec(root=str(root), image_size=16, cache_gb=0.1))
    for _ in range(2):  # decoded, then from disk
        for row in range(8):
            np.testing.assert_array_equal(cached.read(row), expected[row])
    assert len(list(folder.glob("*/*.npy"))) == 8
    other = open_source(DataSpec(root=str(root), image_size=64, cache_gb=0.1))  # another size is another image
    assert other.read(0).shape == (100, 140, 3)


def test_a_cached_image_is_not_decoded_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "x", []
    path.write_bytes(b"x")
    cache = DecodedImages(100, 10**6, "all")

    def decode() -> np.ndarray:
        calls.append(1)
        return np.arange(12).reshape(2, 2, 3)

    for _ in range(3):
        np.testing.assert_array_equal(cache.read(str(path), decode), np.arange(12).reshape(2, 2, 3))
    assert len(calls) == 1
    np.testing.assert_array_equal(DecodedImages(100, 10**6, "some").read(str(path), decode).ravel(), np.arange(12))
    assert len(calls) == 2  # what is read of the file is part of its place


def test_a_changed_file_is_read_anew_and_a_lost_one_is_named(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 3, "b": 3})
    source = open_source(DataSpec(root=str(root), image_size=16, cache_gb=0.1))
    path = Path(source.manifest["path"].iloc[0])
    source.read(0)
    Image.fromarray(np.full((20, 24, 3), 7, np.uint8)).save(path)
    assert (source.read(0) == 7).all()
    path.unlink()
    with pytest.raises(DataError, match=r"a/000\.png: no such file"):
        source.read(0)


def test_a_damaged_entry_is_replaced(make_folder: MakeFolder, folder: Path) -> None:
    source = open_source(DataSpec(root=str(make_folder({"a": 2, "b": 2})), image_size=16, cache_gb=0.1))
    expected = source.read(1)
    (entry,) = folder.glob("*/*.npy")
    for content in (b"", b"\x93NUMPY", entry.read_bytes()[:200]):
        entry.write_bytes(content)
        np.testing.assert_array_equal(source.read(1), expected)
    np.testing.assert_array_equal(np.load(entry), expected)


def test_the_cache_stays_below_its_limit(make_folder: MakeFolder, folder: Path, tmp_path: Path) -> None:
    root = make_folder({"a": 4, "b": 4})  # 8 images of 20 x 24 x 3 bytes and 128 of a head: 12,544
    small = open_source(DataSpec(root=str(root), image_size=16, cache_gb=12.5e-6))
    for row in range(8):
        small.read(row)
    assert not folder.exists()  # not all would fit
    fits = open_source(DataSpec(root=str(root), image_size=16, cache_gb=13e-6))
    for row in range(8):
        fits.read(row)
    assert 11_000 < size_of(folder) <= 13_000
    older = {path.name for path in folder.glob("*/*.npy")}
    again = open_source(DataSpec(root=str(root), image_size=17, cache_gb=13e-6))  # needs the room of the first
    for row in range(8):
        again.read(row)
    assert size_of(folder) <= 13_000
    assert not older & {path.name for path in folder.glob("*/*.npy")}


def read_many(path: str, queue) -> None:
    cache = DecodedImages(10**6, 10**8, "x")
    queue.put([int(cache.read(path, lambda: read_image(path)).sum()) for _ in range(20)])


def test_processes_share_it(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    context = get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_many, args=(str(path), queue)) for _ in range(4)]
    for process in processes:
        process.start()
    sums = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert {value for one in sums for value in one} == {int(pixels.sum())}
    assert [entry.name for entry in folder.rglob("*") if entry.is_file() and entry.suffix != ".npy"] == []
    assert os.listdir(folder)


@pytest.mark.parametrize(("decoding", "said"), [(0.010, "on, 1.3e-05 GB in "), (0.003, "off: ")])
def test_auto_caches_where_decoding_takes_twice_as_long(
    make_folder: MakeFolder, folder: Path, monkeypatch: pytest.MonkeyPatch, decoding: float, said: str
) -> None:
    monkeypatch.setattr("r2kit.data.files.trial", lambda paths, decode: (decoding, 0.002))
    root = make_folder({"a": 4, "b": 4})
    source = open_source(DataSpec(root=str(root), image_size=16, cache_gb="auto"))
    assert source.cached.startswith(said)
    assert f"decoding an image takes {1000 * decoding:.2g} ms, reading a decoded one 2 ms" in source.cached
    source.read(0)
    assert folder.exists() == (decoding > 0.004)


def test_a_trial_measures_both(make_folder: MakeFolder) -> None:
    path = next(make_folder({"a": 4, "b": 4}).rglob("*.png"))

    def slow(name: str) -> np.ndarray:
        time.sleep(0.05)
        return read_image(name)

    decoding, reading = trial([str(path)] * 3, slow)
    assert decoding > 0.05 > reading > 0


def test_images_with_masks_are_cached_too(mask_folder: Path, folder: Path) -> None:
    source = open_source(DataSpec(root=str(mask_folder), cache_gb=0.1), "mask")
    first = source.read(0)
    assert len(list(folder.glob("*/*.npy"))) == 1
    np.testing.assert_array_equal(source.read(0), first)


def test_a_source_that_decodes_no_files_refuses_a_cache() -> None:
    with pytest.raises(ValueError, match="cache_gb: source 'bluemarble' decodes no whole files"):
        DataSpec(cache_gb="auto")
