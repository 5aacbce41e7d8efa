"""The split-and-fuse unit that all Res2 families share, and the residual network made of it.

A Res2 unit is a ResNet bottleneck whose 3x3 convolution is replaced by a chain over `scale` splits of the channels::

    x  -> conv1 1x1 -> split into x0 .. x(S-1), `width` channels each
    z0 = conv(x0);  zi = conv(zi-1 + xi);  the last split passes through
    concat(z0 .. z(S-2), x(S-1)) -> conv3 1x1 -> BN -> + shortcut -> activation

The first unit of a stage has no chain: every split has its own convolution, which carries the stride, and the last
split is average-pooled. What is not obvious follows the authors' code, not the text of the paper: the *last* split
passes through (the paper's equation 1 lets the first one through), and the pool counts its zero padding.

No unit works in place, so no hook, export or concatenation ever sees a tensor that changes later.

Source: Gao et al. 2019, arXiv:1904.01169, and the authors' code (github.com/Res2Net/Res2Net-PretrainedModels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import get_act_layer, get_norm_layer
from timm.models.resnet import make_blocks
from torch import Tensor, nn

from r2kit.backbones._skeleton import StagedNet
from r2kit.errors import ModelError

__all__ = ["Order", "Res2Block", "Res2Net", "StemSpec"]

Order = Literal["norm_act", "act_norm"]
"""``norm_act``: convolution, BN, activation (ResNet). ``act_norm``: convolution, activation, BN (Res2NetPlus)."""

FirstBlock = Literal["pool", "grouped"]
"""What the first unit of a stage does; see `Res2Block`."""


class Res2Block(nn.Module):
    """The Res2 unit, in every form that the family uses. ``scale=1`` is the plain ResNet bottleneck.

    The signature is the one by which `timm.models.resnet.make_blocks` builds a stage. A unit is the first of its stage
    when it strides or projects its shortcut.

    Args:
        inplanes: Channels in.
        planes: Nominal width; the unit gives ``4 * planes`` channels.
        stride: Stride of the 3x3 convolutions.
        downsample: Projection of the shortcut, or None for the identity.
        cardinality: Groups of each 3x3 convolution.
        base_width: Channels of one split, for one group, at ``planes=64``.
        scale: Number of splits, >= 1.
        dilation: Dilation of the units after this one; used here unless `first_dilation` is given.
        first_dilation: Dilation of this unit's 3x3 convolutions.
        order: Where the activation stands after each 3x3 convolution.
        conv1_order: The same for the first 1x1; None means as `order`. The last 1x1 always has conv, BN, add,
            activation.
        act_bias: Give a bias to each convolution that an activation directly follows. Only for ``act_norm`` (before a
            BN a bias would do nothing); it holds what a folded BN leaves behind.
        first_block: The first unit of a stage: ``pool`` has ``scale - 1`` independent convolutions and average-pools
            the last split; ``grouped`` has one convolution over all splits with ``cardinality * scale`` groups.
        published_sum: Concatenate ``z0 + x1`` in place of ``z0``, as the published Res2NetPlus code does by accident.
        reduce_first: Part of the stage signature; only 1 is possible.
        act_layer: Activation class.
        norm_layer: Normalisation class.
        attn_layer: Builds a channel attention from its channel count; it stands after the last BN, before the addition.
        aa_layer: Part of the stage signature; anti-aliasing does not exist here, so only None is possible.
        drop_block: Builds a DropBlock for the concatenated splits, or None.
        drop_path: Stochastic depth for the residual branch, or None.
        device: Where to make the parameters.
        dtype: What the parameters are.

    Raises:
        ModelError: If the options cannot be honoured together.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        cardinality: int = 1,
        base_width: int = 26,
        scale: int = 4,
        dilation: int = 1,
        first_dilation: int | None = None,
        order: Order = "norm_act",
        conv1_order: Order | None = None,
        act_bias: bool = False,
        first_block: FirstBlock = "pool",
        published_sum: bool = False,
        reduce_first: int = 1,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        attn_layer: Callable[..., nn.Module] | None = None,
        aa_layer: None = None,
        drop_block: Callable[[], nn.Module] | None = None,
        drop_path: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv1_order = conv1_order or order
        if scale < 1:
            raise ModelError(f"Res2Block: scale must be >= 1, got {scale}")
        if act_bias and "norm_act" in (order, conv1_order):
            raise ModelError("Res2Block: act_bias needs order 'act_norm'; before a BatchNorm a bias has no effect")
        if reduce_first != 1 or aa_layer is not None:
            raise ModelError("Res2Block: reduce_first and aa_layer do not exist in this family")

        width = planes * base_width // 64 * cardinality
        if width < 1:
            raise ModelError(f"Res2Block: planes={planes} with base_width={base_width} leaves splits without channels")
        dilation = first_dilation or dilation
        is_first = stride > 1 or downsample is not None
        grouped = is_first and first_block == "grouped"
        inner = width * scale

        self.chained = not is_first
        self.published_sum = published_sum
        self.passes_last = scale > 1 and not grouped
        self.split_width = inner if grouped else width
        groups = cardinality * scale if grouped else cardinality
        num_convs = 1 if grouped else max(1, scale - 1)

        self.conv1 = nn.Conv2d(inplanes, inner, 1, bias=act_bias, **dd)
        self.bn1 = norm_layer(inner, **dd)
        self.act1 = act_layer()
        self.conv1_act_first = conv1_order == "act_norm"

        self.convs = nn.ModuleList(
            nn.Conv2d(
                self.split_width,
                self.split_width,
                3,
                stride=stride,
                padding=dilation,
                dilation=dilation,
                groups=groups,
                bias=act_bias,
                **dd,
            )
            for _ in range(num_convs)
        )
        self.bns = nn.ModuleList(norm_layer(self.split_width, **dd) for _ in range(num_convs))
        self.acts = nn.ModuleList(act_layer() for _ in range(num_convs))
        self.act_first = order == "act_norm"
        # Padding counts in the mean, so borders are dimmed: the published weights were trained with it.
        self.pool = nn.AvgPool2d(3, stride=stride, padding=1) if is_first and self.passes_last else nn.Identity()
        self.drop_block = drop_block() if drop_block is not None else nn.Identity()

        self.conv3 = nn.Conv2d(inner, planes * self.expansion, 1, bias=False, **dd)
        self.bn3 = norm_layer(planes * self.expansion, **dd)
        self.se = attn_layer(planes * self.expansion, **dd) if attn_layer is not None else nn.Identity()
        self.drop_path = drop_path if drop_path is not None else nn.Identity()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.act3 = act_layer()

    def zero_init_last(self) -> None:
        """Start the residual branch at zero; called by timm's `init_weights`."""
        nn.init.constant_(self.bn3.get_parameter("weight"), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inplanes, H, W) to (B, 4 * planes, ceil(H / stride), ceil(W / stride))."""
        shortcut = self.downsample(x)

        x = self.conv1(x)
        x = self.bn1(self.act1(x)) if self.conv1_act_first else self.act1(self.bn1(x))

        splits = torch.split(x, self.split_width, 1)
        outs: list[Tensor] = []
        z = splits[0]
        for i, (conv, bn, act) in enumerate(zip(self.convs, self.bns, self.acts)):  # noqa: B905  for torch.jit
            if self.chained and i > 0:
                z = z + splits[i]
                if self.published_sum and i == 1:
                    outs[0] = z
            else:
                z = splits[i]
            z = conv(z)
            z = bn(act(z)) if self.act_first else act(bn(z))
            outs.append(z)
        if self.passes_last:
            outs.append(self.pool(splits[-1]))

        x = self.drop_block(torch.cat(outs, 1))
        x = self.drop_path(self.se(self.bn3(self.conv3(x))))
        return self.act3(x + shortcut)


@dataclass(frozen=True)
class StemSpec:
    """The layers in front of the first stage, to stride 2; a max-pool to stride 4 follows.

    Args:
        widths: Channels of three 3x3 convolutions with strides 2, 1, 1; None for the single 7x7 convolution to 64.
        order: Where the activation stands after each convolution.
        act_bias: Give the convolutions a bias; only for ``act_norm``.
    """

    widths: tuple[int, int, int] | None = None
    order: Order = "norm_act"
    act_bias: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be honoured."""
        if self.widths is None and self.order == "act_norm":
            raise ModelError("StemSpec: order 'act_norm' needs three widths")
        if self.act_bias and self.order == "norm_act":
            raise ModelError("StemSpec: act_bias needs order 'act_norm'; before a BatchNorm a bias has no effect")


