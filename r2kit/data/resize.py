"""Batches at another size, with whatever belongs to their places: for images that grow while training."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

MULTIPLE = 16  # px; what most networks divide an image by is 32, and half of it still leaves whole maps


def scaled_size(size: tuple[int, int], share: float) -> tuple[int, int]:
    """Return (H, W) times a share, in multiples of 16 pixels, 32 at least, and never more than the size itself."""
    height, width = (min(side, max(32, round(side * share / MULTIPLE) * MULTIPLE)) for side in size)
    return height, width


def resize_batch(batch: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Resize the images of a batch, and its masks and boxes with them.

    Args:
        batch: `image` (B, C, H, W), and by task `mask` (B, H, W) of classes, `saliency` (B, 1, H, W), `boxes` as lists
            of (N, 4) pixels x1 y1 x2 y2, `masks` as lists of (N, H, W); not changed.
        size: (h, w).
    """
    before = batch["image"].shape[-2:]
    if tuple(before) == size:
        return batch
    resized = dict(batch)
    resized["image"] = F.interpolate(batch["image"], size, mode="bilinear", antialias=True, align_corners=False)
    if "saliency" in batch:
        resized["saliency"] = F.interpolate(batch["saliency"], size, mode="bilinear", antialias=True)
    if "mask" in batch:
        resized["mask"] = _nearest(batch["mask"], size)
    if "boxes" in batch:
        scale = torch.tensor([size[1] / before[1], size[0] / before[0]] * 2, device=batch["image"].device)
        resized["boxes"] = [boxes * scale.to(boxes.dtype) for boxes in batch["boxes"]]
    if "masks" in batch:
        resized["masks"] = [_nearest(masks, size) for masks in batch["masks"]]
    return resized


def _nearest(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (N, H, W) values that must not be blended."""
    if not len(mask):
        return mask.new_zeros((0, *size))
    return F.interpolate(mask[None].double(), size, mode="nearest-exact")[0].to(mask.dtype)
