"""Warm start of Res2NetPlus: the weights of a ReLU Res2Net, converted without changing what the network computes.

Nobody has published ImageNet weights of a network with Mish and the activation before the normalisation. But a trained
`res2net50d` (convolution, BN, ReLU) can be rewritten as a `res2netplus50d` (convolution, activation, BN):

1. Each BN that an activation follows is folded into its convolution, which then has a bias: ``relu(conv'(x))`` equals
   the old ``relu(BN(conv(x)))``.
2. The BN that now stands behind the activation starts as the identity. Its running statistics are measured on the
   user's own images, and its weight and bias undo them: ``weight = sqrt(var + eps)``, ``bias = mean``. So it is the
   identity in evaluation, and nearly so in training, where the statistics of a batch take their place.
3. ReLU is the limit of ``x * tanh(softplus(beta * x))`` for large beta, and Mish is beta = 1. Training starts at a
   large beta and anneals it to 1; `finalize` then puts `torch.nn.Mish` in, and what is saved is a plain Res2NetPlus.

The normalised splits and sums of a unit need no care, since every tensor that leaves a (convolution, activation, BN) is
the tensor that left the (convolution, BN, activation) before, zero padding included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from r2kit.backbones._fit import architecture_of
from r2kit.backbones._weight_file import few
from r2kit.backbones.create import create_model
from r2kit.backbones.mish import MishBeta, mish_beta_to_mish, mish_to_mish_beta, set_beta
from r2kit.backbones.published import warm_start_source
from r2kit.backbones.weights import InChansRule, LoadReport
from r2kit.errors import ModelError

__all__ = ["START_BETA", "Conversion", "anneal_beta", "convert", "finalize", "set_beta", "warm_start"]

START_BETA = 25.0
"""Where annealing starts: at most 0.0124 from ReLU, and smooth."""

_STAGES = ("layer1", "layer2", "layer3", "layer4")


Images = Iterable[Tensor | Mapping[str, Any]]


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Args:
        folded: Number of BatchNorms that went into their convolutions.
        images: Number of images that the new statistics were measured on.
        classifier: Whether the source's classifier was taken over; it is not when the class counts differ.
    """

    folded: int
    images: int
    classifier: bool


def warm_start(
    name: str,
    images: Images | Callable[[LoadReport], Images],
    *,
    pretrained: bool | str | Path = True,
    num_classes: int = 1000,
    in_chans: int = 3,
    in_chans_rule: InChansRule = "repeat",
    rgb_bands: Sequence[int] | None = None,
    beta: float = START_BETA,
    max_images: int = 512,
    **timm_options: Any,
) -> nn.Module:
    """Build `name` with the converted weights of its ReLU twin.

    Args:
        name: ``res2netplus50d`` or ``res2netplus101d``.
        images: See `convert`; or a function that makes them, given what loading the source's weights did and so which
            normalisation they need.
        pretrained: Weights of the source, ``res2net50d`` or ``res2net101d``, as for `create_model`.
        num_classes: Outputs of the classifier.
        in_chans: Bands of the image.
        in_chans_rule: See `create_model`.
        rgb_bands: See `create_model`.
        beta: Sharpness to start with; train with `anneal_beta` and `set_beta`, then call `finalize`.
        max_images: See `convert`.
        **timm_options: For the network that is built, as for `create_model`.

    Raises:
        ModelError: If `name` has no source, or the weights cannot be had or do not fit.
    """
    source_name = warm_start_source(name)
    if source_name is None:
        raise ModelError(f"warm start: '{name}' has no ReLU twin; 'res2netplus50d' and 'res2netplus101d' have")
    if pretrained is False:
        raise ModelError(f"warm start: needs weights of '{source_name}': pretrained=true, or the path of a file")
    source = create_model(
        source_name,
        pretrained=pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        in_chans_rule=in_chans_rule,
        rgb_bands=rgb_bands,
    )
    target = create_model(name, num_classes=num_classes, in_chans=in_chans, **timm_options)
    report: Any = source.load_report
    done = convert(source, target, images(report) if callable(images) else images, beta=beta, max_images=max_images)
    note = f"converted from {source_name}: {done.folded} norms folded, statistics from {done.images} images"
    target.load_report = replace(report, notes=(*report.notes, note))
    carried = ("mean", "std", "interpolation", "crop_pct")
    cfg: Any = source.pretrained_cfg
    target.pretrained_cfg = {**target.pretrained_cfg, **{k: cfg[k] for k in carried}}  # type: ignore[assignment, dict-item]
    return target


