"""Big-Little networks: deep blocks at half resolution beside few narrow blocks at full resolution.

Stages 1 to 3 are Big-Little modules. The *big* branch halves the side and runs all but one of the stage's bottlenecks
there; the *little* branch runs few bottlenecks of ``1 / alpha`` of the channels at full resolution. Both are added, and
one fusion bottleneck with the stage's stride follows. Stage 4 is an ordinary stage. There is no max-pool: the stem has
two branches of its own.

Where the maps are, for a 224-px image: stem convolution 112; Big-Little stem 56; module 1 adds its branches at 56 and
leaves at 28; module 2 adds at 28 and leaves at 14; module 3 stays at 14; stage 4 leaves at 7. So the features of
reductions 4 and 8 are the *sums* in modules 1 and 2 (256 and 512 channels), in front of the fusion bottleneck that
strides, which gives the same pyramid of 64, 256, 512, 1024 and 2048 channels as a ResNet's.

Rules of the authors' code that the checkpoints rest on: the last block of a big branch has no final activation (unless
it is the only one); a strided shortcut is a 3x3 average pool that counts its padding, with a 1x1 convolution only if
the channels change; the big branch is resized by nearest neighbour; the little branch of a ResNeXt has ``alpha`` times
the width per group in ``1 / alpha`` of the groups. Keys are the authors', except that the SE layer is `se`, not
`se_layer`.

`blres2net50` has no public code. Its name and error (21.68 %) are from the Res2Net paper; inferred here are that
*every* bottleneck, in both branches and in stage 4, is a Res2 unit of 26w x 4s, and that alpha is 2 and beta 4, as in
all of the Big-Little paper's main results.

Source: Chen et al. 2019, "Big-Little Net", ICLR, arXiv:1807.03848; github.com/IBM/BigLittleNet. Gao et al. 2019,
arXiv:1904.01169, for the Res2 unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SEModule, get_act_layer, get_norm_layer
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from r2kit.backbones._res2 import Res2Block
from r2kit.backbones._skeleton import StagedNet, StagePlan, drop_path_at, imagenet_cfg, plan_stages
from r2kit.errors import ModelError

__all__ = ["BigLittleModule", "BigLittleNet"]


@dataclass(frozen=True)
class _Blocks:
    """How to make bottlenecks: the class, its widths, and what all of them share.

    `planes` of the class is a quarter of the channels out.
    """

    block: type[nn.Module]
    base_width: int
    cardinality: int
    shared: dict[str, Any]
    num_blocks: int  # of the whole network, along the big branches
    drop_path_rate: float

    def little(self, alpha: int) -> _Blocks:
        """Return the maker for a little branch."""
        if self.cardinality == 1:
            return self
        return replace(self, base_width=self.base_width * alpha, cardinality=self.cardinality // alpha)

    def stack(
        self,
        in_chs: int,
        out_chs: int,
        count: int,
        index: int,
        *,
        stride: int = 1,
        natural_stride: int | None = None,
        dilation: int = 1,
        first_dilation: int | None = None,
    ) -> nn.Sequential:
        """Make `count` bottlenecks, the first of which strides.

        Args:
            in_chs: Channels in.
            out_chs: Channels out.
            count: How many.
            index: Place of the first one in the network, for its stochastic depth.
            stride: Stride of the first one.
            natural_stride: Its stride before dilation took it away; None means `stride`.
            dilation: Dilation of all but the first.
            first_dilation: Dilation of the first; None means `dilation`.
        """
        norm_layer = self.shared["norm_layer"]
        dd = {"device": self.shared["device"], "dtype": self.shared["dtype"]}
        shortcut: list[nn.Module] = []
        if stride != 1:
            shortcut.append(nn.AvgPool2d(3, stride=2, padding=1))
        elif natural_stride is not None and natural_stride != stride:
            shortcut.append(nn.Identity())  # keeps the keys of the layers behind it
        if in_chs != out_chs:
            shortcut += [nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd), norm_layer(out_chs, **dd)]
        blocks = []
        for i in range(count):
            first = i == 0
            blocks.append(
                self.block(
                    in_chs if first else out_chs,
                    out_chs // 4,
                    stride=stride if first else 1,
                    downsample=nn.Sequential(*shortcut) if first and shortcut else None,
                    base_width=self.base_width,
                    cardinality=self.cardinality,
                    dilation=dilation,
                    first_dilation=(first_dilation or dilation) if first else dilation,
                    drop_path=drop_path_at(index + i, self.num_blocks, self.drop_path_rate),
                    **self.shared,
                )
            )
        return nn.Sequential(*blocks)


class BigLittleModule(nn.Module):
    """One of the stages 1 to 3: ``fusion(act(resize(big(x)) + little_e(little(x))))``.

    Args:
        make: Maker of the bottlenecks.
        in_chs: Channels in.
        out_chs: Channels out.
        depth: The stage's number of blocks: ``depth - 1`` big ones and the fusion.
        alpha: The little branch has ``1 / alpha`` of the channels.
        beta: The little branch has ``max(1, depth // beta - 1)`` blocks.
        plan: Stride and dilations.
        natural_stride: The stage's stride at output stride 32.
        index: Place of the first block in the network.
    """

    def __init__(
        self,
        make: _Blocks,
        in_chs: int,
        out_chs: int,
        depth: int,
        alpha: int,
        beta: int,
        plan: StagePlan,
        natural_stride: int,
        index: int,
    ) -> None:
        super().__init__()
        norm_layer, act_layer = make.shared["norm_layer"], make.shared["act_layer"]
        dd = {"device": make.shared["device"], "dtype": make.shared["dtype"]}
        little_chs = out_chs // alpha
        # The branches and the fusion lie in front of the point where the stage strides: they have the old dilation.
        dilation = plan.first_dilation
        self.big = make.stack(in_chs, out_chs, depth - 1, index, stride=2, dilation=dilation)
        if depth > 2:
            self.big[-1].act3 = nn.Identity()
        little_depth = max(1, depth // beta - 1)
        self.little = make.little(alpha).stack(in_chs, little_chs, little_depth, index, dilation=dilation)
        self.little_e = nn.Sequential(nn.Conv2d(little_chs, out_chs, 1, bias=False, **dd), norm_layer(out_chs, **dd))
        self.act = act_layer(inplace=True)
        self.fusion = make.stack(
            out_chs,
            out_chs,
            1,
            index + depth - 1,
            stride=plan.stride,
            natural_stride=natural_stride,
            dilation=dilation,
        )

    def merge(self, x: Tensor) -> Tensor:
        """Return the activated sum of both branches, (B, out_chs, H, W)."""
        little = self.little_e(self.little(x))
        big = F.interpolate(self.big(x), size=little.shape[2:], mode="nearest")
        return self.act(big + little)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_chs, H, W) to (B, out_chs, ceil(H / stride), ceil(W / stride))."""
        return self.fusion(self.merge(x))


class BigLittleNet(StagedNet):
    """A Big-Little network with timm's whole backbone contract.

    Args:
        layers: Blocks of the four stages; at least two in each of the first three.
        block: The bottleneck: timm's, or a class of its signature (a `Res2Block`).
        block_args: More arguments of the bottleneck, such as ``scale`` of a `Res2Block`.
        alpha: The little branches have ``1 / alpha`` of the channels.
        beta: The little branches have ``max(1, blocks // beta - 1)`` blocks.
        cardinality: Groups of the 3x3 convolutions.
        base_width: Channels per group at 64 planes.
        attn_layer: Builds a channel attention from its channel count, after the last BN of a block, or None.
        act_layer: Activation class, or its name in timm.
        norm_layer: Normalisation class, or its name in timm.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Bands of the image.
        output_stride: 32, 16 or 8. A strided unit whose stride is removed has no pool in its shortcut; the big branches
            go on halving, as their maps are resized back.
        global_pool: Name of a timm pooling: ``avg``, ``max``, ``avgmax``, ``catavgmax`` or an empty string.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from zero at the first, and parallel
            blocks of a big and a little branch have the same.
        zero_init_last: Start each residual branch at zero, as the authors do.
        device: Where to make the parameters.
        dtype: What the parameters are.

    Raises:
        ModelError: If an option cannot be honoured.
    """

    def __init__(
        self,
        layers: Sequence[int],
        block: type[nn.Module] = Bottleneck,
        block_args: dict[str, Any] | None = None,
        alpha: int = 2,
        beta: int = 4,
        cardinality: int = 1,
        base_width: int = 64,
        attn_layer: Callable[..., nn.Module] | None = None,
        act_layer: str | type[nn.Module] = nn.ReLU,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(layers) != 4 or min(layers[:3]) < 2 or layers[3] < 1:
            raise ModelError(f"layers must be four numbers, the first three at least 2, got {list(layers)}")
        if alpha not in (1, 2, 4) or beta < 1:
            raise ModelError(f"alpha must be 1, 2 or 4 and beta at least 1, got alpha={alpha}, beta={beta}")
        if cardinality > 1 and cardinality % alpha:
            raise ModelError(f"cardinality {cardinality} must be a multiple of alpha {alpha}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act: type[nn.Module] = get_act_layer(act_layer)
        norm: type[nn.Module] = get_norm_layer(norm_layer)
        super().__init__(num_classes, in_chans, drop_rate, act, norm, dd)

        chs = self.stem_chs
        self.b_conv0 = nn.Conv2d(chs, chs, 3, stride=2, padding=1, bias=False, **dd)
        self.bn_b0 = norm(chs, **dd)
        self.l_conv0 = nn.Conv2d(chs, chs // alpha, 3, padding=1, bias=False, **dd)
        self.bn_l0 = norm(chs // alpha, **dd)
        self.l_conv1 = nn.Conv2d(chs // alpha, chs // alpha, 3, stride=2, padding=1, bias=False, **dd)
        self.bn_l1 = norm(chs // alpha, **dd)
        self.l_conv2 = nn.Conv2d(chs // alpha, chs, 1, bias=False, **dd)
        self.bn_l2 = norm(chs, **dd)
        self.bl_init = nn.Conv2d(chs, chs, 1, bias=False, **dd)
        self.bn_bl_init = norm(chs, **dd)
        self.act = act(inplace=True)

        shared = {
            "act_layer": act_layer,
            "norm_layer": norm_layer,
            "attn_layer": attn_layer,
            **dd,
            **(block_args or {}),
        }
        make = _Blocks(block, base_width, cardinality, shared, sum(layers), drop_path_rate)
        strides = (2, 2, 1, 2)
        plans = plan_stages(strides, output_stride)
        index = 0
        for number in range(1, 4):
            plan, stride, depth = plans[number - 1], strides[number - 1], layers[number - 1]
            out_chs = 128 << number
            stage = BigLittleModule(make, chs, out_chs, depth, alpha, beta, plan, stride, index)
            self.add_module(f"layer{number}", stage)
            chs, index = out_chs, index + depth
        plan = plans[3]
        self.layer4 = make.stack(
            chs,
            2048,
            layers[3],
            index,
            stride=plan.stride,
            natural_stride=strides[3],
            dilation=plan.dilation,
            first_dilation=plan.first_dilation,
        )
        self.feature_info += [
            {"num_chs": 256, "reduction": 4, "module": "layer1.act"},
            {"num_chs": 512, "reduction": plans[0].reduction, "module": "layer2.act"},
            {"num_chs": 1024, "reduction": plans[2].reduction, "module": "layer3"},
            {"num_chs": 2048, "reduction": plans[3].reduction, "module": "layer4"},
        ]
        self._last_stage = 4
        self._finish(2048, global_pool, zero_init_last, dd)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter groups; blocks that run in parallel share a group.

        Args:
            coarse: Group by stage instead of by block.
        """
        stem = r"^(?:conv1|bn1|b_conv0|bn_b0|l_conv\d|bn_l\d|bl_init|bn_bl_init)\."
        if coarse:
            return {"stem": stem, "blocks": r"^layer(\d+)"}
        return {
            "stem": stem,
            "blocks": [
                (r"^layer([123])\.(?:big|little)\.(\d+)", None),
                (r"^layer([123])\.(?:little_e|fusion)", (1000,)),
                (r"^layer(4)\.(\d+)", None),
            ],
        }

    def forward_stem(self, x: Tensor) -> Tensor:
        """Map the map of the first convolution, (B, 64, H/2, W/2), to (B, 64, H/4, W/4)."""
        big = self.bn_b0(self.b_conv0(x))
        little = self.act(self.bn_l0(self.l_conv0(x)))
        little = self.act(self.bn_l1(self.l_conv1(little)))
        little = self.bn_l2(self.l_conv2(little))
        x = self.act(big + little)
        return self.act(self.bn_bl_init(self.bl_init(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to the last map, (B, 2048, H/32, W/32)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self._last_stage > 0:  # else pruned to the first map, and the rest of the stem is gone
            x = self.forward_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in (self.layer1, self.layer2, self.layer3):
                x = checkpoint(stage, x)
            return checkpoint_seq(self.layer4, x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last map and the maps of `feature_info`.

        Args:
            x: (B, in_chans, H, W).
            indices: The last n maps if a number, those of a list, or all five if None.
            norm: Part of timm's signature; no map here has a normalisation of its own to apply.
            stop_early: Stop behind the stage of the last map asked for.
            output_fmt: Only ``NCHW``.
            intermediates_only: Return the list alone.

        Raises:
            ModelError: If another format is asked for.
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(5, indices)
        if not (stop_early or intermediates_only):
            last = self._last_stage
        maps: list[Tensor] = []

        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take:
            maps.append(x)
        if last > 0:
            x = self.forward_stem(x)
        for number in range(1, last + 1):
            stage = getattr(self, f"layer{number}")
            if number < 3:  # the feature is the sum, in front of the fusion
                x = checkpoint(stage.merge, x) if self.grad_checkpointing else stage.merge(x)
                if number in take:
                    maps.append(x)
                if intermediates_only and number == last:
                    break
                stage = stage.fusion
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
            if number >= 3 and number in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the given features do not need.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Part of timm's signature; there is no final normalisation.
            prune_head: Remove the classifier even if every stage stays.

        Returns:
            The indices, none negative.
        """
        take, last = feature_take_indices(5, indices)
        for number in range(last + 1, 5):
            setattr(self, f"layer{number}", nn.Sequential())
        if last in (1, 2):
            getattr(self, f"layer{last}").fusion = nn.Sequential()
        if last == 0:
            for name in [name for name, _ in self.named_children() if name.startswith(("b_", "bn_", "l_", "bl_"))]:
                setattr(self, name, nn.Sequential())
        self._last_stage = last
        if last < 4:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < 4:
            self.reset_classifier(0, "")
        return take


_NAMES = (
    "blresnet50",
    "blresnet101",
    "blresnet152",
    "blresnext50_32x4d",
    "blresnext101_32x4d",
    "blresnext101_64x4d",
    "blseresnext50_32x4d",
    "blseresnext101_32x4d",
    "blres2net50",
)
default_cfgs = generate_default_cfgs({f"{name}.untrained": imagenet_cfg() for name in _NAMES})

_LAYERS = {50: (3, 4, 6, 3), 101: (4, 8, 18, 3), 152: (5, 12, 30, 3)}


def _create(variant: str, pretrained: bool, options: dict[str, Any], **defaults: Any) -> BigLittleNet:
    """Build `variant`; the caller's `options` go before `defaults`, and an unknown one is refused by `BigLittleNet`.

    A feature extractor is timm's getter: the sums inside modules 1 and 2 are no child's output.
    """
    feature_cfg = {"feature_cls": "getter"}
    return build_model_with_cfg(BigLittleNet, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **options})


@register_model
def blresnet50(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLResNet-50, alpha 2, beta 4."""
    return _create("blresnet50", pretrained, kwargs, layers=_LAYERS[50])


@register_model
def blresnet101(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLResNet-101, alpha 2, beta 4."""
    return _create("blresnet101", pretrained, kwargs, layers=_LAYERS[101])


@register_model
def blresnet152(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLResNet-152, alpha 2, beta 4."""
    return _create("blresnet152", pretrained, kwargs, layers=_LAYERS[152])


@register_model
def blresnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLResNeXt-50 32x4d, alpha 2, beta 4."""
    options = {"cardinality": 32, "base_width": 4}
    return _create("blresnext50_32x4d", pretrained, kwargs, layers=_LAYERS[50], **options)


@register_model
def blresnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLResNeXt-101 32x4d, alpha 2, beta 4."""
    options = {"cardinality": 32, "base_width": 4}
    return _create("blresnext101_32x4d", pretrained, kwargs, layers=_LAYERS[101], **options)


@register_model
def blresnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLResNeXt-101 64x4d, alpha 2, beta 4."""
    options = {"cardinality": 64, "base_width": 4}
    return _create("blresnext101_64x4d", pretrained, kwargs, layers=_LAYERS[101], **options)


@register_model
def blseresnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLSEResNeXt-50 32x4d, alpha 2, beta 4: SE with reduction 16 after each block's last BN."""
    options = {"cardinality": 32, "base_width": 4, "attn_layer": SEModule}
    return _create("blseresnext50_32x4d", pretrained, kwargs, layers=_LAYERS[50], **options)


@register_model
def blseresnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLSEResNeXt-101 32x4d, alpha 2, beta 4: SE with reduction 16 after each block's last BN."""
    options = {"cardinality": 32, "base_width": 4, "attn_layer": SEModule}
    return _create("blseresnext101_32x4d", pretrained, kwargs, layers=_LAYERS[101], **options)


@register_model
def blres2net50(pretrained: bool = False, **kwargs: Any) -> BigLittleNet:
    """bLRes2Net-50, 26w x 4s in every bottleneck, alpha 2, beta 4; inferred, see the top of this file."""
    options = {"block": Res2Block, "block_args": {"scale": 4}, "base_width": 26}
    return _create("blres2net50", pretrained, kwargs, layers=_LAYERS[50], **options)
