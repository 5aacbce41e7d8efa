"""ResNeSt: five of the authors' "fast" ablation nets that timm does not have, and a mended stochastic depth for all.

A name ``{R}s{K}x{b}d`` reads radix R, cardinality K, bottleneck width b; the 3x3 split attention of a strided block
stands behind its average pool ("fast"), the stem is three 3x3 convolutions of 32, 32 and 64 channels, and the shortcut
average-pools. The attention and the network are timm's. The authors' own checkpoints (``resnest50_fast_*.pth``) have
the same keys and load from a file as they are; timm publishes none for these five.

timm 1.0.31 applies a block's `drop_path` to its *input*, after the shortcut has been taken from it: an identity block
is never dropped, and a projecting one loses its shortcut. `SplitAttentionBlock` drops the residual branch;
`fix_drop_path` gives that to a network that timm built, without touching its tensors.

At output stride 8 or 16 the networks follow timm (no average pool in a block whose stride was removed), not the
authors' code, which keeps a 3x3 pool of stride 1 there: the weights fit, the features differ a little.

Source: Zhang et al. 2020, "ResNeSt: Split-Attention Networks", arXiv:2004.08955; github.com/zhanghang1989/ResNeSt,
`ablation.py`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import ResNet
from torch import Tensor, nn

from r2kit.backbones._skeleton import imagenet_cfg

__all__ = ["SplitAttentionBlock", "fix_drop_path"]

ModelT = TypeVar("ModelT", bound=nn.Module)


class SplitAttentionBlock(ResNestBottleneck):
    """timm's ResNeSt block, with `drop_path` on the residual branch. Arguments and keys are timm's."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 4 * planes, ceil(H / stride), ceil(W / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)

        x = self.act1(self.bn1(self.conv1(x)))
        if self.avd_first is not None:
            x = self.avd_first(x)
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        if self.avd_last is not None:
            x = self.avd_last(x)
        x = self.bn3(self.conv3(x))
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.act3(x + shortcut)


def fix_drop_path(model: ModelT) -> ModelT:
    """Make the ResNeSt blocks that timm built drop their residual branch, in place.

    Parameters, buffers, state-dict keys and the output in `eval` mode stay as they are; a model without such blocks is
    left alone.

    Args:
        model: Any module, also a feature extractor around a ResNeSt.

    Returns:
        The same model.
    """
    for module in model.modules():
        if type(module) is ResNestBottleneck:
            module.__class__ = SplitAttentionBlock
    return model


_NAMES = ("1s1x64d", "2s1x64d", "4s1x64d", "1s2x40d", "2s2x40d")
# As timm's of the same ablation: the authors resized by bicubic interpolation.
default_cfgs = generate_default_cfgs(
    {f"resnest50d_{name}.untrained": imagenet_cfg(first_conv="conv1.0", interpolation="bicubic") for name in _NAMES}
)


def _create(
    variant: str, pretrained: bool, options: dict[str, Any], *, radix: int, cardinality: int, base_width: int
) -> ResNet:
    """Build a fast ResNeSt-50; the caller's `options` go first, and an unknown one is refused by timm's `ResNet`."""
    defaults = {
        "block": SplitAttentionBlock,
        "layers": (3, 4, 6, 3),
        "stem_type": "deep",
        "stem_width": 32,
        "avg_down": True,
        "cardinality": cardinality,
        "base_width": base_width,
        "block_args": {"radix": radix, "avd": True, "avd_first": True},
    }
    return build_model_with_cfg(ResNet, variant, pretrained, **{**defaults, **options})


@register_model
def resnest50d_1s1x64d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeSt-50 fast 1s1x64d."""
    return _create("resnest50d_1s1x64d", pretrained, kwargs, radix=1, cardinality=1, base_width=64)


@register_model
def resnest50d_2s1x64d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeSt-50 fast 2s1x64d."""
    return _create("resnest50d_2s1x64d", pretrained, kwargs, radix=2, cardinality=1, base_width=64)


@register_model
def resnest50d_4s1x64d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeSt-50 fast 4s1x64d."""
    return _create("resnest50d_4s1x64d", pretrained, kwargs, radix=4, cardinality=1, base_width=64)


@register_model
def resnest50d_1s2x40d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeSt-50 fast 1s2x40d."""
    return _create("resnest50d_1s2x40d", pretrained, kwargs, radix=1, cardinality=2, base_width=40)


@register_model
def resnest50d_2s2x40d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeSt-50 fast 2s2x40d."""
    return _create("resnest50d_2s2x40d", pretrained, kwargs, radix=2, cardinality=2, base_width=40)
