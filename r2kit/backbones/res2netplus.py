"""Res2NetPlus: Res2Net with Mish, a stem of 3x3 convolutions, and the activation before the normalisation.

`res2netplus*` is the network that its article describes: wherever an activation follows a convolution (stem, first 1x1,
every scale convolution) the order is convolution, Mish, BN; the last 1x1 keeps convolution, BN, addition, Mish.
`res2netplus50d` and `101d` are the same on the v1b skeleton, with a bias on each convolution that an activation
follows, so that the weights of timm's `res2net50d` and `101d` convert into them exactly. `res2netplus50_res2fg` is what
the published code really computes.

No ImageNet weights of any of them were ever published.

Source: github.com/lessw2020/res2net-plus (README and res2fg.py); Misra 2019, arXiv:1908.08681 (Mish).
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from r2kit.backbones._res2 import Res2Net, StemSpec
from r2kit.backbones._skeleton import imagenet_cfg

_PLUS_STEM = StemSpec(widths=(32, 64, 64), order="act_norm")
_PLUS_D_STEM = StemSpec(widths=(32, 32, 64), order="act_norm", act_bias=True)


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": imagenet_cfg(first_conv="conv1.0")
        for name in (
            "res2netplus50",
            "res2netplus101",
            "res2netplus152",
            "res2netplus50d",
            "res2netplus101d",
            "res2nextplus50",
            "res2netplus50_res2fg",
        )
    }
)


def _create(variant: str, pretrained: bool, options: dict[str, Any], **defaults: Any) -> Res2Net:
    """Build `variant`; `options` of the caller go before `defaults`, and an unknown one is refused by `Res2Net`."""
    defaults = {"stem": _PLUS_STEM, "order": "act_norm", "act_layer": nn.Mish, **defaults}
    return build_model_with_cfg(Res2Net, variant, pretrained, **{**defaults, **options})


@register_model
def res2netplus50(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2NetPlus-50, 26w x 4s."""
    return _create("res2netplus50", pretrained, kwargs, layers=(3, 4, 6, 3))


@register_model
def res2netplus101(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2NetPlus-101, 26w x 4s."""
    return _create("res2netplus101", pretrained, kwargs, layers=(3, 4, 23, 3))


@register_model
def res2netplus152(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2NetPlus-152, 26w x 4s."""
    return _create("res2netplus152", pretrained, kwargs, layers=(3, 8, 36, 3))


@register_model
def res2netplus50d(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2NetPlus-50 on the v1b skeleton, into which timm's `res2net50d` converts."""
    options = {"stem": _PLUS_D_STEM, "avg_down": True, "act_bias": True}
    return _create("res2netplus50d", pretrained, kwargs, layers=(3, 4, 6, 3), **options)


@register_model
def res2netplus101d(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2NetPlus-101 on the v1b skeleton, into which timm's `res2net101d` converts."""
    options = {"stem": _PLUS_D_STEM, "avg_down": True, "act_bias": True}
    return _create("res2netplus101d", pretrained, kwargs, layers=(3, 4, 23, 3), **options)


@register_model
def res2nextplus50(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2NeXtPlus-50, 8c x 4w x 4s."""
    return _create("res2nextplus50", pretrained, kwargs, layers=(3, 4, 6, 3), base_width=4, cardinality=8)


@register_model
def res2netplus50_res2fg(pretrained: bool = False, **kwargs: Any) -> Res2Net:
    """Res2NetPlus-50 exactly as the published code computes it, so that files trained with that code predict alike.

    It differs from `res2netplus50` in two ways:

    - The scale convolutions keep convolution, BN, Mish; only the stem and the first 1x1 of each unit are reversed.
    - In every unit but the first of a stage the concatenation receives ``[z0 + x1, z1, z2, x3]`` instead of
      ``[z0, z1, z2, x3]``: the published loop adds the next split in place to a tensor that it has already kept. Here
      the same sum is computed without working in place.

    The published file keeps the stem in three modules; all other keys are the same::

        conv1.0 -> conv1.0    conv2.0 -> conv1.3    conv3.0 -> conv1.6     (convolutions)
        conv1.2 -> conv1.2    conv2.2 -> conv1.5    conv3.2 -> bn1         (BatchNorm)

    Index 1 in each of its stem modules is Mish, without tensors. A first version of that code put the BN of the stem
    and of the first 1x1 before Mish; its files have ``conv1.1`` in place of ``conv1.2``, and are not this network.
    """
    options = {"order": "norm_act", "conv1_order": "act_norm", "published_sum": True}
    return _create("res2netplus50_res2fg", pretrained, kwargs, layers=(3, 4, 6, 3), **options)
