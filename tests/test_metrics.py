"""Metrics against scikit-learn, torchmetrics and slow loops; intervals against theory and simulation."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from torchmetrics.classification import MulticlassCalibrationError

from r2kit import metrics


@pytest.fixture
def answers():
    rng = np.random.default_rng(3)
    probs = rng.dirichlet(np.full(5, 0.4), size=400)
    label = np.array([rng.choice(5, p=0.6 * p + 0.08) for p in probs])
    return label, probs.argmax(1), probs


def test_confusion_matrix_counts_every_pair(answers):
    label, pred, _ = answers
    slow = np.zeros((5, 5), dtype=int)
    for a, b in zip(label, pred, strict=True):
        slow[a, b] += 1
    np.testing.assert_array_equal(metrics.confusion_matrix(label, pred, 5), slow)


def test_shares_equal_scikit_learn(answers):
    label, pred, probs = answers
    matrix = metrics.confusion_matrix(label, pred, 5)
    each = metrics.per_class(matrix)
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(label, pred)
    np.testing.assert_allclose(each.precision, precision)
    np.testing.assert_allclose(each.recall, recall)
    np.testing.assert_allclose(each.f1, f1)
    np.testing.assert_array_equal(each.support, support)
    assert metrics.accuracy(matrix) == pytest.approx(sklearn.metrics.accuracy_score(label, pred))
    assert metrics.balanced_accuracy(matrix) == pytest.approx(sklearn.metrics.balanced_accuracy_score(label, pred))
    assert metrics.macro_f1(matrix) == pytest.approx(sklearn.metrics.f1_score(label, pred, average="macro"))
    assert metrics.log_loss(probs, label) == pytest.approx(sklearn.metrics.log_loss(label, probs))


def test_a_class_without_images_is_nan_and_left_out_of_the_means():
    matrix = metrics.confusion_matrix([0, 0, 1], [0, 1, 1], 3)
    each = metrics.per_class(matrix)
    assert math.isnan(each.recall[2])
    assert math.isnan(each.precision[2])
    assert math.isnan(each.f1[2])
    assert metrics.balanced_accuracy(matrix) == pytest.approx(0.75)
    assert metrics.macro_f1(matrix) == pytest.approx(2 / 3)


def test_without_images_every_figure_is_nan():
    empty = metrics.confusion_matrix(np.zeros(0, int), np.zeros(0, int), 2)
    assert math.isnan(metrics.accuracy(empty))
    assert math.isnan(metrics.macro_f1(empty))
    assert math.isnan(metrics.log_loss(np.zeros((0, 2)), np.zeros(0, int)))
    assert math.isnan(metrics.calibration_error(np.zeros((0, 2)), np.zeros(0, int)))


def test_log_loss_of_a_certain_mistake_is_finite():
    assert math.isfinite(metrics.log_loss([[1.0, 0.0]], [1]))


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_equals_torchmetrics(answers, bins):
    label, _, probs = answers
    theirs = MulticlassCalibrationError(5, n_bins=bins, norm="l1")(torch.tensor(probs), torch.tensor(label))
    assert metrics.calibration_error(probs, label, bins) == pytest.approx(float(theirs), abs=1e-6)


def test_reliability_against_a_slow_loop(answers):
    label, pred, probs = answers
    table = metrics.reliability(probs, label, 10)
    confidence = probs.max(1)
    for i in range(10):
        inside = (confidence > table.edges[i]) & (confidence <= table.edges[i + 1])
        assert table.count[i] == inside.sum()
        if inside.any():
            assert table.accuracy[i] == pytest.approx((label == pred)[inside].mean())
            assert table.confidence[i] == pytest.approx(confidence[inside].mean())
        else:
            assert math.isnan(table.accuracy[i])
    assert table.count.sum() == len(label)


def test_confusion_pairs_come_in_order_of_size_then_class():
    matrix = np.array([[9, 1, 3], [3, 9, 0], [0, 1, 9]])
    assert metrics.confusion_pairs(matrix) == [(0, 2, 3), (1, 0, 3), (0, 1, 1), (2, 1, 1)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.confusion_matrix([0, 1], [0], 2), "the same images"),
        (lambda: metrics.confusion_matrix([0, 2], [0, 1], 2), "outside the classes 0..1"),
        (lambda: metrics.confusion_matrix([0, -1], [0, 1], 2), "outside the classes"),
        (lambda: metrics.confusion_matrix([0.0, 1.0], [0, 1], 2), "integers"),
        (lambda: metrics.log_loss([0.5, 0.5], [0]), r"\(N, K\)"),
        (lambda: metrics.log_loss([[0.5, 0.5]], [0, 1]), "the same images"),
        (lambda: metrics.bootstrap_interval([[1.0, 2.0]]), "need a statistic"),
        (lambda: metrics.bootstrap_interval([1.0, 0.0], groups=["a"]), "one group an image"),
    ],
)
def test_wrong_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wilson_interval_is_the_published_formula():
    k, n, z = 17, 20, 1.959963984540054
    centre = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    assert metrics.wilson_interval(k, n) == pytest.approx((centre - half, centre + half))
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)


def test_interval_of_many_images_is_the_normal_one_and_wilsons():
    right = np.repeat([1.0, 0.0], [900, 300])
    interval = metrics.bootstrap_interval(right, seed=1, n=20_000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 1200)
    assert interval.value == 0.75
    assert (interval.low, interval.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.0015)
    assert (interval.low, interval.high) == pytest.approx(metrics.wilson_interval(900, 1200), abs=0.0025)
    assert (interval.units, interval.n, interval.reason) == ("images", 1200, None)


def test_interval_is_read_as_it_was_written():
    for one in (
        metrics.Interval(0.5, 0.4, 0.6, 0.95, "images", 9),
        metrics.Interval(0.5, np.nan, np.nan, 0.95, "groups", 1, "one group"),
    ):
        again = metrics.Interval.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False)))
        assert repr(again) == repr(one)  # NaN does not equal itself


def test_interval_is_a_function_of_data_and_seed():
    values = np.random.default_rng(0).random(50)
    assert metrics.bootstrap_interval(values, seed=4) == metrics.bootstrap_interval(values, seed=4)
    assert metrics.bootstrap_interval(values, seed=4) != metrics.bootstrap_interval(values, seed=5)


def test_alike_neighbours_widen_the_interval():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(30), 40)
    right = (rng.random(30)[group] > 0.3).astype(float)  # a whole block is right or wrong
    by_image = metrics.bootstrap_interval(right)
    by_group = metrics.bootstrap_interval(right, groups=[f"block {g}" for g in group])
    assert by_group.units == "groups"
    assert by_group.n == 30
    assert by_group.high - by_group.low > 4 * (by_image.high - by_image.low)


def test_groups_of_one_image_are_images():
    values = np.random.default_rng(1).random(80)
    ours, plain = metrics.bootstrap_interval(values, groups=np.arange(80)), metrics.bootstrap_interval(values)
    assert (ours.low, ours.high) == pytest.approx((plain.low, plain.high), abs=0.02)


def test_a_missing_group_is_a_group_of_its_own():
    assert metrics.bootstrap_interval([1.0, 0.0, 1.0, 0.0], groups=["a", "a", None, float("nan")]).n == 3


def test_all_right_is_not_certainty():
    interval = metrics.bootstrap_interval(np.ones(50))
    assert interval.high == 1.0
    assert interval.low == pytest.approx(metrics.wilson_interval(50, 50)[0])
    assert "same value" in interval.reason


def test_all_wrong_and_constant_difference_have_width():
    wrong = metrics.bootstrap_interval(np.zeros(50))
    assert (wrong.low, wrong.high) == pytest.approx(metrics.wilson_interval(0, 50))
    same = metrics.bootstrap_interval(np.zeros(50), bounds=(-1.0, 1.0))
    assert same.low == -same.high
    assert same.high > 0.05


def test_all_right_in_few_groups_counts_the_groups():
    interval = metrics.bootstrap_interval(np.ones(600), groups=np.repeat(np.arange(6), 100))
    assert interval.low == pytest.approx(metrics.wilson_interval(6, 6)[0])


def test_one_group_falls_back_to_images_and_says_so():
    interval = metrics.bootstrap_interval([1.0, 0.0, 1.0, 1.0], groups=["a"] * 4)
    assert interval.units == "images"
    assert "one group" in interval.reason


def test_few_groups_are_called_rough():
    interval = metrics.bootstrap_interval([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], groups=list("aabbcc"))
    assert "only 3 groups" in interval.reason
    assert 0.0 <= interval.low < interval.value < interval.high <= 1.0


@pytest.mark.parametrize(("count", "value"), [(0, math.nan), (1, 1.0)])
def test_nothing_or_one_image(count, value):
    interval = metrics.bootstrap_interval(np.ones(count))
    assert interval.reason
    assert interval.to_dict()["value"] == (None if count == 0 else value)


@pytest.mark.parametrize("grouped", [False, True])
def test_macro_f1_interval_against_a_slow_loop(answers, grouped):
    label, pred, _ = answers
    unit = np.arange(400) // 8 if grouped else np.arange(400)
    interval = metrics.macro_f1_interval(label, pred, 5, unit if grouped else None)
    assert interval.value == pytest.approx(sklearn.metrics.f1_score(label, pred, average="macro"))
    rng, slow = np.random.default_rng(9), []
    members = [np.flatnonzero(unit == u) for u in range(unit.max() + 1)]
    for _ in range(600):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        slow.append(metrics.macro_f1(metrics.confusion_matrix(label[rows], pred[rows], 5)))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.015)


def test_balanced_accuracy_interval_holds_its_value(answers):
    label, pred, _ = answers
    interval = metrics.balanced_accuracy_interval(label, pred, 5)
    assert interval.value == pytest.approx(sklearn.metrics.balanced_accuracy_score(label, pred))
    assert interval.low < interval.value < interval.high


def _coverage(draw, truth, rounds):
    hits = 0
    for i in range(rounds):
        values, groups = draw(np.random.default_rng(i))
        interval = metrics.bootstrap_interval(values, groups, n=1000, seed=i)
        hits += interval.low <= truth <= interval.high
    return hits / rounds


@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 300])
def test_coverage_over_images(size):
    covered = _coverage(lambda rng: ((rng.random(size) < 0.8).astype(float), None), 0.8, 1500)
    assert 0.925 <= covered <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [12, 40])
def test_coverage_over_groups_of_alike_images(blocks):
    def draw(rng):
        share = rng.beta(4, 2, size=blocks)  # mean 2/3, differs from block to block
        group = np.repeat(np.arange(blocks), rng.integers(5, 30, size=blocks))
        return (rng.random(group.size) < share[group]).astype(float), group

    assert 0.925 <= _coverage(draw, 2 / 3, 1500) <= 0.98
    ignoring = _coverage(lambda rng: (draw(rng)[0], None), 2 / 3, 300)
    assert ignoring < 0.9  # redrawing images would have claimed too much
