"""The optimiser of a recipe: its parameter groups, each with its share of the learning rate and its decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from r2kit.errors import ModelError
from r2kit.parts import AsTimm, Parts
from r2kit.recipe import TrainSpec

Groups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, spec: TrainSpec) -> Groups:
    """Divide the parameters by their learning rate and by whether they decay.

    Every parameter that has a gradient now belongs to a group from the first step on, whatever is frozen for a while:
    groups that changed during training would not fit the checkpoint of a run that goes on.

    Args:
        model: Any network.
        spec: The recipe's `train` section.

    Returns:
        Groups as torch's optimisers take them, with `lr_scale`, the group's share of the learning rate. Norms, biases
        and other vectors do not decay.

    Raises:
        ModelError: If the recipe asks for shares by depth and the network does not say how deep a parameter is.
    """
    try:
        if spec.layer_decay is not None:
            groups = param_groups_layer_decay(
                cast(nn.Module, AsTimm(model)), weight_decay=spec.weight_decay, layer_decay=spec.layer_decay
            )
        else:
            groups = _by_scale(model, spec.lr_scales, spec.weight_decay)
    except ValueError as error:
        raise ModelError(f"train.{'lr_scales' if spec.lr_scales else 'layer_decay'}: {error}") from None
    return groups


def _by_scale(model: nn.Module, scales: Sequence[float] | None, weight_decay: float) -> Groups:
    """Return the groups of stem with early stages, the last two stages, and head; or of all together."""
    if scales is None:
        third = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
        scales = (1.0,)
    else:
        parts = Parts(model)
        third = {
            name: 2 if number == parts.head else int(number >= parts.head - 2) for name, number in parts.number.items()
        }
    groups: Groups = []
    for index, scale in enumerate(scales):
        decay: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and third[name] == index:
                (plain if parameter.ndim <= 1 else decay).append(parameter)
        groups += [
            {"params": decay, "weight_decay": weight_decay, "lr_scale": scale},
            {"params": plain, "weight_decay": 0.0, "lr_scale": scale},
        ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: Groups, spec: TrainSpec, lr: float, *, fused: bool) -> torch.optim.Optimizer:
    """Return the optimiser over the groups, each at its share of the learning rate.

    Args:
        groups: From `parameter_groups`.
        spec: The recipe's `train` section.
        lr: Highest learning rate.
        fused: One kernel for the whole update.
    """
    scaled = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(scaled, lr=lr, fused=fused)
    return torch.optim.SGD(scaled, lr=lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=fused)


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Set SGD's momentum, or AdamW's first beta, in every group."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def describe_groups(groups: Groups) -> str:
    """Return in words which shares of the learning rate the groups have."""
    scales = sorted({group["lr_scale"] for group in groups})
    if len(scales) == 1:
        return "one learning rate for all"
    return f"{len(scales)} learning rates, from {scales[0]:.3g} to {scales[-1]:.3g} of train.lr"
