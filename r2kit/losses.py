"""Losses, chosen by the kind of target rather than by the augmentation that made it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def classification_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy in nats.

    Args:
        logits: (B, K).
        target: (B,) classes, or (B, K) rows that sum to 1, as MixUp and CutMix make them.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).

    Raises:
        ValueError: If the target is neither (B,) nor (B, K).

    Source: label smoothing from Szegedy et al. 2016, arXiv:1512.00567, sec. 7.
    """
    if target.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(f"target of shape {tuple(target.shape)} for logits {tuple(logits.shape)}: want (B,) or (B, K)")
    if target.ndim == 2:
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
