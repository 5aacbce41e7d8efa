"""Files given to a trained network: read as the images it learned from, or refused."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from r2kit.data.given import ReadGiven
from r2kit.data.preprocess import Preprocess
from r2kit.data.reader import read_image
from r2kit.errors import DataError

WriteTiff = Callable[..., Path]
RGB = ("red", "green", "blue")


def prep(scale: float = 255.0, bands: tuple[str, ...] = RGB, nodata: float | None = None) -> Preprocess:
    mean, std = (0.5, 0.2) if scale != 1.0 else (2000.0, 500.0)
    number = len(bands)
    return Preprocess(
        bands, (mean,) * number, (std,) * number, scale, (32, 32), "squash", "bilinear", ("a", "b"), nodata
    )


def noise(*shape: int, dtype=np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def test_every_pixel_is_read_where_the_answer_lies_in_pixels(tmp_path: Path) -> None:
    Image.fromarray(noise(200, 160, 3)).save(tmp_path / "a.jpg")
    assert ReadGiven(prep(), whole=False)(tmp_path / "a.jpg").shape == (100, 80, 3)  # 2.5 times what the network sees
    whole = ReadGiven(prep(), whole=True)(tmp_path / "a.jpg")
    np.testing.assert_array_equal(whole, read_image(tmp_path / "a.jpg"))


def test_another_pixel_type_is_refused(tmp_path: Path, write_tiff: WriteTiff) -> None:
    # Divided by 255, 16 bits would reach the network as values up to 1282, and get an answer.
    assert cv2.imwrite(str(tmp_path / "wide.png"), noise(32, 32, 3, dtype=np.uint16, high=65536))
    with pytest.raises(DataError, match=r"wide.png: pixels of type uint16 are divided by 65535, and in the run by 255"):
        ReadGiven(prep(), whole=False)(tmp_path / "wide.png")
    assert ReadGiven(prep(65535.0), whole=False)(tmp_path / "wide.png").dtype == np.uint16
    narrow = write_tiff(tmp_path / "bytes.tif", noise(32, 32, 2))
    with pytest.raises(DataError, match=r"uint8 are divided by 255, and in the run by 1; the file is of another pixel"):
        ReadGiven(prep(1.0, ("band1", "band2")), whole=True)(narrow)


@pytest.mark.parametrize(("dtype", "nodata"), [(np.uint8, 0), (np.int16, -9999), (np.float32, -9999)])
def test_what_a_file_calls_missing_is_missing(tmp_path: Path, write_tiff: WriteTiff, dtype, nodata: float) -> None:
    raw = (noise(32, 32, 2, high=100) + 100).astype(dtype)
    raw[:8, :, 1] = nodata
    file = write_tiff(tmp_path / "a.tif", raw, nodata=nodata)
    scale = 255.0 if dtype == np.uint8 else 1.0
    knowing = prep(scale, ("band1", "band2"), nodata)
    same = ReadGiven(knowing, whole=True)(file)
    np.testing.assert_array_equal(same, raw)
    unknowing = prep(scale, ("band1", "band2"))
    read = ReadGiven(unknowing, whole=True)(file)
    assert np.isnan(read[:8, :, 1]).all()
    np.testing.assert_allclose(unknowing.apply(read), knowing.apply(raw), atol=0.02)  # 8 bits round the mean
    assert unknowing.apply(read)[1, :8].abs().max() == 0.0
    clean = write_tiff(tmp_path / "b.tif", np.abs(raw) + dtype(1), nodata=nodata)
    assert ReadGiven(unknowing, whole=True)(clean).dtype == dtype
