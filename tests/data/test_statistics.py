import numpy as np
import pandas as pd
import pytest

from r2kit.data.preprocess import Preprocess
from r2kit.data.statistics import band_statistics, check_fit
from r2kit.errors import DataError


class Images:
    name = "images"
    scale = 1.0

    def __init__(self, images: list[np.ndarray], nodata: float | None = None) -> None:
        self.images = images
        self.nodata = nodata
        self.bands = tuple(f"b{i}" for i in range(images[0].shape[2]))
        self.reads = 0

    def read(self, row: int) -> np.ndarray:
        self.reads += 1
        return self.images[row]


def test_equals_numpy_over_all_pixels() -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(1e6, 3.0, (5 + i, 7, 2)) for i in range(6)]  # a large mean would lose digits if summed plainly
    table = band_statistics(Images(images), np.arange(6))
    pixels = np.concatenate([image.reshape(-1, 2) for image in images])
    np.testing.assert_allclose(table["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(table["std"], pixels.std(0), rtol=1e-9)
    np.testing.assert_array_equal(table["min"], pixels.min(0))
    np.testing.assert_array_equal(table["max"], pixels.max(0))
    assert table.attrs["images"] == 6
    assert list(table.index) == ["b0", "b1"]


def test_missing_pixels_do_not_count() -> None:
    image = np.array([[[1, 10], [0, 20]], [[3, 0], [5, 30]]], dtype=np.int16)
    empty = np.zeros((2, 2, 2), dtype=np.int16)
    table = band_statistics(Images([image, empty], nodata=0.0), np.arange(2))
    np.testing.assert_allclose(table["mean"], [3.0, 20.0])
    np.testing.assert_allclose(table["std"], [np.std([1, 3, 5]), np.std([10, 20, 30])])
    assert table["min"].tolist() == [1.0, 10.0]


def test_reads_a_bounded_number_of_images_spread_over_the_rows() -> None:
    source = Images([np.full((2, 2, 1), i, dtype=float) for i in range(100)])
    table = band_statistics(source, np.arange(100), max_images=10)
    assert source.reads == 10
    assert table["max"].item() == 90


@pytest.mark.parametrize(
    ("image", "message"),
    [(np.zeros((3, 3, 1), dtype=np.uint8), "is 0 in every pixel"), (np.full((3, 3, 1), np.nan), "no measured pixel")],
)
def test_a_useless_band_is_an_error(image: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=f"band 'b0' .*{message}|band 'b0' {message}"):
        band_statistics(Images([image]), np.arange(1))


def test_check_fit_finds_wrong_units() -> None:
    table = pd.DataFrame({"mean": [1400.0], "std": [600.0]}, index=["nir"])

    def prep(scale: float, mean: float, std: float) -> Preprocess:
        return Preprocess(("nir",), (mean,), (std,), scale, (16, 16), "squash", "bilinear", ("a", "b"))

    assert check_fit(prep(1.0, 1300.0, 500.0), table) is None
    assert "band 'nir' would reach the network with mean" in check_fit(prep(255.0, 0.45, 0.22), table)
    assert "deviation" in check_fit(prep(65535.0, 0.0, 1.0), table)