class Res2Net(StagedNet):
    """A residual network of `Res2Block` with timm's whole backbone contract, inherited from timm's `ResNet`.

    Module names, and so state-dict keys, are those of timm's and the authors' Res2Nets: `conv1`, `bn1`, `layer1` to
    `layer4`, `fc`.

    Args:
        layers: Units in each of the four stages.
        base_width: Channels of one split, for one group, at the first stage.
        scale: Number of splits.
        cardinality: Groups of each 3x3 convolution.
        stem: The layers in front of the first stage.
        avg_down: Project the shortcut by average pool and 1x1 convolution (v1b) instead of a strided 1x1 (v1).
        order: See `Res2Block`.
        conv1_order: See `Res2Block`.
        act_bias: See `Res2Block`.
        published_sum: See `Res2Block`.
        act_layer: Activation class, or its name in timm.
        norm_layer: Normalisation class, or its name in timm.
        attn_layer: See `Res2Block`.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Bands of the input image.
        output_stride: 32, 16 or 8; strides beyond it become dilations.
        global_pool: Name of a timm pooling: ``avg``, ``max``, ``avgmax``, ``catavgmax`` or an empty string.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last unit; it rises linearly from zero at the first.
        drop_block_rate: DropBlock probability in the last two stages.
        zero_init_last: Start each residual branch at zero. The sources do not.
        channels: Nominal width of each stage; a stage gives four times as many.
        device: Where to make the parameters.
        dtype: What the parameters are.

    Raises:
        ModelError: If the options cannot be honoured.
    """

    def __init__(
        self,
        layers: Sequence[int],
        base_width: int = 26,
        scale: int = 4,
        cardinality: int = 1,
        stem: StemSpec = StemSpec(),
        avg_down: bool = False,
        order: Order = "norm_act",
        conv1_order: Order | None = None,
        act_bias: bool = False,
        published_sum: bool = False,
        act_layer: str | type[nn.Module] = nn.ReLU,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        attn_layer: Callable[..., nn.Module] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        zero_init_last: bool = False,
        channels: Sequence[int] = (64, 128, 256, 512),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(layers) != 4:
            raise ModelError(f"layers: a network of this kind has four stages, got {list(layers)}")
        if output_stride not in (8, 16, 32):
            raise ModelError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act: type[nn.Module] = get_act_layer(act_layer)
        norm: type[nn.Module] = get_norm_layer(norm_layer)
        super().__init__(num_classes, in_chans, drop_rate, act, norm, dd)
        if stem.widths is not None:
            self._use_deep_stem(stem, stem.widths, act, norm, dd)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        stages, stage_info = make_blocks(
            (Res2Block,) * 4,
            tuple(channels),
            tuple(layers),
            self.feature_info[0]["num_chs"],
            output_stride=output_stride,
            avg_down=avg_down,
            drop_block_rate=drop_block_rate,
            drop_path_rate=drop_path_rate,
            cardinality=cardinality,
            base_width=base_width,
            scale=scale,
            order=order,
            conv1_order=conv1_order,
            act_bias=act_bias,
            published_sum=published_sum,
            act_layer=act,
            norm_layer=norm,
            attn_layer=attn_layer,
            **dd,
        )
        for name, stage in stages:
            self.add_module(name, stage)
        self.feature_info.extend(stage_info)

        self._finish(channels[-1] * Res2Block.expansion, global_pool, zero_init_last, dd)

    def _use_deep_stem(
        self,
        stem: StemSpec,
        widths: tuple[int, int, int],
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        dd: dict[str, Any],
    ) -> None:
        """Put three 3x3 convolutions into `conv1`, `bn1` and `act1`, which timm's ResNet calls in this order."""
        act_first = stem.order == "act_norm"
        modules: list[nn.Module] = []
        chs = self.in_chans
        for i, width in enumerate(widths):
            modules.append(nn.Conv2d(chs, width, 3, stride=2 if i == 0 else 1, padding=1, bias=stem.act_bias, **dd))
            norm_act = [norm_layer(width, **dd), act_layer()]
            modules += reversed(norm_act) if act_first else norm_act
            chs = width
        # The last norm and activation are the network's own bn1 and act1. With the activation first it goes into conv1,
        # and act1, where timm taps the stem's features, is empty.
        if act_first:
            modules.append(nn.Identity())
        self.conv1 = nn.Sequential(*modules[:-2])
        self.bn1 = modules[-2]
        self.act1 = modules[-1]
        self.feature_info[0]["num_chs"] = chs