def convert(
    source: nn.Module,
    target: nn.Module,
    images: Images,
    *,
    beta: float = START_BETA,
    max_images: int = 512,
) -> Conversion:
    """Give `target` the weights of `source` so that it computes the same at a large beta; `target` changes in place.

    Args:
        source: A ReLU Res2Net of the v1b skeleton: timm's `res2net50d`, or anything built like it.
        target: The Res2NetPlus of the same skeleton, with biases: `res2netplus50d`, or anything built like it. Its
            `torch.nn.Mish` become `MishBeta`.
        images: Batches (B, C, H, W) as training will see them, or mappings that hold such a batch as ``image``. On any
            device; they are moved to the target's.
        beta: Sharpness at which the statistics are measured and which the target keeps.
        max_images: Stop after the batch that reaches this many.

    Returns:
        What was done.

    Raises:
        ModelError: If the two networks are not of one skeleton, the target has no biases or no Mish, or there are no
            images.
    """
    state, pairs, classifier = _converted_state(source, target)
    if not mish_to_mish_beta(target, beta) and not set_beta(target, beta):
        raise ModelError(f"warm start: '{architecture_of(target)}' has no Mish that beta could sharpen")
    target.load_state_dict(state, strict=True)
    norms = [target.get_submodule(norm) for _, norm in pairs]
    seen = _measure(target, norms, images, max_images)
    return Conversion(folded=len(pairs), images=seen, classifier=classifier)


def anneal_beta(progress: float, start: float = START_BETA, until: float = 0.5) -> float:
    """Return beta for a share of training: from `start` at 0 to exactly 1 at `until`, and 1 from there on.

    It is 1 / beta that grows linearly, because the distance from ReLU is proportional to it: so the function changes
    at a constant rate.

    Args:
        progress: Share of the training that is done, in [0, 1].
        start: Beta at the beginning, >= 1.
        until: Share of the training after which beta is 1, in (0, 1].

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not 0.0 <= progress <= 1.0 or start < 1.0 or not 0.0 < until <= 1.0:
        raise ValueError(f"anneal_beta: out of range: progress={progress}, start={start}, until={until}")
    share = min(progress / until, 1.0)
    return 1.0 if share == 1.0 else 1.0 / (1.0 / start + share * (1.0 - 1.0 / start))


def finalize(model: nn.Module) -> nn.Module:
    """Put `torch.nn.Mish` in the place of every `MishBeta`, in place: what is left is a plain Res2NetPlus.

    Returns:
        The same model.

    Raises:
        ModelError: If a beta is not 1, so that the network would compute something else afterwards.
    """
    betas = {float(m.beta) for m in model.modules() if isinstance(m, MishBeta)}
    if betas - {1.0}:
        raise ModelError(f"finalize: beta is {max(betas):g}; anneal it to 1 first, or call set_beta(model, 1.0)")
    mish_beta_to_mish(model)
    return model


# -- the conversion ----------------------------------------------------------------------------------------------------


def _converted_state(source: nn.Module, target: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, str]], bool]:
    """Return the target's state dict, its (convolution, norm) pairs, and whether the classifier was taken over."""
    from_pairs, to_pairs = _conv_norm_pairs(source), _conv_norm_pairs(target)
    names = f"'{architecture_of(source)}' does not convert into '{architecture_of(target)}'"
    if len(from_pairs) != len(to_pairs):
        raise ModelError(f"warm start: {names}: {len(from_pairs)} normalised convolutions against {len(to_pairs)}")
    theirs, ours = source.state_dict(), target.state_dict()
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for (conv, norm), (to_conv, to_norm) in zip(from_pairs, to_pairs, strict=True):
        if f"{to_conv}.bias" not in ours:
            raise ModelError(f"warm start: {names}: {to_conv} has no bias; build the target with act_bias=True")
        weight, bias = _folded(source.get_submodule(conv), source.get_submodule(norm))
        state |= {f"{to_conv}.weight": weight, f"{to_conv}.bias": bias}
        # The identity, until the statistics are measured.
        channels, eps = bias.numel(), _norm(target, to_norm).eps
        state[f"{to_norm}.running_mean"] = torch.zeros(channels)
        state[f"{to_norm}.running_var"] = torch.ones(channels)
        state[f"{to_norm}.weight"] = torch.full((channels,), math.sqrt(1.0 + eps))
        state[f"{to_norm}.bias"] = torch.zeros(channels)
        state[f"{to_norm}.num_batches_tracked"] = torch.tensor(0)
        used |= {key for key in theirs if key.rpartition(".")[0] in (conv, norm)}

    rest = [key for key in ours if key not in state]
    heads = [key for key in rest if key in theirs and key.startswith("fc.") and theirs[key].shape != ours[key].shape]
    state |= {key: ours[key] if key in heads else theirs[key] for key in rest if key in theirs}
    missing = [key for key in rest if key not in theirs]
    surplus = [key for key in theirs if key not in used and key not in rest]
    unequal = [key for key in state if state[key].shape != ours[key].shape]
    if wrong := missing + surplus + unequal:
        raise ModelError(f"warm start: {names}: {len(wrong)} tensors have no counterpart ({few(wrong)})")
    return state, to_pairs, not heads


