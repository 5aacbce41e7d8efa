import json

import numpy as np
import pytest
import torch
from PIL import Image

from r2kit.data.preprocess import Preprocess, centre_window, inner_size, missing_pixels
from r2kit.errors import DataError, RunError


def make(**changes) -> Preprocess:
    values = {
        "bands": ("red", "green", "blue"),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.5),
        "scale": 255.0,
        "size": (16, 16),
        "resize": "squash",
        "interpolation": "bilinear",
        "classes": ("a", "b"),
    }
    return Preprocess(**{**values, **changes})


def noise(*shape: int, dtype=np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def test_normalises_every_band_by_its_own_numbers() -> None:
    raw = noise(16, 16, 3)
    expected = (raw / 255.0 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.5])
    result = make().apply(raw)
    assert result.shape == (3, 16, 16)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    np.testing.assert_allclose(result.permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(50, 31, 3), (7, 9, 3)])
def test_resizes_colours_as_pillow_does(interpolation: str, shape: tuple[int, int, int]) -> None:
    raw = noise(*shape)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = np.asarray(Image.fromarray(raw).resize((16, 16), method)).astype(int)
    result = make(interpolation=interpolation).fit(raw)
    assert result.dtype == torch.uint8
    assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_batch_and_single_image_agree_exactly() -> None:
    prep = make()
    raws = [noise(20 + i, 30, 3) for i in range(3)]
    together = prep.normalize(torch.stack([prep.fit(raw) for raw in raws]))
    assert torch.equal(together, torch.stack([prep.apply(raw) for raw in raws]))


def test_crop_takes_the_centre_and_pad_keeps_everything() -> None:
    raw = np.zeros((16, 48, 3), dtype=np.uint8)
    raw[:, 16:32] = 200
    assert (make(resize="crop").fit(raw) == 200).all()
    padded = make(resize="pad", mean=(0.2, 0.4, 0.6)).fit(raw)
    assert padded[:, 0, 0].tolist() == [51, 102, 153]  # the mean colour
    assert padded[:, 8].max() == 200
    assert make(resize="pad", mean=(0.2, 0.4, 0.6)).apply(raw)[:, 0].abs().max() < 1e-5


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (1, 1), (3, 5)])
def test_any_shape_reaches_the_size(resize: str, shape: tuple[int, int]) -> None:
    assert make(resize=resize, size=(24, 16)).apply(noise(*shape, 3)).shape == (3, 24, 16)


def test_windows_have_the_right_aspect() -> None:
    assert centre_window((100, 200), (10, 10)) == (slice(0, 100), slice(50, 150))
    assert centre_window((100, 200), (30, 10)) == (slice(0, 100), slice(83, 116))
    assert inner_size((100, 200), (50, 50)) == (25, 50)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.float64])
def test_thirteen_bands_of_any_type(dtype) -> None:
    names = tuple(f"B{i}" for i in range(13))
    raw = noise(40, 40, 13, dtype=dtype, high=10_000)
    prep = make(bands=names, mean=(5000.0,) * 13, std=(2900.0,) * 13, scale=1.0, size=(40, 40))
    np.testing.assert_allclose(prep.apply(raw).permute(1, 2, 0), (raw.astype(float) - 5000) / 2900, atol=1e-4)
    assert prep.denormalize(prep.apply(raw)).shape == (3, 40, 40)


def test_missing_pixels_become_zero_and_do_not_bleed() -> None:
    raw = np.full((32, 32, 2), 700.0, dtype=np.float32)
    raw[:16, :, 0] = -9999.0
    raw[5, 5, 1] = np.nan
    prep = make(bands=("nir", "swir"), mean=(500.0, 700.0), std=(100.0, 1.0), scale=1.0, nodata=-9999.0)
    result = prep.apply(raw)
    assert result.isfinite().all()
    assert result[0, :7].abs().max() < 1e-5
    assert result[0, 9:].allclose(torch.tensor(2.0))
    assert result[0].min() > -1e-5  # no trace of -9999 at the border
    assert result[1].abs().max() < 1e-3


