"""From a recipe to a network: backbone and head, what is frozen, and which parameters decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from r2kit.backbones import create_model
from r2kit.backbones.weights import load_weights
from r2kit.errors import ModelError, RunError
from r2kit.recipe import ModelSpec

if TYPE_CHECKING:
    from r2kit.run import Run


def build_model(spec: ModelSpec, *, num_classes: int, in_chans: int) -> nn.Module:
    """Build the network that a recipe names, with its starting weights.

    Args:
        spec: The recipe's `model` section.
        num_classes: Size of the classifier.
        in_chans: Number of bands.

    Raises:
        ModelError: If the name is unknown, or the weights cannot be had or do not fit.
    """
    return create_model(
        spec.name,
        pretrained=spec.pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        in_chans_rule=spec.in_chans_rule,
        drop_rate=spec.drop_rate,
        drop_path_rate=spec.drop_path_rate,
    )


def model_from_run(run: Run) -> nn.Module:
    """Rebuild the network of a finished run, in evaluation mode, on the CPU.

    Raises:
        RunError: If the stored weights do not fit the stored recipe.
    """
    spec = run.recipe.model.model_copy(update={"pretrained": False})
    model = build_model(spec, num_classes=len(run.preprocess.classes), in_chans=len(run.preprocess.bands))
    try:
        load_weights(model, run.weights_file)
    except ModelError as error:
        raise RunError(f"{run.path}: {error}") from None
    return model.eval()


@dataclass(frozen=True)
class Frozen:
    """What stands still during training.

    Attributes:
        modules: The modules whose batch statistics must not move, kept in evaluation mode.
        parameters: Number of parameters without a gradient.
    """

    modules: tuple[nn.Module, ...]
    parameters: int


def freeze_backbone(model: nn.Module) -> Frozen:
    """Stop the gradients and the BatchNorm statistics of everything but the classifier.

    Args:
        model: A network with timm's `get_classifier`.

    Returns:
        The norms to put back into evaluation mode whenever the network is put into training mode.
    """
    classifier = model.get_classifier()  # type: ignore[operator]
    trained = {id(parameter) for parameter in classifier.parameters()}
    count = 0
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
            count += parameter.numel()
    return Frozen(tuple(module for module in model.modules() if isinstance(module, _BatchNorm)), count)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trained parameters into those that decay and those that do not.

    Args:
        model: Any network; frozen parameters are left out.
        weight_decay: Decay of the first group. Norms, biases and other vectors have none.
    """
    decay, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the layout of a batch of images in memory."""
    return torch.channels_last if channels_last else torch.contiguous_format
