"""What the networks of stem, four stages and linear head share that timm's `ResNet` constructor cannot build.

timm's `ResNet` already holds the whole backbone contract: features, intermediates, head, parameter groups, gradient
checkpointing. Its constructor, though, makes its own stages. `StagedNet` keeps the contract and lets a subclass make
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, create_classifier
from timm.models.resnet import ResNet
from torch import nn

from r2kit.errors import ModelError


class StagePlan(NamedTuple):
    """How one stage meets the asked output stride.

    Args:
        stride: Stride of the stage's strided unit, 1 where it became dilation.
        dilation: Dilation after that unit.
        first_dilation: Dilation up to and including that unit.
        reduction: The image's side over the side of the stage's map.
    """

    stride: int
    dilation: int
    first_dilation: int
    reduction: int


def plan_stages(strides: Sequence[int], output_stride: int) -> list[StagePlan]:
    """Turn strides beyond the output stride into dilations, as timm does; the stem leaves at stride 4.

    Args:
        strides: Natural strides of the stages.
        output_stride: 32, 16 or 8.

    Raises:
        ModelError: If the output stride is another.
    """
    if output_stride not in (8, 16, 32):
        raise ModelError(f"output_stride must be 8, 16 or 32, got {output_stride}")
    plans = []
    reduction, dilation = 4, 1
    for stride in strides:
        before = dilation
        if reduction * stride > output_stride:
            dilation, stride = dilation * stride, 1
        reduction *= stride
        plans.append(StagePlan(stride, dilation, before, reduction))
    return plans


def drop_path_at(index: int, total: int, rate: float) -> nn.Module | None:
    """Return the stochastic depth of unit `index` of `total`: zero at the first, `rate` at the last, or None."""
    prob = rate * index / max(total - 1, 1)
    return DropPath(prob) if prob > 0.0 else None


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return timm's configuration of a network that takes 224-px images normalised as ImageNet's."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


class StagedNet(ResNet):
    """timm's `ResNet` contract over a 7x7 stem and stages that the subclass makes.

    A subclass calls `__init__`, adds what it needs, with the stages as `layer1` to `layer4`, and then `_finish`.

    Args:
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Bands of the image.
        drop_rate: Dropout in front of the classifier, in training.
        act_layer: Activation class.
        norm_layer: Normalisation class.
        dd: Device and dtype of the parameters, as keyword arguments.
    """

    stem_chs = 64

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        dd: dict[str, Any],
    ) -> None:
        nn.Module.__init__(self)  # not ResNet's: it would make its own stages
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.conv1: nn.Module = nn.Conv2d(in_chans, self.stem_chs, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = norm_layer(self.stem_chs, **dd)
        self.act1 = act_layer(inplace=True)
        self.feature_info: list[dict[str, Any]] = [{"num_chs": self.stem_chs, "reduction": 2, "module": "act1"}]

    def _finish(self, num_features: int, global_pool: str, zero_init_last: bool, dd: dict[str, Any]) -> None:
        """Add the head and initialise: He normal by fan-out, biases of convolutions zero, BN the identity."""
        self.num_features = num_features
        self.global_pool, self.fc = create_classifier(num_features, self.num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()
        self.init_weights(zero_init_last=zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialise the convolutions.

        Args:
            zero_init_last: Start each residual branch at zero.
        """
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
