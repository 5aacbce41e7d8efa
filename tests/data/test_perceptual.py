import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r2kit.data.perceptual import coefficients, near_copies, orientations

AID = Path(__file__).resolve().parents[3] / "shared" / "data" / "aid"


def scene(seed: int, bands: int = 3, size: int = 96) -> np.ndarray:
    """Smooth texture of many scales, as ground has."""
    rng = np.random.default_rng(seed)
    image = np.zeros((size, size, bands))
    for cells in (3, 6, 12, 24, 48):
        coarse = rng.normal(0, 1 / cells**0.5, (cells, cells, bands))
        image += np.repeat(np.repeat(coarse, size // cells, axis=0), size // cells, axis=1)
    return np.clip(image * 40 + 120, 1, 255).astype(np.uint8)


def jpeg(raw: np.ndarray, quality: int) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(raw).save(out, "JPEG", quality=quality)
    return np.asarray(Image.open(out))


def test_mirroring_and_transposing_only_change_signs_and_places() -> None:
    raw = scene(0)
    turned = [np.rot90(flip, k) for flip in (raw, raw[:, ::-1]) for k in range(4)]
    low = orientations(coefficients(raw))
    for image in turned:
        distance = np.abs(low - coefficients(np.ascontiguousarray(image))).max(axis=(1, 2))
        assert distance.min() < 1e-4


@pytest.mark.parametrize("bands", [1, 3, 13])
def test_copies_are_found_among_others(bands: int) -> None:
    images = [scene(seed, bands) for seed in range(40)]
    images.append(np.rot90(images[7]))
    images.append(images[11].astype(np.uint16) * 37 + 100)  # other units
    images.append(images[13][::-1, 1:-1, :])
    lows = np.stack([coefficients(np.ascontiguousarray(image)) for image in images])
    assert near_copies(lows).tolist() == [[7, 40], [11, 41], [13, 42]]


def test_compressed_and_resized_copies_are_found() -> None:
    images = [scene(seed) for seed in range(30)]
    images += [jpeg(images[0], 40), np.asarray(Image.fromarray(images[1]).resize((64, 70)))]
    lows = np.stack([coefficients(image) for image in images])
    assert near_copies(lows).tolist() == [[0, 30], [1, 31]]


def test_many_images_are_compared_in_little_memory() -> None:
    rng = np.random.default_rng(0)
    lows = rng.normal(size=(4000, 8, 8)).astype(np.float32)
    lows[:, 0, 0] = 0.0
    lows /= np.linalg.norm(lows.reshape(4000, -1), axis=1)[:, None, None]
    lows[3999] = orientations(lows[17])[5]
    tracemalloc.start()
    found = near_copies(lows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tolist() == [[17, 3999]]
    assert peak < 1e8  # all against all would be a gigabyte


def test_images_without_texture_have_no_hash() -> None:
    assert coefficients(np.full((20, 20, 3), 7, dtype=np.uint8)) is None
    assert coefficients(np.zeros((20, 20, 3), dtype=np.uint8), nodata=0) is None
    assert coefficients(np.full((20, 20, 3), np.nan, dtype=np.float32)) is None


def test_missing_pixels_do_not_count() -> None:
    raw = scene(3).astype(np.int16)
    raw[:20, :20] = -9999
    other = np.where(raw == -9999, np.int16(30_000), raw)
    np.testing.assert_array_equal(coefficients(raw, -9999), coefficients(other, 30_000))


@pytest.mark.skipif(not AID.is_dir(), reason="the AID scenes are not in ../shared/data/aid")
def test_real_scenes_are_told_apart_and_their_copies_found() -> None:
    paths = sorted(AID.glob("*/*.jpg"))[::36]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    copies = [np.rot90(jpeg(image, 60)) for image in images[:20]]
    lows = np.stack([coefficients(np.ascontiguousarray(image)) for image in images + copies])
    assert near_copies(lows).tolist() == [[i, len(images) + i] for i in range(20)]
