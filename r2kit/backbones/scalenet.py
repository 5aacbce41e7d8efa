"""ScaleNet: residual blocks whose 3x3 convolution is spread over four scales, with learned channel counts.

A block pools its reduced map by 1, 2, 4 and 7, convolves each result to its own number of channels, resizes them back,
normalises and concatenates them. How many channels each scale of each block gets is data: the channel table
(`scalenet_tables`), which the authors found by training (`allocation` does the same on your data).

Three rules of the authors' code fix the checkpoints, and are kept: a branch's kernel is 3x3 unless the table's 224-px
`side`, halved once per scale *index*, is at most 1 (only scale 7 at side 7 gets 1x1); a strided stage max-pools its
input by 2 before both branches, so no convolution after the stem strides; a branch is resized by nearest neighbour
where both sides of the block's map divide by those of the pooled map, else bilinearly. Keys are the authors' own, so
their checkpoints load as they are. The output equals theirs on every size that their code takes (the last map at least
7 x 7).

Two differences make every other size work. A branch without channels is not run. A pool larger than the map becomes
the map, so on small images the coarse branches see the whole map; the weights stay the same.

Source: Li et al. 2019, arXiv:1904.09460; github.com/Eli-YiLi/ScaleNet (the PyTorch code; its TensorFlow code is a
different network).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer, get_norm_layer, register_notrace_function
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from r2kit.backbones._skeleton import StagedNet, drop_path_at, imagenet_cfg, plan_stages
from r2kit.backbones.scalenet_tables import (
    SCALENET50,
    SCALENET50_LIGHT,
    SCALENET101,
    SCALENET152,
    SCALES,
    Row,
    read_structure,
    stages_of,
)
from r2kit.errors import ModelError

__all__ = ["ScaleBlock", "ScaleNet"]


@register_notrace_function
def pool_within(x: Tensor, factor: int) -> Tensor:
    """Max-pool by `factor` without overlap or padding, by the whole side where the map is smaller.

    Args:
        x: (B, C, H, W).
        factor: Kernel and stride, >= 1.

    Returns:
        (B, C, max(1, H // factor), max(1, W // factor)).
    """
    kernel = [min(factor, x.shape[2]), min(factor, x.shape[3])]
    return F.max_pool2d(x, kernel, kernel)


@register_notrace_function
def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Resize (B, C, h, w) to the sides of `like`: nearest if they divide by h and w, else bilinear."""
    height, width = like.shape[2], like.shape[3]
    if height % x.shape[2] == 0 and width % x.shape[3] == 0:
        return F.interpolate(x, size=[height, width], mode="nearest")
    return F.interpolate(x, size=[height, width], mode="bilinear", align_corners=False)


class ScaleBlock(nn.Module):
    """ScaleNet's scale-aggregation block.

    Args:
        in_chs: Channels in.
        planes: Channels after the first 1x1; the block gives ``4 * planes``.
        row: The block's row of the channel table, ``(n1, n2, n4, n7, side)``.
        stride: 1, or 2 to max-pool the input by 2 first.
        project: Project the shortcut by 1x1 convolution and BN; needed when the channels change.
        dilation: For a stage whose stride was removed: the finest branch's convolution is dilated by it, and the coarse
            branches pool by that many times their factor, so each tap sees the area that it was trained on.
        drop_path: Stochastic depth for the residual branch, or None.
        act_layer: Activation class.
        norm_layer: Normalisation class.
        device: Where to make the parameters.
        dtype: What the parameters are.
    """

    expansion = 4

    def __init__(
        self,
        in_chs: int,
        planes: int,
        row: Row,
        stride: int = 1,
        project: bool = False,
        dilation: int = 1,
        drop_path: nn.Module | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        out_chs = planes * self.expansion
        *counts, side = row
        self.row = row
        self.planes = planes
        self.stride = stride

        self.downsample: nn.Module = nn.Identity()
        if project:
            self.downsample = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd), norm_layer(out_chs, **dd))

        self.conv1 = nn.Conv2d(in_chs, planes, 1, bias=False, **dd)
        self.bn1 = norm_layer(planes, **dd)
        self.act1 = act_layer(inplace=True)

        # Keyed by scale index, and without the empty ones: the keys of the authors' lists, which hold None there.
        self.conv2 = nn.ModuleDict()
        self.bn2 = nn.ModuleDict()
        self.factors: list[int] = []
        for index, (scale, count) in enumerate(zip(SCALES, counts, strict=True)):
            if count == 0:
                continue
            taps_dilation = dilation if scale == 1 else 1
            kernel, padding = (3, taps_dilation) if side / 2**index > 1 else (1, 0)
            self.conv2[str(index)] = nn.Conv2d(
                planes, count, kernel, padding=padding, dilation=taps_dilation, bias=False, **dd
            )
            self.bn2[str(index)] = norm_layer(count, **dd)
            self.factors.append(1 if scale == 1 else scale * dilation)
        self.act2 = act_layer(inplace=True)

        self.conv3 = nn.Conv2d(sum(counts), out_chs, 1, bias=False, **dd)
        self.bn3 = norm_layer(out_chs, **dd)
        self.drop_path = drop_path if drop_path is not None else nn.Identity()
        self.act3 = act_layer(inplace=True)

    def zero_init_last(self) -> None:
        """Start the residual branch at zero; called by timm's `init_weights`."""
        if isinstance(self.bn3.weight, Tensor):  # a norm layer may have none
            nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_chs, H, W) to (B, 4 * planes, H / stride, W / stride), sides rounded down, at least 1."""
        if self.stride > 1:
            x = pool_within(x, self.stride)
        shortcut = self.downsample(x)

        x = self.act1(self.bn1(self.conv1(x)))

        branches: list[Tensor] = []
        for i, (conv, bn) in enumerate(zip(self.conv2.values(), self.bn2.values())):  # noqa: B905  torch.jit
            factor = self.factors[i]
            z = conv(pool_within(x, factor)) if factor > 1 else conv(x)
            branches.append(bn(resize_like(z, x)))
        x = self.act2(torch.cat(branches, 1))

        x = self.drop_path(self.bn3(self.conv3(x)))
        return self.act3(x + shortcut)


class ScaleNet(StagedNet):
    """ScaleNet with timm's whole backbone contract. The channel table fixes the depth.

    Args:
        structure: The channel table: a path to JSON of the authors' format, or rows ``(n1, n2, n4, n7, side)``.
        channels: Channels of the four stages' 1x1 bottlenecks; stage k gives ``4 * channels[k]``.
        act_layer: Activation class, or its name in timm.
        norm_layer: Normalisation class, or its name in timm.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Bands of the image.
        output_stride: 32, 16 or 8. A stage whose stride is removed does not pool its input; see `ScaleBlock.dilation`.
        global_pool: Name of a timm pooling: ``avg``, ``max``, ``avgmax``, ``catavgmax`` or an empty string.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from zero at the first.
        zero_init_last: Start each residual branch at zero. The authors do not.
        device: Where to make the parameters.
        dtype: What the parameters are.

    Raises:
        ModelError: If the table is wrong or an option cannot be honoured.
    """

    def __init__(
        self,
        structure: str | Path | Sequence[Sequence[int]],
        channels: Sequence[int] = (64, 128, 256, 512),
        act_layer: str | type[nn.Module] = nn.ReLU,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act: type[nn.Module] = get_act_layer(act_layer)
        norm: type[nn.Module] = get_norm_layer(norm_layer)
        super().__init__(num_classes, in_chans, drop_rate, act, norm, dd)
        if len(channels) != 4 or min(channels) < 1:
            raise ModelError(f"channels must be four positive numbers, one per stage, got {list(channels)}")
        self.structure = read_structure(structure)

        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_chs, index = self.stem_chs, 0
        stages = zip(stages_of(self.structure), channels, plan_stages((1, 2, 2, 2), output_stride), strict=True)
        for number, (rows, planes, plan) in enumerate(stages, start=1):
            blocks: list[nn.Module] = []
            for row in rows:
                first = not blocks
                blocks.append(
                    ScaleBlock(
                        in_chs,
                        planes,
                        row,
                        stride=plan.stride if first else 1,
                        project=first and (number > 1 or in_chs != planes * ScaleBlock.expansion),
                        dilation=plan.dilation,
                        drop_path=drop_path_at(index, len(self.structure), drop_path_rate),
                        act_layer=act,
                        norm_layer=norm,
                        **dd,
                    )
                )
                in_chs, index = planes * ScaleBlock.expansion, index + 1
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": in_chs, "reduction": plan.reduction, "module": f"layer{number}"})
        self._finish(in_chs, global_pool, zero_init_last, dd)


default_cfgs = generate_default_cfgs(
    {
        "scalenet50_light.untrained": imagenet_cfg(),
        "scalenet50.untrained": imagenet_cfg(),
        "scalenet101.untrained": imagenet_cfg(),
        "scalenet152.untrained": imagenet_cfg(),
    }
)


def _create(variant: str, pretrained: bool, options: dict[str, Any], **defaults: Any) -> ScaleNet:
    """Build `variant`; the caller's `options` go before `defaults`, and an unknown one is refused by `ScaleNet`."""
    return build_model_with_cfg(ScaleNet, variant, pretrained, **{**defaults, **options})


@register_model
def scalenet50_light(pretrained: bool = False, **kwargs: Any) -> ScaleNet:
    """ScaleNet-50-light: 23.6 M parameters, 2.86 GMACs; `structure=` takes another table."""
    return _create("scalenet50_light", pretrained, kwargs, structure=SCALENET50_LIGHT)


@register_model
def scalenet50(pretrained: bool = False, **kwargs: Any) -> ScaleNet:
    """ScaleNet-50: 31.5 M parameters, 3.82 GMACs; `structure=` takes another table."""
    return _create("scalenet50", pretrained, kwargs, structure=SCALENET50)


@register_model
def scalenet101(pretrained: bool = False, **kwargs: Any) -> ScaleNet:
    """ScaleNet-101: 54.8 M parameters, 7.51 GMACs; `structure=` takes another table."""
    return _create("scalenet101", pretrained, kwargs, structure=SCALENET101)


@register_model
def scalenet152(pretrained: bool = False, **kwargs: Any) -> ScaleNet:
    """ScaleNet-152: 77.2 M parameters, 11.21 GMACs; `structure=` takes another table."""
    return _create("scalenet152", pretrained, kwargs, structure=SCALENET152)
