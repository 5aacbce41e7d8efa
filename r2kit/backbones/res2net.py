"""Res2Net, its v1b form, SE-Res2Net, and the CIFAR Res2NeXt-29: the networks of the paper that timm does not own.

`res2net50_26w_4s`, `48w_2s`, `14w_8s`, `26w_6s`, `26w_8s`, `res2net101_26w_4s`, `res2next50`, `res2net50d` and `101d`
are timm's, with published weights.

Source: Gao et al. 2019, arXiv:1904.01169, and the authors' code (github.com/Res2Net/Res2Net-PretrainedModels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import SEModule, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import make_blocks
from torch import Tensor, nn

from r2kit.backbones._res2 import Res2Block, Res2Net, StemSpec
from r2kit.backbones._skeleton import StagedNet, imagenet_cfg
from r2kit.errors import ModelError

__all__ = ["CifarRes2NeXt"]

_V1B = {"stem": StemSpec(widths=(32, 32, 64)), "avg_down": True}
_CIFAR_CFG = imagenet_cfg(
    num_classes=100,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(0.5071, 0.4865, 0.4409),  # of the CIFAR-100 training images
    std=(0.2673, 0.2564, 0.2762),
)
_V1_NAMES = ("res2net50_18w_4s", "res2net50_18w_6s", "res2net152_26w_4s", "seres2net50")
_V1B_NAMES = ("res2net152d", "res2net200d")
_CIFAR_NAMES = (
    "cifar_res2next29_6c24w4s",
    "cifar_res2next29_8c25w4s",
    "cifar_res2next29_6c24w6s",
    "cifar_seres2next29_6c24w4s",
    "cifar_seres2next29_8c25w4s",
    "cifar_seres2next29_6c24w6s",
    "cifar_resnext29_8c64w",
    "cifar_resnext29_16c64w",
)

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": imagenet_cfg() for name in _V1_NAMES}
    | {f"{name}.untrained": imagenet_cfg(first_conv="conv1.0") for name in _V1B_NAMES}
    | {f"{name}.untrained": _CIFAR_CFG for name in _CIFAR_NAMES}
)


class CifarRes2NeXt(StagedNet):
    """Res2NeXt-29 for 32-px images: a 3x3 stem without pooling and three stages of three units, strides 1, 2, 2.

    The authors published no code. Which first unit made their table follows from their parameter counts: one grouped
    convolution over all splits. (The counts of the paper's table 4 are those of ten classes, though its task has 100.)

    Args:
        base_width: Channels of one split, for one group, at the first stage.
        scale: Number of splits; 1 is ResNeXt-29.
        cardinality: Groups of each 3x3 convolution.
        layers: Units in each of the three stages.
        attn_layer: See `Res2Block`.
        act_layer: Activation class, or its name in timm.
        norm_layer: Normalisation class, or its name in timm.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Bands of the input image.
        output_stride: 4, 2 or 1; strides beyond it become dilations.
        global_pool: Name of a timm pooling.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last unit; it rises linearly from zero at the first.
        zero_init_last: Start each residual branch at zero.
        device: Where to make the parameters.
        dtype: What the parameters are.

    Raises:
        ModelError: If the options cannot be honoured.

    Source: arXiv:1904.01169, sec. 4.3; the authors' answers in issues 7 and 36 of their repository.
    """

    def __init__(
        self,
        base_width: int,
        scale: int,
        cardinality: int,
        layers: Sequence[int] = (3, 3, 3),
        attn_layer: Callable[..., nn.Module] | None = None,
        act_layer: str | type[nn.Module] = nn.ReLU,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        num_classes: int = 100,
        in_chans: int = 3,
        output_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(layers) != 3:
            raise ModelError(f"layers: a CIFAR network has three stages, got {list(layers)}")
        if output_stride not in (1, 2, 4):
            raise ModelError(f"output_stride of a CIFAR network must be 1, 2 or 4, got {output_stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act: type[nn.Module] = get_act_layer(act_layer)
        norm: type[nn.Module] = get_norm_layer(norm_layer)
        super().__init__(num_classes, in_chans, drop_rate, act, norm, dd)
        self.conv1 = nn.Conv2d(in_chans, self.stem_chs, 3, padding=1, bias=False, **dd)
        self.maxpool = nn.Identity()

        stages, stage_info = make_blocks(
            (Res2Block,) * 3,
            (64, 128, 256),
            tuple(layers),
            self.stem_chs,
            output_stride=4 * output_stride,  # make_blocks counts from a stem at stride 4, and here it is at 1
            drop_path_rate=drop_path_rate,
            cardinality=cardinality,
            base_width=base_width,
            scale=scale,
            first_block="grouped",
            act_layer=act,
            norm_layer=norm,
            attn_layer=attn_layer,
            **dd,
        )
        for name, stage in stages:
            self.add_module(name, stage)
        self.layer4 = nn.Sequential()  # timm's ResNet runs four stages
        self.feature_info[0]["reduction"] = 1
        self.feature_info += [{**info, "reduction": info["reduction"] // 4} for info in stage_info]
        self._finish(256 * Res2Block.expansion, global_pool, zero_init_last, dd)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's ResNet, for the stem and three stages."""
        taken, _ = feature_take_indices(4, indices)
        return super().forward_intermediates(x, taken, norm, stop_early, output_fmt, intermediates_only)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's ResNet, for the stem and three stages."""
        taken, last = feature_take_indices(4, indices)
        if last < 3 or prune_head:  # else nothing is to go, and timm would take the end for a cut before its stage 4
            super().prune_intermediate_layers(taken, prune_norm, prune_head)
        return taken


def _create(variant: str, pretrained: bool, options: dict[str, Any], **defaults: Any) -> Res2Net:
    """Build `variant`; `options` of the caller go before `defaults`, and an unknown one is refused by `Res2Net`."""
    return build_model_with_cfg(Res2Net, variant, pretrained, **{**defaults, **options})


def _create_cifar(variant: str, pretrained: bool, options: dict[str, Any], **defaults: Any) -> CifarRes2NeXt:
    """Build the CIFAR network `variant`, which has one feature level fewer than timm expects."""
    feature_cfg = {"out_indices": (0, 1, 2, 3)}
    return build_model_with_cfg(CifarRes2NeXt, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **options})


