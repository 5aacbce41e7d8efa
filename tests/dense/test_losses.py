"""Losses of maps against slow NumPy; unlabelled pixels never count."""

import numpy as np
import pytest
import torch

from r2kit.data.targets import IGNORE
from r2kit.dense.losses import balanced_weights, pixel_losses
from r2kit.recipe import SegmentationLossSpec


def only(**weights) -> SegmentationLossSpec:
    return SegmentationLossSpec(**{"cross_entropy": 0.0, **weights})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, generator=generator)
    mask = torch.randint(0, 3, (2, 6, 5), generator=generator)
    mask[0, :2] = IGNORE
    return logits, mask


def flat(logits, mask):
    probs = logits.double().softmax(1).permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).numpy()
    label = mask.reshape(-1).numpy()
    return probs[label != IGNORE], label[label != IGNORE]


def test_cross_entropy_with_weights_and_smoothing(batch):
    probs, label = flat(*batch)
    weights = np.array([1.0, 2.0, 0.5])
    own = -np.log(probs[np.arange(len(label)), label])
    assert pixel_losses(*batch, only(cross_entropy=1.0)).item() == pytest.approx(own.mean(), rel=1e-5)
    wanted = (own * weights[label]).sum() / weights[label].sum()
    found = pixel_losses(*batch, only(cross_entropy=1.0), torch.tensor(weights)).item()
    assert found == pytest.approx(wanted, rel=1e-5)
    smooth = 0.8 * own + 0.2 * (-np.log(probs)).mean(1)
    spec = only(cross_entropy=1.0, label_smoothing=0.2)
    assert pixel_losses(*batch, spec).item() == pytest.approx(smooth.mean(), rel=1e-5)


def test_focal(batch):
    probs, label = flat(*batch)
    own = probs[np.arange(len(label)), label]
    wanted = ((1 - own) ** 1.5 * -np.log(own)).mean()
    assert pixel_losses(*batch, only(focal=1.0, focal_gamma=1.5)).item() == pytest.approx(wanted, rel=1e-5)


def test_dice(batch):
    probs, label = flat(*batch)
    truth = np.eye(3)[label]
    wanted = (1 - 2 * (probs * truth).sum(0) / (probs.sum(0) + truth.sum(0))).mean()
    assert pixel_losses(*batch, only(dice=1.0)).item() == pytest.approx(wanted, rel=1e-5)


def test_lovasz(batch):
    probs, label = flat(*batch)
    losses = []
    for value in range(3):
        truth = (label == value).astype(float)
        errors = np.abs(truth - probs[:, value])
        order = np.argsort(-errors, kind="stable")
        jaccard = [0.0]
        for end in range(1, len(order) + 1):  # the Jaccard loss of the end largest errors being wrong
            wrong = order[:end]
            left = truth.sum() - truth[wrong].sum()
            union = truth.sum() + (1 - truth[wrong]).sum()
            jaccard.append(1 - left / union)
        losses.append((errors[order] * np.diff(jaccard)).sum())
    assert pixel_losses(*batch, only(lovasz=1.0)).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_sum_is_the_sum(batch):
    parts = [only(cross_entropy=2.0), only(dice=0.5), only(focal=1.0), only(lovasz=3.0)]
    whole = SegmentationLossSpec(cross_entropy=2.0, dice=0.5, focal=1.0, lovasz=3.0)
    wanted = sum(pixel_losses(*batch, part).item() for part in parts)
    assert pixel_losses(*batch, whole).item() == pytest.approx(wanted, rel=1e-5)


def test_unlabelled_pixels_have_no_gradient_and_an_empty_mask_no_loss(batch):
    logits, mask = batch
    spec = SegmentationLossSpec(cross_entropy=1.0, dice=1.0, focal=1.0, lovasz=1.0)
    logits.requires_grad_()
    pixel_losses(logits, mask, spec).backward()
    assert (logits.grad[0, :, :2] == 0).all()
    assert (logits.grad[0, :, 2:] != 0).any()
    logits.grad = None
    loss = pixel_losses(logits, torch.full_like(mask, IGNORE), spec)
    loss.backward()
    assert loss.item() == 0.0
    assert (logits.grad == 0).all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"mask of shape \(1, 4, 4\) for logits \(1, 2, 5, 4\)"):
        pixel_losses(torch.zeros(1, 2, 5, 4), torch.zeros(1, 4, 4, dtype=torch.int64), SegmentationLossSpec())


def test_balanced_weights_make_up_for_the_shares():
    weights = balanced_weights(torch.tensor([100.0, 400.0, 200.0, 0.0]))
    assert weights.tolist() == [2.0, 0.5, 1.0, 1.0]
