"""The baselines against loops and against what they must be able to tell apart."""

import numpy as np
import pytest

from r2kit.baselines import band_features, logistic_regression, majority_class


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_band_features_are_mean_and_deviation_in_raw_units(dtype):
    image = np.random.default_rng(0).integers(0, 255, (7, 5, 4)).astype(dtype)
    found = band_features(image)
    for band in range(4):
        pixels = [float(v) for v in image[..., band].ravel()]
        mean = sum(pixels) / len(pixels)
        assert found[band] == pytest.approx(mean)
        assert found[4 + band] == pytest.approx((sum((p - mean) ** 2 for p in pixels) / len(pixels)) ** 0.5)


def test_pixels_without_measurement_are_left_out():
    image = np.array([[[1.0, np.nan], [3.0, -9999.0]], [[-9999.0, -9999.0], [5.0, np.nan]]], dtype=np.float32)
    found = band_features(image, nodata=-9999.0)
    assert found[0] == pytest.approx(3.0)
    assert found[2] == pytest.approx(np.std([1.0, 3.0, 5.0]))
    assert np.isnan(found[[1, 3]]).all()


def test_majority_class_is_the_most_frequent_and_the_first_among_equals():
    assert majority_class([2, 1, 2, 0], 4) == 2
    assert majority_class([2, 1, 2, 1], 4) == 1
    with pytest.raises(ValueError, match="no images"):
        majority_class(np.zeros(0, int), 3)


def _clouds(rng, count):
    label = rng.integers(0, 3, count)
    features = rng.normal(size=(count, 4)) + np.eye(3, 4)[label] * 6
    return features * [1, 1000, 1, 0.001] + [0, 5e4, 0, 0], label  # very unlike units


def test_logistic_regression_tells_separable_classes_apart_in_any_units():
    rng = np.random.default_rng(0)
    features, label = _clouds(rng, 300)
    other, truth = _clouds(rng, 100)
    found = logistic_regression(features, label, other)
    assert (found == truth).mean() > 0.97
    np.testing.assert_array_equal(found, logistic_regression(features, label, other))


def test_a_feature_that_is_not_known_counts_as_the_training_mean():
    rng = np.random.default_rng(1)
    features, label = _clouds(rng, 200)
    unknown = features[:5].copy()
    unknown[:, 1] = np.nan
    filled = unknown.copy()
    filled[:, 1] = features[:, 1].mean()
    np.testing.assert_array_equal(
        logistic_regression(features, label, unknown), logistic_regression(features, label, filled)
    )
    features[:, 3] = np.nan  # a band that was never observed
    assert logistic_regression(features, label, unknown).shape == (5,)


def test_degenerate_sets():
    one = logistic_regression(np.zeros((4, 2)), [1, 1, 1, 1], np.ones((3, 2)))
    np.testing.assert_array_equal(one, [1, 1, 1])
    assert logistic_regression(np.eye(2), [0, 1], np.zeros((0, 2))).shape == (0,)
    with pytest.raises(ValueError, match="training images"):
        logistic_regression(np.zeros((0, 2)), [], np.ones((3, 2)))
