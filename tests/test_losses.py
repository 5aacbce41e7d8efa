import numpy as np
import pytest
import torch

from r2kit.losses import classification_loss, effective_number_weights, multilabel_loss


def slow(logits, target, smoothing):
    """Cross-entropy written out with loops."""
    total = 0.0
    for row, want in zip(logits, target, strict=True):
        log_probs = row - np.log(np.exp(row).sum())
        mixed = (1 - smoothing) * want + smoothing / len(row)
        total -= sum(w * p for w, p in zip(mixed, log_probs, strict=True))
    return total / len(logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_and_soft_targets_agree_with_loops(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    label = torch.tensor([0, 3, 1, 1, 2])
    hard = np.eye(4)[label.numpy()]
    soft = torch.softmax(torch.randn(5, 4, generator=generator, dtype=torch.float64), 1)
    assert classification_loss(logits, label, smoothing).item() == pytest.approx(slow(logits.numpy(), hard, smoothing))
    assert classification_loss(logits, soft, smoothing).item() == pytest.approx(
        slow(logits.numpy(), soft.numpy(), smoothing)
    )


def test_a_target_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"target of shape \(3,\) for logits \(2, 4\)"):
        classification_loss(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_are_those_of_the_true_class_and_the_mean_is_over_images(smoothing):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    label = torch.tensor([0, 2, 1, 1, 0, 2])
    weight = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    total = 0.0
    for row, want in zip(logits.numpy(), np.eye(3)[label.numpy()], strict=True):
        log_probs = row - np.log(np.exp(row).sum())
        total -= ((1 - smoothing) * want + smoothing / 3) @ (weight.numpy() * log_probs)
    for target in (label, torch.eye(3, dtype=torch.float64)[label]):
        assert classification_loss(logits, target, smoothing, weight).item() == pytest.approx(total / 6)


def test_focal_loss_against_its_formula():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 4, (7,), generator=generator)
    p = logits.softmax(1)[torch.arange(7), label]
    for gamma in (0.5, 2.0):
        want = -((1 - p) ** gamma * p.log())
        assert classification_loss(logits, label, focal_gamma=gamma).item() == pytest.approx(want.mean().item())
        weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        weighted = classification_loss(logits, label, weight=weight, focal_gamma=gamma)
        assert weighted.item() == pytest.approx((want * weight[label]).mean().item())
    with pytest.raises(ValueError, match="not for mixed"):
        classification_loss(logits, logits.softmax(1), focal_gamma=2.0)


def test_effective_number_weights():
    counts = np.array([1000, 100, 10, 1])
    for beta in (0.9, 0.999):
        slow = np.array([1 / sum(beta**i for i in range(n)) for n in counts])
        slow *= counts.sum() / (slow * counts).sum()
        np.testing.assert_allclose(effective_number_weights(counts.tolist(), beta).numpy(), slow, rtol=1e-5)
    even = effective_number_weights(counts.tolist(), 1e-9).numpy()
    np.testing.assert_allclose(even, 1.0, rtol=1e-6)
    inverse = effective_number_weights(counts.tolist(), 1 - 1e-9).numpy()
    np.testing.assert_allclose(inverse * counts, counts.sum() / 4, rtol=1e-4)
    assert torch.isfinite(effective_number_weights([5, 0], 0.99)).all()


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2.0, 0.5])}, {"focal_gamma": 2.0}]
)
def test_the_losses_of_the_images_have_the_loss_of_the_batch_as_their_mean(options):
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    each = classification_loss(logits, target, **options, reduction="none")
    assert each.shape == (5,)
    torch.testing.assert_close(each.mean(), classification_loss(logits, target, **options))


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "asymmetric"])
def test_the_losses_of_labelled_images_have_the_loss_of_the_batch_as_their_mean(loss):
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    each = multilabel_loss(logits, target, loss, reduction="none")
    assert each.shape == (5,)
    torch.testing.assert_close(each.mean(), multilabel_loss(logits, target, loss))
