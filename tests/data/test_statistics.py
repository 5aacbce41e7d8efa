import numpy as np
import pandas as pd
import pytest

from r2kit.data import statistics
from r2kit.data.preprocess import Preprocess
from r2kit.data.statistics import band_statistics, check_fit, describe_bands
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


class Fake:
    """A source of given images."""

    name, bands, nodata = "fake", ("a", "b"), 0.0

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images

    def read(self, row: int) -> np.ndarray:
        return self.images[row]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_description_equals_numpy_over_all_pixels(dtype: str) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 200, (9, 5 + i, 2)).astype(dtype) for i in range(7)]
    found = describe_bands(Fake(images), np.arange(7))
    pixels = np.concatenate([image.reshape(-1, 2) for image in images]).astype(float)
    for band, name in enumerate("ab"):
        values = pixels[:, band]
        measured = values[values != 0]
        row = found.loc[name]
        np.testing.assert_allclose(
            row[["mean", "std", "min", "max"]].to_numpy(float),
            [measured.mean(), measured.std(), measured.min(), measured.max()],
        )
        assert row["nodata_share"] == (values == 0).mean()
        method = "linear" if dtype == "float32" else "inverted_cdf"
        expected = np.percentile(measured, [1, 2, 50, 98, 99], method=method)
        np.testing.assert_allclose(row[["p1", "p2", "p50", "p98", "p99"]].to_numpy(float), expected, rtol=1e-6)
    assert found.attrs["percentiles"] == ("from 504 evenly spaced pixels" if dtype == "float32" else "exact")


def test_description_of_a_band_without_a_measurement() -> None:
    image = np.zeros((4, 4, 2), dtype=np.uint8)
    image[..., 1] = 7
    found = describe_bands(Fake([image]), np.arange(1))
    assert found.loc["a", ["mean", "max", "p50"]].isna().all()
    assert found.loc["a", "nodata_share"] == 1.0
    assert found.loc["b", ["mean", "p50"]].tolist() == [7.0, 7.0]


def test_percentiles_of_many_floats_come_from_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_SAMPLE", 1000)
    image = np.linspace(1, 2, 20_000, dtype=np.float32).reshape(100, 100, 2)
    found = describe_bands(Fake([image] * 5), np.arange(5))
    assert found.attrs["percentiles"] == "from 1000 evenly spaced pixels"
    assert abs(found.loc["a", "p50"] - 1.5) < 0.01
