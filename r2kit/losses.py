"""Losses, chosen by the kind of target rather than by the augmentation that made it, and the weights of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from timm.loss import AsymmetricLossMultiLabel, AsymmetricLossSingleLabel
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss


def classification_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    focal_gamma: float | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Return the cross-entropy or focal loss, in nats.

    Args:
        logits: (B, K).
        target: (B,) classes, or (B, K) rows that sum to 1, as MixUp and CutMix make them.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
        weight: (K,) of the classes, see `effective_number_weights`; None for all 1. The mean is over the images and
            not over their weights, so that a batch of rare classes counts more than another.
        focal_gamma: Power of the focal loss, for (B,) targets; None for the cross-entropy.
        reduction: `mean` of the batch, or `none` for the loss of each image, (B,).

    Raises:
        ValueError: If the target is neither (B,) nor (B, K), or not (B,) for the focal loss.

    Source: label smoothing from Szegedy et al. 2016, arXiv:1512.00567, sec. 7; focal loss from Lin et al. 2017,
    arXiv:1708.02002, eq. 4, for the softmax.
    """
    if target.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(f"target of shape {tuple(target.shape)} for logits {tuple(logits.shape)}: want (B,) or (B, K)")
    if focal_gamma is not None:
        if target.ndim == 2:
            raise ValueError("the focal loss is for (B,) classes, not for mixed (B, K) targets")
        # With one power for the true and the other classes timm's asymmetric loss is the focal loss.
        focal = AsymmetricLossSingleLabel(focal_gamma, focal_gamma, eps=label_smoothing, reduction="none")
        losses: Tensor = focal(logits, target)
        losses = losses if weight is None else losses * weight[target]
        return losses if reduction == "none" else losses.mean()
    if target.ndim == 2:
        target = target.to(logits.dtype)
    if weight is None and reduction == "mean":
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, target, weight, label_smoothing=label_smoothing, reduction="none")
    return losses if reduction == "none" else losses.mean()


def multilabel_loss(
    logits: Tensor,
    target: Tensor,
    loss: Literal["cross_entropy", "focal", "asymmetric"] = "cross_entropy",
    *,
    label_smoothing: float = 0.0,
    pos_weight: Tensor | None = None,
    focal_gamma: float = 2.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Return the loss of independent labels in nats, mean over the labels.

    Args:
        logits: (B, K).
        target: (B, K), 1 for each label of an image; anything between where images are mixed.
        loss: Binary cross-entropy; focal without its alpha; or asymmetric with the powers (0 and 4) and the clip (0.05)
            of its paper.
        label_smoothing: Moves each target towards 0.5 by this share, in [0, 1); not for `focal`.
        pos_weight: (K,) weight of the images with each label in the cross-entropy, see `label_weights`.
        focal_gamma: Power of the focal loss.
        reduction: `mean` over the images, or `none` for the loss of each, (B,).

    Raises:
        ValueError: If the target is not (B, K).

    Source: Lin et al. 2017, arXiv:1708.02002, eq. 4; Ridnik et al. 2021, arXiv:2009.14119, eq. 4 to 6.
    """
    if target.shape != logits.shape:
        raise ValueError(f"target of shape {tuple(target.shape)} for logits {tuple(logits.shape)}: want (B, K)")
    target = target.to(logits.dtype)
    if loss == "focal":
        focal: Tensor = sigmoid_focal_loss(logits, target, alpha=-1, gamma=focal_gamma, reduction=reduction)
        return focal if reduction == "mean" else focal.mean(1)
    if loss == "asymmetric":
        asymmetric = AsymmetricLossMultiLabel(
            gamma_neg=4, gamma_pos=0, clip=0.05, smoothing=label_smoothing, reduction=reduction
        )
        found: Tensor = asymmetric(logits, target)
        return found if reduction == "mean" else found.mean(1)
    target = target * (1.0 - label_smoothing) + 0.5 * label_smoothing
    losses = F.binary_cross_entropy_with_logits(logits, target, pos_weight=pos_weight, reduction=reduction)
    return losses if reduction == "mean" else losses.mean(1)


def label_weights(counts: Sequence[int], images: int, beta: float) -> Tensor:
    """Return the weight of the images with a label against those without it, by their effective numbers.

    Args:
        counts: (K,) training images with each label; none counts as one.
        images: Number of training images.
        beta: In (0, 1): near 0 both sides weigh the same, near 1 the weight is images without / images with the label.

    Returns:
        (K,) float32.

    Source: effective numbers of Cui et al. 2019, arXiv:1901.05555, eq. 2, for each label's two sides.
    """
    held = np.clip(np.asarray(counts, dtype=np.float64), 1.0, None)
    bare = np.clip(images - held, 1.0, None)
    return torch.from_numpy(np.expm1(bare * np.log(beta)) / np.expm1(held * np.log(beta))).float()


def effective_number_weights(counts: Sequence[int], beta: float) -> Tensor:
    """Return the weight of each class by its effective number of images, 1 on average over the images.

    Args:
        counts: (K,) training images of each class; a class without any weighs what a single image would.
        beta: In (0, 1): near 0 all classes weigh the same, near 1 the inverse of their size.

    Returns:
        (K,) float32.

    Source: Cui et al. 2019, arXiv:1901.05555, eq. 2; normalised over images instead of classes, so that the size of the
    loss and with it the learning rate keeps its meaning.
    """
    images = np.asarray(counts, dtype=np.float64)
    each = (1.0 - beta) / -np.expm1(np.maximum(images, 1.0) * np.log(beta))  # 1 - beta^n without loss of digits
    return torch.from_numpy(each * images.sum() / (each * images).sum()).float()
