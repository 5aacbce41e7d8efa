"""Ways to ask which part of an image speaks for a class, through captum (extra ``explain``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from r2kit.backbones.mish import MishBeta
from r2kit.dense.saliency import SaliencyNet
from r2kit.dense.segmenter import Segmenter
from r2kit.errors import ModelError, require
from r2kit.objects.detectors import Detector

Method = Literal["gradcam", "hirescam", "guided-gradcam", "integrated-gradients", "occlusion"]
METHODS: tuple[Method, ...] = get_args(Method)
OF_PIXELS: tuple[Method, ...] = ("guided-gradcam", "integrated-gradients")
"""Methods whose maps are as sharp as the pixels, and as noisy."""

_CELLS = 4  # fewest cells a side of a map that can still say where
_STEPS = 32  # of the path of integrated gradients
_PATCHES = 8  # an occluding patch has this part of each side; it moves by half of its own
_AT_ONCE = 16  # changed copies of an image in one pass
_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    MishBeta,
)


def available() -> bool:
    """Return whether captum is installed."""
    return importlib.util.find_spec("captum") is not None


def target_layer(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return the layer whose maps Grad-CAM weighs: the deepest stage of the backbone that still says where.

    That is the last stage at 224 pixels; for a small image, whose last map is one or two cells, the deepest one with at
    least four cells a side, or the finest there is.

    Args:
        model: A network with timm's `feature_info`, or one of a segmentation, of salient objects or of a detection.
        size: (H, W) of the image.

    Raises:
        ModelError: If the network does not say where its stages end.
    """
    body: Any = model
    if isinstance(model, Segmenter | SaliencyNet):
        body = model.backbone
    elif isinstance(model, Detector):
        body = model.backbone.body
    info = getattr(body, "feature_info", None)
    if not info:
        raise ModelError(f"Grad-CAM: {type(model).__name__} does not name its stages (feature_info); name a layer")
    listed = getattr(info, "info", info)  # timm's FeatureInfo, or the plain list of a whole network
    stages = [stage for stage in listed if min(size) >= _CELLS * stage["reduction"]]
    return _module(body, (stages[-1] if stages else listed[0])["module"])


def _module(body: nn.Module, name: str) -> nn.Module:
    """The module of a stage; timm's forms of a network that give its maps rename or wrap the modules."""
    holder: Any = body
    for form, path in ((holder, name), (holder, name.replace(".", "_")), (getattr(holder, "model", None), name)):
        try:
            if form is not None:
                found: nn.Module = form.get_submodule(path)
                return found
        except AttributeError:
            continue
    raise ModelError(f"Grad-CAM: {type(body).__name__} has no module '{name}', where its feature_info ends a stage")


def gradcam(model: nn.Module, image: Tensor, target: Tensor, *, layer: nn.Module | None = None) -> NDArray[np.float32]:
    """Return Grad-CAM maps, see `evidence`."""
    return evidence(model, image, target, layer=layer)


def evidence(
    model: nn.Module, image: Tensor, target: Tensor, *, method: Method = "gradcam", layer: nn.Module | None = None
) -> NDArray[np.float32]:
    """Return where in each image the evidence for a class lies.

    - ``gradcam``: the maps of a layer, weighed by the mean gradient of the class's score, summed.
    - ``hirescam``: the same maps times their gradients place by place, summed: what the score really rests on where
      what follows the layer is linear, and equal to Grad-CAM where that is pooling and a classifier alone.
    - ``guided-gradcam``: Grad-CAM times the size of the pixels' gradients from which every activation has dropped what
      speaks against (for any activation; with ReLU this is guided backpropagation).
    - ``integrated-gradients``: from the mean colour to the image in 32 steps; adds up to the difference of the scores.
    - ``occlusion``: how much the score falls when a patch of an eighth of each side is covered by the mean colour. It
      needs no gradient and no layer, and takes some 225 passes an image.

    Evidence against the class is cut off. Maps of a layer are brought to the size of the image bilinearly; those of
    pixels are summed over the bands. Each is divided by its largest value. The network is put into evaluation mode for
    the computation and put back after; no parameter receives a gradient.

    Args:
        model: (B, C, H, W) -> scores (B, K), such as logits.
        image: (B, C, H, W), normalised, on the device of the model.
        target: (B,) the class that is explained.
        method: Which.
        layer: Its output must be maps (B, D, h, w); by default `target_layer`. Only the methods with a CAM have one.

    Returns:
        (B, H, W) in [0, 1]; all zero where nothing speaks for the class.

    Raises:
        MissingExtraError: If captum is not installed.
        ModelError: If the layer's output is not a stack of maps, as in a vision transformer.

    Source: Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2, sec. 3.2; Draelos and Carin 2020, arXiv:2011.08891;
    Sundararajan et al. 2017, arXiv:1703.01365; Zeiler and Fergus 2013, arXiv:1311.2901, sec. 4.2.
    """
    require("captum", "captum", "explain", {"gradcam": "Grad-CAM"}.get(method, method))
    if method in ("gradcam", "hirescam", "guided-gradcam") and layer is None:
        layer = target_layer(model, (image.shape[-2], image.shape[-1]))
    with _still(model):
        # With frozen parameters the graph starts at the image, so that the layer's output has a gradient at all.
        given = image.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            maps = _METHODS[method](model, layer, given, target).detach()  # (B, H, W)
    maps = maps.clamp_min(0.0)
    top = maps.amax(dim=(1, 2), keepdim=True)
    scaled: NDArray[np.float32] = torch.where(top > 0, maps / top.clamp_min(1e-20), 0.0).cpu().numpy()
    return scaled


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Keep a network in evaluation mode and its parameters without gradients, and put everything back."""
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, state in training.items():
            module.training = state
        for parameter, state in wanted.items():
            parameter.requires_grad_(state)


def _gradcam(model: nn.Module, layer: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Grad-CAM in the size of the image."""
    from captum.attr import LayerGradCam

    return _enlarged(layer, LayerGradCam(model, layer).attribute(image, target=target), image)


