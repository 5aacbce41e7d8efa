"""How far a network looks: which pixels of the input can reach one place of a layer, and which ones do.

Source: Luo et al. 2016, arXiv:1701.04128.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["effective_receptive_field", "receptive_field"]


def receptive_field(
    model: nn.Module, shape: tuple[int, int, int], *, layer: nn.Module | None = None, channels: slice = slice(None)
) -> Tensor:
    """Return which pixels of the input can reach the middle of a layer: its theoretical receptive field.

    It is found by computing, on a copy: with positive weights and a positive input nothing cancels, so the gradient is
    zero exactly where no path leads.

    Args:
        model: Convolutions, norms, pools and activations that rise where their input is positive. A layer that looks at
            the whole image, such as a channel attention or a global pool, makes the field the whole image.
        shape: (C, H, W) of the input.
        layer: A module inside `model`, whose input is looked at; None for the output of `model`.
        channels: Channels that are looked at.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: If what is looked at is no stack of maps (B, D, h, w).
    """
    positive = copy.deepcopy(model).double().eval()
    for name, parameter in positive.named_parameters():
        # Of mean one over what is summed, so that deep networks neither overflow nor vanish.
        size = parameter[0].numel() if parameter.ndim > 1 else 1
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0 / size)
    for name, buffer in positive.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.constant_(buffer, float(name.endswith("var")))
    twin = None if layer is None else _twin(model, positive, layer)
    return _gradient(positive, torch.ones(1, *shape, dtype=torch.float64), twin, channels)[0] > 0


def effective_receptive_field(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    layer: nn.Module | None = None,
    channels: slice = slice(None),
    images: int = 16,
    seed: int = 0,
) -> Tensor:
    """Return how much each pixel of the input moves the middle of a layer: its effective receptive field.

    Args:
        model: The network as it is; it is put into evaluation mode for the computation and put back after.
        shape: (C, H, W) of the input.
        layer: A module inside `model`, whose input is looked at; None for the output of `model`.
        channels: Channels that are looked at.
        images: Inputs of Gaussian noise that are averaged over.
        seed: Of the noise.

    Returns:
        (H, W) float64: the mean of the absolute gradient of the sum of the channels, over its largest value.

    Raises:
        ValueError: If what is looked at is no stack of maps (B, D, h, w).
    """
    training = {module: module.training for module in model.modules()}
    noise = torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed))
    try:
        field = _gradient(model.eval(), noise, layer, channels).mean(0)
    finally:
        for module, was in training.items():
            module.training = was
    return field / field.max().clamp_min(torch.finfo(field.dtype).tiny)


def _gradient(model: nn.Module, image: Tensor, layer: nn.Module | None, channels: slice) -> Tensor:
    """Return the absolute gradient (B, H, W) of the middle of a layer, summed over the input's channels, in float64."""
    seen: list[Tensor] = []
    handle = None if layer is None else layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    given = image.clone().requires_grad_(True)
    try:
        with torch.enable_grad():
            maps = model(given)
            maps = seen[-1] if seen else maps
            if maps.ndim != 4:
                raise ValueError(f"want maps (B, D, h, w), and the layer gives {tuple(maps.shape)}")
            middle = maps[:, channels, maps.shape[2] // 2, maps.shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(middle, given)
    finally:
        if handle is not None:
            handle.remove()
    return gradient.double().abs().sum(1)


def _twin(model: nn.Module, other: nn.Module, layer: nn.Module) -> nn.Module:
    """Return the module of a copy that stands where `layer` stands in the original."""
    for name, module in model.named_modules():
        if module is layer:
            return other.get_submodule(name)
    raise ValueError(f"layer: the {type(layer).__name__} is no module of the {type(model).__name__}")
