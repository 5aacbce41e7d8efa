import itertools

import numpy as np
import pytest

from r2kit.data import transforms
from r2kit.data.transforms import A, Augment, BandLight, Haze, RandomWindow


def ramp(bands: int = 3, dtype=np.uint8) -> np.ndarray:
    """An image without any symmetry, so that each orientation is another image."""
    y, x = np.mgrid[:24, :24]
    return np.stack([(3 * x + 5 * y + 10 * b) % 240 for b in range(bands)], axis=-1).astype(dtype)


def light(image: np.ndarray, seed: int = 0, **options) -> np.ndarray:
    transform = BandLight(**{"brightness": 0.1, "contrast": 0.1, "balance": 0.03, **options})
    transform.set_random_seed(seed)
    return transform(image=image)["image"]


def orientations(image: np.ndarray) -> list[bytes]:
    return [np.rot90(i, k).tobytes() for i in (image, image.transpose(1, 0, 2)) for k in range(4)]


@pytest.mark.parametrize("preset", ["overhead", "natural"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("bands", [1, 3, 13])
def test_presets_take_any_pixel_type_and_number_of_bands(preset, dtype, bands: int) -> None:
    raw = ramp(bands, dtype)
    before = raw.copy()
    results = [Augment(preset)(raw, (0, 0, i)) for i in range(20)]
    np.testing.assert_array_equal(raw, before)
    for result in results:
        assert result.dtype == dtype
        assert result.shape[2] == bands
        assert abs(float(result.mean()) - raw.mean()) < 0.6 * raw.mean()


def test_none_changes_nothing() -> None:
    raw = ramp()
    assert Augment("none")(raw, (0, 0, 0)) is raw


def test_a_function_of_the_key_alone() -> None:
    raw, augment = ramp(), Augment("overhead")
    first = augment(raw, (7, 1, 42))
    for key in itertools.product(range(3), range(3)):
        augment(raw, (7, *key))
    np.testing.assert_array_equal(augment(raw, (7, 1, 42)), first)
    np.testing.assert_array_equal(Augment("overhead")(raw, (7, 1, 42)), first)


def test_draws_differ_between_samples_and_epochs() -> None:
    raw, augment = ramp(), Augment("overhead")
    draws = {augment(raw, (0, epoch, row)).tobytes() for epoch in range(10) for row in range(20)}
    assert len(draws) > 0.95 * 200


def test_transforms_of_one_sample_draw_independently() -> None:
    # With one seed for every transform, the place of the window would tell the light.
    raw = np.zeros((64, 64, 1), dtype=np.float32)
    raw[..., 0] = np.arange(64)[None] + 100.0
    flat = np.full((64, 64, 1), 100.0, dtype=np.float32)
    place, gain = [], []
    augment = Augment("natural")
    augment._preset.plain.transforms.pop(1)  # without flips
    for row in range(400):
        place.append(augment(raw, (0, 0, row)).shape[1])
        gain.append(float(augment(flat, (0, 0, row)).mean()))
    assert abs(np.corrcoef(place, gain)[0, 1]) < 0.15


def test_overhead_shows_all_eight_orientations_and_natural_only_flips() -> None:
    raw = ramp()
    eight = orientations(raw)
    for preset, expected in (("overhead", set(eight)), ("natural", {raw.tobytes(), raw[:, ::-1].tobytes()})):
        augment = Augment(preset)
        steps = augment._preset.plain.transforms
        augment._preset.plain.transforms = [step for step in steps if isinstance(step, A.D4 | A.HorizontalFlip)]
        seen = {augment(raw, (0, 0, i)).tobytes() for i in range(200)}
        assert seen == expected


def test_the_window_is_a_piece_of_the_image_of_the_area_asked_for() -> None:
    raw = np.arange(200 * 100, dtype=np.float32).reshape(200, 100, 1)
    transform = RandomWindow(area=(0.5, 0.9), stretch=1.2)
    transform.set_random_seed(0)
    areas, corners = [], set()
    for _ in range(300):
        result = transform(image=raw)["image"]
        height, width = result.shape[:2]
        top, left = divmod(int(result[0, 0, 0]), 100)
        np.testing.assert_array_equal(result, raw[top : top + height, left : left + width])
        areas.append(height * width / raw.size)
        corners.add((top, left))
        assert 1 / 1.25 < (height / width) / 2.0 < 1.25
    assert 0.48 < min(areas) < 0.55
    assert 0.85 < max(areas) < 0.92
    assert len(corners) > 200


def test_a_window_of_a_tiny_image_is_not_empty() -> None:
    assert Augment("natural")(np.ones((1, 1, 3), dtype=np.uint8), (0, 0, 0)).shape == (1, 1, 3)


def test_light_is_an_affine_map_of_each_band_within_the_bounds() -> None:
    raw = np.random.default_rng(0).uniform(-3.0, 5000.0, (32, 32, 4)).astype(np.float32)
    for seed in range(50):
        result = light(raw, seed)
        for band in range(4):
            slope, shift = np.polyfit(raw[..., band].ravel(), result[..., band].ravel(), 1)
            np.testing.assert_allclose(result[..., band], raw[..., band] * slope + shift, rtol=1e-4, atol=1.0)
            gain = result[..., band].mean() / raw[..., band].mean()  # contrast keeps the mean
            assert 1 / (1.1 * 1.03) - 1e-3 < gain < 1.1 * 1.03 + 1e-3
            assert 1 / 1.1 - 1e-3 < slope / gain < 1.1 + 1e-3


def test_light_keeps_colours_apart() -> None:
    # The preset must not turn sand into grass: the balance between bands changes by 3 % at most each way.
    sand = np.full((8, 8, 3), (200, 150, 90), dtype=np.float32)
    for seed in range(100):
        red, green, blue = light(sand, seed).mean(axis=(0, 1))
        assert 200 / 150 / 1.07 < red / green < 200 / 150 * 1.07
        assert 150 / 90 / 1.07 < green / blue < 150 / 90 * 1.07


def test_light_of_integers_rounds_and_saturates() -> None:
    for dtype, high in ((np.uint8, 255), (np.uint16, 65535)):
        raw = np.zeros((16, 16, 2), dtype=dtype)
        raw[:8] = high
        exact = light(raw.astype(np.float64), 5, brightness=0.5, contrast=0.5)
        result = light(raw, 5, brightness=0.5, contrast=0.5)
        np.testing.assert_allclose(result, np.clip(np.rint(exact), 0, high), atol=1)
        assert result.max() == high or exact.max() < high


def test_light_does_not_touch_missing_pixels() -> None:
    raw = np.full((8, 8, 2), 50, dtype=np.int16)
    raw[:4, :, 0] = -999
    result = light(raw, 1, nodata=-999.0)
    assert (result[:4, :, 0] == -999).all()
    assert (np.abs(result[4:, :, 0] - 50) < 8).all()  # the mean that contrast turns about ignores them, too
    holes = np.full((8, 8, 1), 50.0, dtype=np.float32)
    holes[0] = np.nan
    result = light(holes, 1)
    assert np.isnan(result[0]).all()
    assert np.isfinite(result[1:]).all()


def hazy(image: np.ndarray, seed: int = 0, **options) -> np.ndarray:
    transform = Haze(**{"density": 0.4, **options})
    transform.set_random_seed(seed)
    return transform(image=image)["image"]


def test_haze_is_a_smooth_veil_over_each_band() -> None:
    raw = np.random.default_rng(0).uniform(-3.0, 5000.0, (40, 30, 4)).astype(np.float32)
    veil = raw.mean(axis=(0, 1)) + 2 * raw.std(axis=(0, 1))
    for seed in range(20):
        t = (hazy(raw, seed).astype(np.float64) - raw) / (veil - raw)  # from x (1 - t) + veil t
        assert -1e-3 < t.min() < t.max() < 0.4 + 1e-3
        np.testing.assert_allclose(t, np.broadcast_to(t[..., :1], t.shape), atol=2e-3)  # one density for all bands
        corners = t[[0, 0, -1, -1], [0, -1, 0, -1], 0]
        np.testing.assert_allclose(t[0, :, 0], np.linspace(corners[0], corners[1], 30), atol=2e-3)
        np.testing.assert_allclose(t[:, -1, 0], np.linspace(corners[1], corners[3], 40), atol=2e-3)
    assert np.ptp([hazy(raw, seed).mean() for seed in range(20)]) > 100


def test_haze_keeps_the_type_and_what_is_missing() -> None:
    for dtype in (np.uint8, np.uint16, np.int16, np.float64):
        raw = ramp(13, dtype)
        exact = hazy(raw.astype(np.float32), 3)
        result = hazy(raw, 3)
        assert result.dtype == dtype
        if dtype == np.uint8:
            exact = exact.clip(0, 255)
        np.testing.assert_allclose(result, exact, atol=0.51 if raw.dtype.kind in "iu" else 1e-3)
    raw = np.full((8, 8, 2), 50, dtype=np.int16)
    raw[:4, :, 0] = -999
    np.testing.assert_array_equal(hazy(raw, 1, nodata=-999.0), raw)  # of one brightness: the veil is as bright as it
    raw[..., 1] = -999
    np.testing.assert_array_equal(hazy(raw, 1, nodata=-999.0), raw)


# What belongs to places ----------------------------------------------------------------------------------------------


def rectangles(count: int = 3, size: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) that do not touch, and the mask (H, W) with the number of each, from 1, painted into it."""
    rng, mask, boxes = np.random.default_rng(seed), np.zeros((size, size + 20), np.uint8), []
    for number in range(count):
        top, height, width = number * (size // count), *rng.integers(6, size // count, 2)
        left = int(rng.integers(0, size + 20 - width))
        mask[top : top + height, left : left + width] = number + 1
        boxes.append([left, top, left + width, top + height])
    return np.array(boxes, dtype=np.float32), mask


@pytest.mark.parametrize("preset", ["overhead", "natural"])
def test_masks_and_boxes_follow_the_image_to_the_pixel(preset) -> None:
    augment = Augment(preset)
    shapes, dropped = set(), 0
    for seed in range(40):
        boxes, mask = rectangles(seed=seed)
        raw = np.repeat(mask[..., None], 3, axis=2).astype(np.float32)
        flat = Augment(preset)
        for pipeline in (augment._preset.plain, augment._preset.boxed, flat._preset.plain):
            pipeline.transforms = [step for step in pipeline.transforms if not isinstance(step, BandLight | Haze)]
        got = augment.with_targets(
            raw, (1, seed), mask=mask, boxes=boxes, masks=np.stack([mask == i for i in (1, 2, 3)])
        )
        np.testing.assert_array_equal(got.image, flat(raw, (1, seed)))  # the image is that of the call without targets
        np.testing.assert_array_equal(got.image[..., 0], got.mask)
        assert got.mask.dtype == np.uint8
        assert got.masks.dtype == bool
        assert len(got.boxes) == len(got.kept) == len(got.masks)
        for box, number, one in zip(got.boxes, got.kept, got.masks, strict=True):
            np.testing.assert_array_equal(one, got.mask == number + 1)
            rows, columns = np.nonzero(one)
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(box, seen, atol=1e-3)
        for number in set(range(3)) - set(got.kept.tolist()):
            dropped += 1
            area = (boxes[number, 2] - boxes[number, 0]) * (boxes[number, 3] - boxes[number, 1])
            assert (got.mask == number + 1).sum() < 0.2 * area + 1e-3
        shapes.add(got.mask.shape)
    assert len(shapes) > 10
    assert dropped > 0


def test_an_image_without_boxes_and_one_with_boxes_are_turned_alike() -> None:
    boxes, mask = rectangles()
    raw, augment = np.repeat(mask[..., None], 3, axis=2), Augment("overhead")
    plain = augment(raw, (4, 2))
    none = augment.with_targets(raw, (4, 2), boxes=np.zeros((0, 4)), masks=np.zeros((0, *mask.shape), bool))
    np.testing.assert_array_equal(none.image, plain)
    assert none.boxes.shape == (0, 4)
    assert none.masks.shape == (0, *plain.shape[:2])
    np.testing.assert_array_equal(augment.with_targets(raw, (4, 2), boxes=boxes).image, plain)
    np.testing.assert_array_equal(augment.with_targets(raw, (4, 2)).image, plain)
    still = Augment("none").with_targets(raw, (4, 2), mask=mask, boxes=boxes)
    assert still.mask is mask
    np.testing.assert_array_equal(still.boxes, boxes)
    assert still.kept.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="one for each box"):
        augment.with_targets(raw, (4, 2), masks=np.zeros((1, *mask.shape), bool))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32"])
def test_integers_are_rounded_and_stay_in_their_range(dtype: str) -> None:
    limits = np.iinfo(dtype)
    values = np.array([[-40_000.0, -0.6, 0.5, 1.5, 2.4, 70_000.0, 254.6]], dtype=np.float32)
    expected = np.clip(np.rint(values), limits.min, limits.max).astype(dtype)
    np.testing.assert_array_equal(transforms._as_type(values.copy(), np.dtype(dtype)), expected)
