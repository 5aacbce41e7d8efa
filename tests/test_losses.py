import numpy as np
import pytest
import torch

from r2kit.losses import classification_loss


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
