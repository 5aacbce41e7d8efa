"""MixUp and CutMix for whole batches, on the device, a pure function of a seed.

The transforms are torchvision's, which accept odd batches and several labels per image. They draw from torch's global
generator; here that generator is set from our own seed and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from r2kit.recipe import AugmentSpec
from r2kit.seeding import derive_seed

MixKind = Literal["mixup", "cutmix"]


def draw_kind(spec: AugmentSpec, key: Sequence[int]) -> MixKind | None:
    """Decide what happens to one batch.

    Args:
        spec: Shares of the batches for MixUp and CutMix.
        key: Non-negative integers that name the batch; the result is a pure function of them.
    """
    draw = np.random.default_rng([*key, 0]).random()
    if draw < spec.mixup:
        return "mixup"
    return "cutmix" if draw < spec.mixup + spec.cutmix else None


def cutmix_masks(image: Tensor, mask: Tensor, alpha: float, key: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of the neighbour in the batch into each image, and the same of its mask.

    Args:
        image: (B, C, H, W), normalised; not changed.
        mask: (B, H, W); not changed.
        alpha: Parameter of the Beta(alpha, alpha) that draws the share of the area that stays.
        key: Non-negative integers that name the batch; the result is a pure function of them and the arguments.

    Returns:
        (B, C, H, W) and (B, H, W): each pixel keeps its own class, so no label is blended.

    Source: Yun et al. 2019, arXiv:1905.04899, sec. 3.1; for masks French et al. 2020, arXiv:1906.01916.
    """
    rng = np.random.default_rng([*key, 2])
    height, width = mask.shape[1:]
    side = np.sqrt(1.0 - rng.beta(alpha, alpha))
    centre = rng.random(2) * (height, width)
    half = np.array([height, width]) * side / 2
    (top, left), (bottom, right) = np.rint((centre - half, centre + half)).clip(0, (height, width)).astype(int)
    window = (..., slice(int(top), int(bottom)), slice(int(left), int(right)))
    mixed_image, mixed_mask = image.clone(), mask.clone()
    mixed_image[window], mixed_mask[window] = image.roll(1, 0)[window], mask.roll(1, 0)[window]
    return mixed_image, mixed_mask


def mix_batch(
    image: Tensor, label: Tensor, kind: MixKind, alpha: float, num_classes: int, key: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Blend each image with its neighbour in the batch, or paste a rectangle of the neighbour into it.

    Args:
        image: (B, C, H, W), normalised; not changed.
        label: (B,) int64, or (B, K) float for several labels per image.
        kind: `mixup` blends, `cutmix` pastes.
        alpha: Parameter of the Beta(alpha, alpha) that draws the blend or the area of the rectangle.
        num_classes: K.
        key: Non-negative integers that name the batch; the result is a pure function of them and the arguments.

    Returns:
        (B, C, H, W) images and (B, K) float targets.

    Source:
        MixUp: Zhang et al. 2018, arXiv:1710.09412. CutMix: Yun et al. 2019, arXiv:1905.04899.
    """
    transform = (v2.MixUp if kind == "mixup" else v2.CutMix)(alpha=alpha, num_classes=num_classes)
    seed = derive_seed(*key, 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reseed the GPUs as well
        mixed_image, mixed_label = transform(image, label)
    return mixed_image, mixed_label
