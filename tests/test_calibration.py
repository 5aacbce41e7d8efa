"""Temperature scaling and conformal label sets, against closed forms, a slow search and simulated coverage."""

import math

import numpy as np
import pytest

from r2kit import metrics
from r2kit.calibration import conformal_threshold, fit_temperature, label_sets, rescale


def overconfident(count, temperature, seed=0, classes=4):
    """Probabilities that are right at `temperature`: labels are drawn from the rescaled ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, classes))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    true = rescale(probs, temperature)
    label = (true.cumsum(1) > rng.random((count, 1))).argmax(1)
    return probs, label


def test_rescaling_is_the_softmax_of_the_divided_logits():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum(1, keepdims=True)
    np.testing.assert_allclose(rescale(probs, 2.5), expected, rtol=1e-12)
    np.testing.assert_allclose(rescale(probs, 1.0), probs, rtol=1e-12)
    assert np.isfinite(rescale([[1.0, 0.0]], 0.01)).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_again(temperature):
    probs, label = overconfident(20_000, temperature)
    assert fit_temperature(probs, label) == pytest.approx(temperature, rel=0.04)


def test_the_temperature_is_the_best_of_a_fine_grid():
    probs, label = overconfident(300, 1.7, seed=3)
    grid = np.exp(np.linspace(math.log(0.2), math.log(5), 4001))
    losses = [metrics.log_loss(rescale(probs, t), label) for t in grid]
    assert fit_temperature(probs, label) == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)


def test_scaling_improves_calibration_of_new_images_and_no_answer_changes():
    probs, label = overconfident(4000, 2.5, seed=1)
    new, truth = overconfident(4000, 2.5, seed=2)
    scaled = rescale(new, fit_temperature(probs, label))
    assert metrics.calibration_error(scaled, truth) < 0.3 * metrics.calibration_error(new, truth)
    np.testing.assert_array_equal(scaled.argmax(1), new.argmax(1))


def test_the_ends_of_the_range_where_no_temperature_is_best():
    probs = np.array([[0.9, 0.1], [0.8, 0.2]])
    assert fit_temperature(probs, [0, 0]) < 0.1
    assert fit_temperature(probs, [1, 1]) > 19
    with pytest.raises(ValueError, match="at least one image"):
        fit_temperature(np.zeros((0, 2)), [])


def test_the_threshold_is_the_split_conformal_rank():
    own = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])  # probability of the true class of nine images
    probs = np.stack([own, 1 - own], 1)
    # ceil(10 * 0.8) = 8: the eighth smallest score, 1 - 0.2.
    assert conformal_threshold(probs, np.zeros(9, int), 0.8) == pytest.approx(0.2)
    assert conformal_threshold(probs, np.zeros(9, int), 0.95) == 0.0  # ten images would be needed for a rank
    assert label_sets(probs, conformal_threshold(probs, np.zeros(9, int), 0.8))[:, 0].sum() == 8


def test_sets_cover_new_images_as_promised():
    covered = []
    for trial in range(300):
        probs, label = overconfident(120, 3.0, seed=trial)  # badly calibrated: the promise holds all the same
        fit, new = slice(0, 60), slice(60, 120)
        sets = label_sets(probs[new], conformal_threshold(probs[fit], label[fit], 0.9))
        covered.append(sets[np.arange(60), label[new]].mean())
    # Expected: ceil(61 * 0.9) / 61 = 0.9016; 300 trials of 60 leave a standard error below 0.003.
    assert 0.89 < np.mean(covered) < 0.915
