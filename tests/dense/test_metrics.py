"""Metrics of maps against slow NumPy that follows the definitions."""

import numpy as np
import pytest
import torch

from r2kit.data.targets import IGNORE
from r2kit.dense.metrics import boundary_counts, boundary_f1, class_iou, confusion_counts, mean_iou, pixel_accuracy


def maps(seed, shape=(3, 11, 13), classes=4):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (shape[0], 3, 3))
    truth = np.kron(coarse, np.ones((1, 5, 5), dtype=int))[:, : shape[1], : shape[2]].astype(np.int64)
    pred = np.where(rng.random(shape) < 0.2, rng.integers(0, classes, shape), np.roll(truth, 1, axis=2))
    truth[rng.random(shape) < 0.05] = IGNORE
    return pred, truth


def slow_confusion(pred, truth, classes):
    table = np.zeros((len(pred), classes, classes), dtype=np.int64)
    for image in range(len(pred)):
        for t, p in zip(truth[image].ravel(), pred[image].ravel(), strict=True):
            if t != IGNORE:
                table[image, t, p] += 1
    return table


def test_confusion_and_iou_are_those_of_counting_pixel_by_pixel():
    pred, truth = maps(0)
    counted = confusion_counts(torch.from_numpy(pred), torch.from_numpy(truth), 5).numpy()
    assert np.array_equal(counted, slow_confusion(pred, truth, 5))
    whole = counted.sum(0)
    known = truth != IGNORE
    for value in range(4):
        both = ((pred == value) & (truth == value) & known).sum()
        either = (((pred == value) | (truth == value)) & known).sum()
        assert class_iou(whole)[value] == both / either
    assert np.isnan(class_iou(whole)[4])  # neither occurs nor is predicted
    assert mean_iou(whole) == pytest.approx(np.mean(class_iou(whole)[:4]))
    assert pixel_accuracy(whole) == (pred == truth)[known].mean()


def test_the_mean_over_all_images_is_not_the_mean_of_the_images_means():
    pred = np.array([[[0, 0, 0, 0]], [[1, 0, 0, 0]]])
    truth = np.array([[[0, 0, 0, 0]], [[1, 1, 0, 0]]])
    counted = confusion_counts(torch.from_numpy(pred), torch.from_numpy(truth), 2).numpy()
    assert mean_iou(counted.sum(0)) == pytest.approx((6 / 7 + 1 / 2) / 2)
    assert mean_iou(counted).mean() == pytest.approx((1.0 + (2 / 3 + 1 / 2) / 2) / 2)


def test_nothing_labelled_gives_nothing():
    nothing = torch.full((1, 2, 2), IGNORE)
    counted = confusion_counts(torch.zeros(1, 2, 2, dtype=torch.int64), nothing, 2).numpy()
    assert counted.sum() == 0
    assert np.isnan(mean_iou(counted.sum(0)))
    assert np.isnan(boundary_f1(boundary_counts(np.zeros((2, 2)), nothing[0].numpy(), 2))).all()


def slow_boundary(labels, value):
    points = []
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            if labels[y, x] != value:
                continue
            around = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            inside = [(a, b) for a, b in around if 0 <= a < labels.shape[0] and 0 <= b < labels.shape[1]]
            if any(labels[p] not in (value, IGNORE) for p in inside):
                points.append((y, x))
    return points


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.5])
def test_boundaries_are_those_of_measuring_every_pair(tolerance):
    preds, truths = maps(1)
    for pred, truth in zip(preds, truths, strict=True):
        counts = boundary_counts(pred, truth, 4, tolerance)
        seen = np.where(truth == IGNORE, IGNORE, pred)
        for value in range(4):
            ours, theirs = slow_boundary(seen, value), slow_boundary(truth, value)

            def near(points, others):
                return sum(any(np.hypot(y - b, x - a) <= tolerance for b, a in others) for y, x in points)

            assert counts[value].tolist() == [near(ours, theirs), len(ours), near(theirs, ours), len(theirs)]


def test_boundary_f1_of_equal_shifted_and_missing_maps():
    truth = np.zeros((20, 20), dtype=int)
    truth[5:15, 5:15] = 1
    assert boundary_f1(boundary_counts(truth, truth, 3)).tolist()[:2] == [1.0, 1.0]
    assert np.isnan(boundary_f1(boundary_counts(truth, truth, 3))[2])
    shifted = np.roll(truth, 1, axis=0)
    assert boundary_f1(boundary_counts(shifted, truth, 2, 1.0)).tolist() == [1.0, 1.0]
    assert boundary_f1(boundary_counts(shifted, truth, 2, 0.0))[1] < 0.8
    assert boundary_f1(boundary_counts(np.zeros_like(truth), truth, 2)).tolist() == [0.0, 0.0]
