"""Salient objects: a feature-pyramid decoder with deep supervision, its losses, and its measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from r2kit.backbones.weights import LoadReport
from r2kit.data.targets import IGNORE
from r2kit.dense.segmenter import build_backbone
from r2kit.errors import require
from r2kit.recipe import ModelSpec, SaliencyLossSpec, SaliencySpec

THRESHOLDS = 256
BETA_SQUARED = 0.3
"""Weight of the recall in the F-measure of salient objects (Achanta et al. 2009)."""


class SaliencyNet(nn.Module):
    """A backbone and a pyramid that joins its maps from the coarsest to the finest, each with a map of its own.

    Args:
        backbone: Maps at the strides 2 to 32.
        width: Channels of the pyramid.
        load_report: What loading the backbone's weights did; None for random weights.

    Source: the pyramid of Lin et al. 2017, arXiv:1612.03144, with a supervised map at every level as in Hou et al.
    2017, arXiv:1611.04849.
    """

    stride = 32

    def __init__(self, backbone: nn.Module, width: int, load_report: LoadReport | None = None) -> None:
        super().__init__()
        channels = backbone.feature_info.channels()  # type: ignore[union-attr,operator]
        self.backbone = backbone
        self.lateral = nn.ModuleList(_unit(count, width, 1) for count in channels)
        self.smooth = nn.ModuleList(_unit(width, width, 3) for _ in channels)
        self.sides = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)
        self.load_report = load_report

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of images (B, C, H, W).

        In training mode one map for each level of the pyramid, the finest first: (B, 5, H, W). In evaluation mode
        those of two classes, so that their softmax is the sigmoid of the finest map: (B, 2, H, W).
        """
        height, width = image.shape[-2:]
        down, right = -height % self.stride, -width % self.stride
        if down or right:
            image = F.pad(image, (0, right, 0, down))
        merged: Tensor | None = None
        maps = []
        levels = list(zip(self.backbone(image), self.lateral, self.smooth, self.sides, strict=True))
        for feature, lateral, smooth, side in reversed(levels):
            here = lateral(feature)
            if merged is not None:
                here = here + F.interpolate(merged, here.shape[-2:], mode="bilinear", align_corners=False)
            merged = smooth(here)
            maps.append(F.interpolate(side(merged), image.shape[-2:], mode="bilinear", align_corners=False))
            if not self.training and len(maps) < len(levels):
                maps[-1] = maps[-1][:, :0]  # only the finest is asked for
        logits = torch.cat(maps[::-1], 1)[..., :height, :width]
        return logits if self.training else torch.cat([torch.zeros_like(logits), logits], 1)

    def get_classifier(self) -> nn.Module:
        """Return what is not the backbone."""
        return nn.ModuleList([self.lateral, self.smooth, self.sides])


