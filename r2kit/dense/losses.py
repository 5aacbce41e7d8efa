"""Losses of maps of classes, and their weighted sum; pixels marked `IGNORE` never count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from r2kit.data.targets import IGNORE
from r2kit.errors import require
from r2kit.recipe import SegmentationLossSpec


def pixel_losses(
    logits: Tensor, mask: Tensor, spec: SegmentationLossSpec, class_weights: Tensor | None = None
) -> Tensor:
    """Return the sum of losses that a recipe asks for.

    Args:
        logits: (B, K, H, W).
        mask: (B, H, W) int64 in [0, K), or `IGNORE`.
        spec: Weight of each loss.
        class_weights: (K,) for cross-entropy and focal; None for equal weights.

    Returns:
        A scalar; 0, with zero gradients, where no pixel is labelled.

    Raises:
        ValueError: If the shapes do not fit.

    Source: Dice: Milletari et al. 2016, arXiv:1606.04797. Focal: Lin et al. 2017, arXiv:1708.02002, eq. 4, over the
    softmax. Lovasz: Berman et al. 2018, arXiv:1705.08790, the softmax form over the classes present.
    """
    if mask.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f"mask of shape {tuple(mask.shape)} for logits {tuple(logits.shape)}: want (B, H, W)")
    if not (mask != IGNORE).any():
        return logits.sum() * 0.0
    total = logits.new_zeros(())
    if spec.cross_entropy or spec.focal:
        total = total + _pointwise(logits, mask, spec, class_weights)
    if spec.dice or spec.lovasz:
        require("segmentation_models_pytorch", "segmentation-models-pytorch", "seg", "the Dice and Lovasz losses")
        from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss

        if spec.dice:
            total = total + spec.dice * DiceLoss("multiclass", ignore_index=IGNORE)(logits, mask)
        if spec.lovasz:
            total = total + spec.lovasz * LovaszLoss("multiclass", ignore_index=IGNORE)(logits, mask)
    return total


def _pointwise(logits: Tensor, mask: Tensor, spec: SegmentationLossSpec, class_weights: Tensor | None) -> Tensor:
    """Cross-entropy and focal loss: means over labelled pixels, weighted by their class."""
    known = mask != IGNORE
    weight = known.to(logits.dtype)
    if class_weights is not None:
        weight = weight * class_weights.to(logits)[mask.where(known, 0)]
    norm = weight.sum().clamp_min(torch.finfo(logits.dtype).tiny)
    plain = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none")
    total = logits.new_zeros(())
    if spec.cross_entropy:
        entropy = plain
        if spec.label_smoothing:
            spread = -logits.log_softmax(1).mean(1)
            entropy = (1.0 - spec.label_smoothing) * plain + spec.label_smoothing * spread
        total = total + spec.cross_entropy * (weight * entropy).sum() / norm
    if spec.focal:
        wrong = -torch.expm1(-plain)  # one minus the probability of the true class
        total = total + spec.focal * (weight * wrong**spec.focal_gamma * plain).sum() / norm
    return total


def balanced_weights(pixels: Tensor) -> Tensor:
    """Return the median share of pixels over each class's own share.

    Args:
        pixels: (K,) labelled pixels of each class; a class without any gets the weight of the median class, 1.

    Source: Eigen and Fergus 2015, arXiv:1411.4734, sec. 6.3.2, with shares over all images.
    """
    count = pixels.double()
    present = count > 0
    median = count[present].quantile(0.5) if present.any() else count.new_ones(())
    return torch.where(present, median / count.clamp_min(1.0), 1.0).float()