def _hirescam(model: nn.Module, layer: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Maps times gradients, summed over the channels."""
    from captum.attr import LayerGradientXActivation

    maps = LayerGradientXActivation(model, layer).attribute(image, target=target)
    return _enlarged(layer, maps.sum(1, keepdim=True) if maps.ndim == 4 else maps, image)


def _enlarged(layer: nn.Module, maps: Tensor, image: Tensor) -> Tensor:
    """Maps (B, 1, h, w) of a layer in the size of the image, (B, H, W), without what speaks against."""
    from captum.attr import LayerAttribution

    if maps.ndim != 4:
        raise ModelError(f"Grad-CAM: {type(layer).__name__} gives {tuple(maps.shape)}, not maps (B, D, h, w)")
    large = LayerAttribution.interpolate(maps.relu(), tuple(image.shape[-2:]), interpolate_mode="bilinear")
    return large[:, 0]


def _guided_gradcam(model: nn.Module, layer: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Grad-CAM times the size of the guided gradients of the pixels."""
    cam = _gradcam(model, layer, image, target)
    return cam * guided_gradients(model, image, target).abs().sum(1)


def guided_gradients(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Return the gradients (B, C, H, W) of the pixels, negative ones dropped behind every activation.

    captum's GuidedBackprop does this for ReLU alone and fails where it works in place; half of this family has Mish.
    """
    hooks = [m.register_forward_hook(_guided) for m in model.modules() if isinstance(m, _ACTIVATIONS)]
    try:
        score = model(image).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, image)
    finally:
        for hook in hooks:
            hook.remove()
    return gradient


def _guided(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Give on the output, with a gradient that keeps only what speaks for the class."""
    copied = output.clone()  # what comes after may work in place
    if copied.requires_grad:
        copied.register_hook(lambda gradient: gradient.clamp_min(0.0))
    return copied


def _integrated_gradients(model: nn.Module, layer: None, image: Tensor, target: Tensor) -> Tensor:
    """Integrated gradients from the mean colour, summed over the bands."""
    from captum.attr import IntegratedGradients

    found = IntegratedGradients(model).attribute(image, target=target, n_steps=_STEPS, internal_batch_size=_AT_ONCE)
    return found.sum(1)


def _occlusion(model: nn.Module, layer: None, image: Tensor, target: Tensor) -> Tensor:
    """How much the score falls where a patch is covered, averaged over the patches that cover a pixel."""
    from captum.attr import Occlusion

    bands, height, width = image.shape[1:]
    patch = (max(1, height // _PATCHES), max(1, width // _PATCHES))
    strides = (bands, *(max(1, side // 2) for side in patch))
    with torch.no_grad():
        found = Occlusion(model).attribute(
            image.detach(),
            target=target,
            sliding_window_shapes=(bands, *patch),
            strides=strides,
            perturbations_per_eval=_AT_ONCE,
        )
    return found[:, 0].float()  # the same for all bands, which are covered together


_METHODS: dict[Method, Any] = {
    "gradcam": _gradcam,
    "hirescam": _hirescam,
    "guided-gradcam": _guided_gradcam,
    "integrated-gradients": _integrated_gradients,
    "occlusion": _occlusion,
}