@register_model
def res2net50_18w_4s(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2Net-50, 18w x 4s: about 70 % of ResNet-50's compute."""
    return _create("res2net50_18w_4s", pretrained, kwargs, layers=(3, 4, 6, 3), base_width=18)


@register_model
def res2net50_18w_6s(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2Net-50, 18w x 6s."""
    return _create("res2net50_18w_6s", pretrained, kwargs, layers=(3, 4, 6, 3), base_width=18, scale=6)


@register_model
def res2net152_26w_4s(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2Net-152, 26w x 4s."""
    return _create("res2net152_26w_4s", pretrained, kwargs, layers=(3, 8, 36, 3))


@register_model
def res2net152d(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2Net-v1b-152, 26w x 4s."""
    return _create("res2net152d", pretrained, kwargs, layers=(3, 8, 36, 3), **_V1B)


@register_model
def res2net200d(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2Net-v1d-200, 26w x 4s."""
    return _create("res2net200d", pretrained, kwargs, layers=(3, 12, 48, 3), **_V1B)


@register_model
def seres2net50(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """SE-Res2Net-50, 26w x 4s. The paper does not state the reduction; 16 is that of SENet."""
    return _create("seres2net50", pretrained, kwargs, layers=(3, 4, 6, 3), attn_layer=SEModule)


@register_model
def cifar_res2next29_6c24w4s(pretrained: bool = False, **kwargs: Any) -> CifarRes2NeXt:
    """Res2NeXt-29 for CIFAR, 6c x 24w x 4s."""
    options = {"cardinality": 6, "base_width": 24, "scale": 4}
    return _create_cifar("cifar_res2next29_6c24w4s", pretrained, kwargs, **options)


@register_model
def cifar_res2next29_8c25w4s(pretrained: bool = False, **kwargs: Any) -> CifarRes2NeXt:
    """Res2NeXt-29 for CIFAR, 8c x 25w x 4s."""
    options = {"cardinality": 8, "base_width": 25, "scale": 4}
    return _create_cifar("cifar_res2next29_8c25w4s", pretrained, kwargs, **options)


@register_model
def cifar_res2next29_6c24w6s(pretrained: bool = False, **kwargs: Any) -> CifarRes2NeXt:
    """Res2NeXt-29 for CIFAR, 6c x 24w x 6s."""
    options = {"cardinality": 6, "base_width": 24, "scale": 6}
    return _create_cifar("cifar_res2next29_6c24w6s", pretrained, kwargs, **options)


@register_model
def cifar_seres2next29_6c24w4s(pretrained: bool = False, **kwargs: Any) -> CifarRes2NeXt:
    """SE-Res2NeXt-29 for CIFAR, 6c x 24w x 4s. No one reduction gives the published sizes; 16 is that of SENet."""
    options = {"cardinality": 6, "base_width": 24, "scale": 4, "attn_layer": SEModule}
    return _create_cifar("cifar_seres2next29_6c24w4s", pretrained, kwargs, **options)


@register_model
def cifar_seres2next29_8c25w4s(pretrained: bool = False, **kwargs: Any) -> CifarRes2NeXt:
    """SE-Res2NeXt-29 for CIFAR, 8c x 25w x 4s. No one reduction gives the published sizes; 16 is that of SENet."""
    options = {"cardinality": 8, "base_width": 25, "scale": 4, "attn_layer": SEModule}
    return _create_cifar("cifar_seres2next29_8c25w4s", pretrained, kwargs, **options)


@register_model
def cifar_seres2next29_6c24w6s(pretrained: bool = False, **kwargs: Any) -> CifarRes2NeXt:
    """SE-Res2NeXt-29 for CIFAR, 6c x 24w x 6s. No one reduction gives the published sizes; 16 is that of SENet."""
    options = {"cardinality": 6, "base_width": 24, "scale": 6, "attn_layer": SEModule}
    return _create_cifar("cifar_seres2next29_6c24w6s", pretrained, kwargs, **options)


@register_model
def cifar_resnext29_8c64w(pretrained: bool = False, **kwargs: Any) -> CifarRes2NeXt:
    """ResNeXt-29 for CIFAR, 8c x 64w: the paper's baseline."""
    options = {"cardinality": 8, "base_width": 64, "scale": 1}
    return _create_cifar("cifar_resnext29_8c64w", pretrained, kwargs, **options)


@register_model
def cifar_resnext29_16c64w(pretrained: bool = False, **kwargs: Any) -> CifarRes2NeXt:
    """ResNeXt-29 for CIFAR, 16c x 64w: the paper's larger baseline."""
    options = {"cardinality": 16, "base_width": 64, "scale": 1}
    return _create_cifar("cifar_resnext29_16c64w", pretrained, kwargs, **options)
