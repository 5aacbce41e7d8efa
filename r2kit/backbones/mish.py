"""Mish and the family that leads from ReLU to it.

The plain networks use `torch.nn.Mish`, which exports everywhere. `MishBeta` is its one-parameter family
``x * tanh(softplus(beta * x))``: at beta = 1 it is Mish, and with growing beta it becomes ReLU. A network converted
from ReLU starts at a large beta, is annealed to 1 while it trains, and is then given plain Mish back.

Source: Misra 2019, arXiv:1908.08681 (Mish).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MishBeta", "mish_beta", "mish_beta_to_mish", "mish_to_mish_beta", "set_beta"]


def mish_beta(x: Tensor, beta: Tensor | float) -> Tensor:
    """Return ``x * tanh(softplus(beta * x))`` through the native Mish operator.

    ``mish(beta * x) / beta`` is the same function; written so, beta = 1 gives exactly the bits of ``F.mish(x)``.

    Args:
        x: Any shape.
        beta: A number or a 0-dim tensor, > 0.
    """
    return F.mish(x * beta) / beta


class MishBeta(nn.Module):
    """Mish with a sharpness: ``x * tanh(softplus(beta * x))``.

    Beta is a buffer, not a Python number, so that annealing it neither recompiles a compiled network nor waits for a
    device. The buffer is not persistent: a network has the same state-dict keys with `MishBeta` as with
    `torch.nn.Mish`, and whoever anneals beta has to set it again after loading a checkpoint.

    Args:
        beta: Sharpness, > 0. 1 is Mish; the largest difference from ReLU is 0.31 / beta.

    Raises:
        ValueError: If `beta` is not > 0.
    """

    beta: Tensor

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("beta", torch.tensor(_positive(beta)), persistent=False)

    def set_beta(self, beta: float) -> None:
        """Set the sharpness in place, on whatever device it lives.

        Raises:
            ValueError: If `beta` is not > 0.
        """
        self.beta.fill_(_positive(beta))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to `x` of any shape."""
        return mish_beta(x, self.beta)


def set_beta(model: nn.Module, beta: float) -> int:
    """Set the sharpness of every `MishBeta` in `model` and return how many there are.

    Raises:
        ValueError: If `beta` is not > 0.
    """
    found = [m for m in model.modules() if isinstance(m, MishBeta)]
    for module in found:
        module.set_beta(beta)
    return len(found)


def mish_to_mish_beta(model: nn.Module, beta: float) -> int:
    """Replace every `torch.nn.Mish` inside `model` by `MishBeta`, in place, and return how many were replaced.

    Raises:
        ValueError: If `beta` is not > 0.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return _replace(model, nn.Mish, lambda: MishBeta(beta).to(device))


def mish_beta_to_mish(model: nn.Module) -> int:
    """Replace every `MishBeta` inside `model` by `torch.nn.Mish`, in place, and return how many were replaced.

    Exact when every beta is 1; state-dict keys do not change.
    """
    return _replace(model, MishBeta, nn.Mish)


def _replace(model: nn.Module, old: type[nn.Module], new: Callable[[], nn.Module]) -> int:
    """Replace child modules of exactly the class `old`, at any depth."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is old:
                replacement = new()
                replacement.train(child.training)
                setattr(parent, name, replacement)
                count += 1
    return count


def _positive(beta: float) -> float:
    """Return `beta` as a float, or raise."""
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    return float(beta)