def _unit(channels: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def build_saliency(
    spec: ModelSpec, task: SaliencySpec, *, in_chans: int, rgb_bands: Sequence[int] | None = None
) -> SaliencyNet:
    """Build the network that a recipe of salient objects names, with its backbone's starting weights.

    Raises:
        ModelError: If the backbone cannot be had, or has no maps of five sizes.
    """
    backbone = build_backbone(
        spec, depth=5, output_stride=32, in_chans=in_chans, rgb_bands=rgb_bands, needs="task.kind=saliency"
    )
    return SaliencyNet(backbone, task.width, backbone.load_report)  # type: ignore[arg-type]


def saliency_loss(logits: Tensor, mask: Tensor, spec: SaliencyLossSpec, side_weight: float) -> Tensor:
    """Return the loss of the finest map plus that of every other one times its weight.

    Args:
        logits: (B, L, H, W), the finest map first.
        mask: (B, H, W) int64: 1 is the object, 0 is not, `IGNORE` does not count.
        spec: Weight of each loss.
        side_weight: Weight of each map but the finest.

    Source: structure loss: Wei et al. 2020, arXiv:1911.11445, eq. 3 to 6; IoU loss: Qin et al. 2019, BASNet, eq. 5.
    """
    known = (mask != IGNORE).to(logits.dtype)
    target = (mask == 1).to(logits.dtype)
    near = F.avg_pool2d(target[:, None], 31, stride=1, padding=15)[:, 0]
    weight = known * (1.0 + 5.0 * (near - target).abs())
    total = logits.new_zeros(())
    for level in range(logits.shape[1]):
        one = logits[:, level]
        point = F.binary_cross_entropy_with_logits(one, target, reduction="none")
        probs = one.sigmoid()
        loss = logits.new_zeros(())
        if spec.bce:
            loss = loss + spec.bce * (point * known).sum() / known.sum().clamp_min(1.0)
        if spec.iou:
            loss = loss + spec.iou * _iou_loss(probs, target, known)
        if spec.structure:
            each = (point * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1.0)
            loss = loss + spec.structure * (each.mean() + _iou_loss(probs, target, weight))
        total = total + (1.0 if level == 0 else side_weight) * loss
    return total


def _iou_loss(probs: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """One minus the weighted IoU of each image, softly; 1 added to both parts so that empty masks are defined."""
    both = (probs * target * weight).sum((1, 2))
    either = ((probs + target) * weight).sum((1, 2)) - both
    return (1.0 - (both + 1.0) / (either + 1.0)).mean()


def f_curve(probs: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.float64]:
    """Return the F-measure of one map at each of 256 thresholds from 1 down to 0.

    Args:
        probs: (N,) in [0, 1], the labelled pixels.
        truth: (N,) bool.

    Returns:
        (256,); 0 where nothing is found, and for a map without an object.
    """
    level = (np.clip(probs, 0.0, 1.0) * 255).astype(np.uint8)
    edges = np.arange(THRESHOLDS + 1)
    inside, outside = (np.histogram(level[part], edges)[0][::-1].cumsum() for part in (truth, ~truth))
    found = np.maximum(inside + outside, 1)
    precision, recall = inside / found, inside / max(int(truth.sum()), 1)
    below = BETA_SQUARED * precision + recall
    return np.where(below > 0, (1 + BETA_SQUARED) * precision * recall / np.where(below > 0, below, 1.0), 0.0)


def measures(probs: NDArray[Any], mask: NDArray[Any]) -> dict[str, Any]:
    """Return the measures of one map, from pysodmetrics but for the error and the F-measure.

    Args:
        probs: (H, W) in [0, 1], as the network gives them: not stretched to the whole range.
        mask: (H, W): 1 is the object, 0 is not. Where it is `IGNORE` both maps count as background.

    Returns:
        `mae`, `f_curve` (256,), `weighted_f`, `s_measure`, `e_curve` (256,).

    Raises:
        MissingExtraError: If pysodmetrics is not installed.

    Source: weighted F: Margolin et al. 2014; S-measure: Fan et al. 2017, arXiv:1708.00786; E-measure: Fan et al. 2018,
    arXiv:1805.10421.
    """
    require("py_sod_metrics", "pysodmetrics", "seg", "the measures of salient objects")
    from py_sod_metrics import Emeasure, Smeasure, WeightedFmeasure

    known = mask != IGNORE
    truth, pred = mask == 1, np.where(known, probs, 0.0).astype(np.float64)
    weighted, structure, enhanced = WeightedFmeasure(), Smeasure(), Emeasure()
    for measure in (weighted, structure, enhanced):
        measure.step(pred, truth, normalize=False)
    return {
        "mae": float(np.abs(pred - truth)[known].mean()) if known.any() else 0.0,
        "f_curve": f_curve(pred[known], truth[known]).tolist(),
        "weighted_f": float(weighted.get_results()["wfm"]),
        "s_measure": float(structure.get_results()["sm"]),
        "e_curve": np.asarray(enhanced.get_results()["em"]["curve"], dtype=np.float64).tolist(),
    }
