"""Explain a prediction: Grad-CAM, which part of an image speaks for a class, through captum (extra ``explain``)."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from r2kit.errors import ModelError, require

_CELLS = 4  # fewest cells a side of a map that can still say where


def available() -> bool:
    """Return whether captum is installed."""
    return importlib.util.find_spec("captum") is not None


def target_layer(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return the layer whose maps Grad-CAM weighs: the deepest stage that still says where.

    That is the last stage at 224 pixels; for a small image, whose last map is one or two cells, the deepest one with at
    least four cells a side, or the finest there is.

    Args:
        model: A network with timm's `feature_info`.
        size: (H, W) of the image.

    Raises:
        ModelError: If the network does not say where its stages end.
    """
    info = getattr(model, "feature_info", None)
    if not info:
        raise ModelError(f"Grad-CAM: {type(model).__name__} does not name its stages (feature_info); name a layer")
    stages = [stage for stage in info if min(size) >= _CELLS * stage["reduction"]]
    return model.get_submodule((stages[-1] if stages else info[0])["module"])


def gradcam(model: nn.Module, image: Tensor, target: Tensor, *, layer: nn.Module | None = None) -> NDArray[np.float32]:
    """Return where in each image the evidence for a class lies.

    The maps of the layer are weighed by the mean gradient of the class's logit, summed, cut at zero (evidence against
    is not shown), brought to the size of the image bilinearly, and divided by their largest value. The network is put
    into evaluation mode for the computation and put back after; no parameter receives a gradient.

    Args:
        model: (B, C, H, W) -> logits (B, K).
        image: (B, C, H, W), normalised, on the device of the model.
        target: (B,) the class that is explained.
        layer: Its output must be maps (B, D, h, w); by default `target_layer`.

    Returns:
        (B, H, W) in [0, 1]; all zero where nothing speaks for the class.

    Raises:
        MissingExtraError: If captum is not installed.
        ModelError: If the layer's output is not a stack of maps, as in a vision transformer.

    Source: Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2.
    """
    require("captum", "captum", "explain", "Grad-CAM")
    from captum.attr import LayerAttribution, LayerGradCam

    layer = target_layer(model, (image.shape[-2], image.shape[-1])) if layer is None else layer
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        # With frozen parameters the graph starts at the image, so that the layer's output has a gradient at all.
        given = image.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            maps = LayerGradCam(model, layer).attribute(given, target=target, relu_attributions=True).detach()
    finally:
        for module, state in training.items():
            module.training = state
        for parameter, state in wanted.items():
            parameter.requires_grad_(state)
    if maps.ndim != 4:
        raise ModelError(f"Grad-CAM: {type(layer).__name__} gives {tuple(maps.shape)}, not maps (B, D, h, w)")
    maps = LayerAttribution.interpolate(maps, tuple(image.shape[-2:]), interpolate_mode="bilinear")
    maps = maps[:, 0].clamp_min(0.0)
    top = maps.amax(dim=(1, 2), keepdim=True)
    scaled: NDArray[np.float32] = torch.where(top > 0, maps / top.clamp_min(1e-20), 0.0).cpu().numpy()
    return scaled