def test_missing_pixels_are_found() -> None:
    assert missing_pixels(noise(2, 2, 1), None) is None
    assert missing_pixels(np.array([[[np.nan, 1.0]]]), None).tolist() == [[[True, False]]]
    assert missing_pixels(np.array([[[np.nan, 1.0]]]), float("nan")).tolist() == [[[True, False]]]
    assert missing_pixels(np.array([[[0, 1]]], dtype=np.uint8), 0.0).tolist() == [[[True, False]]]


def test_denormalize_shows_the_colours_again() -> None:
    raw = noise(16, 16, 3)
    shown = make().denormalize(make().apply(raw))
    np.testing.assert_allclose(shown.permute(1, 2, 0).numpy() * 255, raw, atol=0.01)
    mixed = make(bands=("blue", "green", "red"))
    np.testing.assert_allclose(mixed.denormalize(mixed.apply(raw))[0].numpy() * 255, raw[..., 2], atol=0.01)
    grey = make(bands=("pan",), mean=(0.5,), std=(0.2,))
    assert grey.denormalize(grey.apply(raw[..., :1])).shape == (3, 16, 16)


def test_travels_through_json(tmp_path) -> None:
    prep = make(nodata=0.0, size=(16, 24))
    assert Preprocess.from_dict(json.loads(json.dumps(prep.to_dict()))) == prep
    prep.save(tmp_path / "preprocess.json")
    assert Preprocess.load(tmp_path / "preprocess.json") == prep


@pytest.mark.parametrize("text", ["", "[]", '{"bands": []}', "{"])
def test_a_damaged_file_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(RunError, match=r"p\.json: cannot be read as preprocessing"):
        Preprocess.load(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", [200_000, 200_000], r"size is \(200000, 200000\), allowed are sides from 1 to 4096 pixels"),
        ("size", [-5, 0], "allowed are sides from 1 to 4096"),
        ("size", [32], "size"),
        ("size", "a", "size"),
        ("bands", [1, 2, 3], r"bands\.0: Input should be a valid string"),
        ("classes", [], "classes must be one name or more, each once"),
        ("classes", ["a", "a"], "classes must be one name or more, each once"),
        ("classes", "ab", "classes"),
        ("nodata", "x", "nodata"),
        ("resize", ["a"], "resize"),
    ],
)
def test_what_a_stranger_could_write_there_is_one_line(tmp_path, key, value, message) -> None:
    (tmp_path / "p.json").write_text(json.dumps({**make().to_dict(), key: value}))
    with pytest.raises(
        RunError, match=rf"p\.json: cannot be read as preprocessing of a run: preprocess: .*{message}"
    ) as e:
        Preprocess.load(tmp_path / "p.json")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5,)}, "3 bands .* with 1 means"),
        ({"std": (0.2, 0.0, 0.5)}, "std .* must be|above zero"),
        ({"scale": 0.0}, "scale 0.0 must be above zero"),
        ({"resize": "stretch"}, "resize is 'stretch', allowed are squash, crop, pad"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos'"),
    ],
)
def test_impossible_values_are_refused(changes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_wrong_number_of_bands_is_refused() -> None:
    with pytest.raises(DataError, match=r"image with 4 bands, expected 3 \(red, green, blue\)"):
        make().apply(noise(16, 16, 4))
    with pytest.raises(DataError, match="shape"):
        make().apply(noise(16, 16))


def test_statistics_of_weights() -> None:
    prep = make().with_stats((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "bicubic")
    assert (prep.mean, prep.std, prep.interpolation) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "bicubic")
    with pytest.raises(DataError, match="statistics for 3 bands, but the images have 2"):
        make(bands=("a", "b"), mean=(0.0, 0.0), std=(1.0, 1.0)).with_stats((0.1,) * 3, (1.0,) * 3)
    with pytest.raises(DataError, match="hold physical values"):
        make(scale=1.0).with_stats((0.1,) * 3, (1.0,) * 3)


def test_the_image_is_not_changed() -> None:
    raw = noise(16, 16, 3)
    before = raw.copy()
    make().apply(raw)
    raw.flags.writeable = False
    make().apply(raw)
    np.testing.assert_array_equal(raw, before)
    make().apply(raw[::-1, ::-1])
