"""The size of a network, counted before it runs: parameters and multiply-adds."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

__all__ = ["count_macs", "count_parameters"]

# Give back the shape they get and cost nothing that is counted. Skipped: without data they take most of the time.
_SAME_SHAPE = (nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.Mish, nn.SiLU, nn.GELU, nn.Sigmoid)


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Return the number of parameters; a parameter that several modules share counts once.

    Args:
        model: Any module.
        trainable_only: Leave out what `requires_grad` excludes.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Return the multiply-adds of one image in all convolutions and linear layers.

    This is how papers mostly count ("FLOPs" with one multiply-add as one). Normalisation, activation, pooling, resizing
    and the addition of biases are left out. Nothing is computed: the forward pass runs on shapes alone.

    Args:
        model: Any network that takes a (1, C, H, W) batch; it is left as it is.
        input_size: (C, H, W).
    """
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Linear):
            macs += output.numel() * module.in_features
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            macs += inputs[0].numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
        elif isinstance(module, nn.modules.conv._ConvNd):
            macs += output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)

    shapes = copy.deepcopy(model).to("meta").eval()
    for module in shapes.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.register_forward_hook(count)
        elif isinstance(module, _SAME_SHAPE):
            module.forward = _identity  # type: ignore[method-assign,assignment]
    dtype = next((p.dtype for p in shapes.parameters()), torch.float32)
    with torch.no_grad():
        shapes(torch.empty(1, *input_size, device="meta", dtype=dtype))
    return macs


def _identity(x: Tensor, *_: object) -> Tensor:
    """Return `x`."""
    return x