def _conv_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of every convolution that an activation follows, and of its norm, in order."""
    stem = getattr(model, "conv1", None)
    if not isinstance(stem, nn.Sequential) or not all(hasattr(model, stage) for stage in _STAGES):
        raise ModelError(f"warm start: '{architecture_of(model)}' is not a Res2Net with a stem of three convolutions")
    convs = [f"conv1.{i}" for i, m in enumerate(stem) if isinstance(m, nn.Conv2d)]
    norms = [f"conv1.{i}" for i, m in enumerate(stem) if isinstance(m, _BatchNorm)] + ["bn1"]
    pairs = list(zip(convs, norms, strict=True))
    for stage in _STAGES:
        for i, block in enumerate(model.get_submodule(stage).children()):
            inner = getattr(block, "convs", None)
            if not isinstance(inner, nn.ModuleList):
                raise ModelError(f"warm start: '{architecture_of(model)}' is not made of Res2 units")
            name = f"{stage}.{i}"
            pairs.append((f"{name}.conv1", f"{name}.bn1"))
            pairs += [(f"{name}.convs.{k}", f"{name}.bns.{k}") for k in range(len(inner))]
    return pairs


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution that does what `conv` and then `norm` do in evaluation."""
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, _BatchNorm) or norm.running_var is None:
        raise ModelError(f"warm start: cannot fold {type(norm).__name__} into {type(conv).__name__}")
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    scale = (var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    bias = -mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.detach().double() * scale
    if norm.affine:
        bias = bias + norm.bias.detach().double()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _norm(model: nn.Module, name: str) -> _BatchNorm:
    """Return the BatchNorm of that name."""
    norm = model.get_submodule(name)
    if not isinstance(norm, _BatchNorm):
        raise ModelError(f"warm start: {name} is a {type(norm).__name__}, not a BatchNorm")
    return norm


class _Statistics:
    """Mean and variance of each channel over everything that passes, in float64, merged batch by batch.

    Source of the merge: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 1.5.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take in the (B, C, H, W) input of a norm, as a forward pre-hook."""
        x = inputs[0].detach()
        var, mean = (t.cpu().double() for t in torch.var_mean(x.float(), dim=(0, 2, 3), correction=0))
        count = x.numel() // x.shape[1]
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + var * count + delta.square() * (self.count * count / total)
        self.count = total


def _measure(
    target: nn.Module, norms: Sequence[nn.Module], images: Iterable[Tensor | Mapping[str, Any]], max_images: int
) -> int:
    """Measure what reaches each norm, store it, and make the norm the identity; return the number of images.

    All norms are the identity while this runs, and whatever they are given they stay so: one pass serves all.
    """
    device = next(target.parameters()).device
    statistics = [_Statistics() for _ in norms]
    handles: list[RemovableHandle] = [n.register_forward_pre_hook(s) for n, s in zip(norms, statistics, strict=True)]
    was_training = [m for m in target.modules() if m.training]
    target.eval()
    seen = 0
    try:
        with torch.no_grad():
            for batch in images:
                x = batch["image"] if isinstance(batch, Mapping) else batch
                target(x.to(device))
                seen += x.shape[0]
                if seen >= max_images:
                    break
    finally:
        for handle in handles:
            handle.remove()
        for module in was_training:
            module.training = True
    if seen == 0:
        raise ModelError("warm start: no images to measure the statistics on")
    for norm, found in zip(norms, statistics, strict=True):
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
            raise ModelError("warm start: the norms of the target must keep running statistics")
        var = found.squares / max(found.count - 1, 1)  # unbiased, as torch keeps it
        if not bool(torch.isfinite(found.mean).all() and torch.isfinite(var).all()):
            raise ModelError("warm start: the images lead to activations that are not finite; are they normalised?")
        with torch.no_grad():
            norm.running_mean.copy_(found.mean)
            norm.running_var.copy_(var)
            # From the stored values, so that rounding cancels.
            norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)
    return seen
