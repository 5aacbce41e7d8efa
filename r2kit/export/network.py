"""The network as it is exported: raw pixels to answers, BatchNorm folded where that is exact, traced for any size."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_eval

from r2kit.data.preprocess import Preprocess

UNIT = 32
"""The sides of images are multiples of it."""
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding, torch.ops.aten.convolution.default)
_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten._native_batch_norm_legit_no_training.default)


class Deployed(nn.Module):
    """A network from raw pixels to probabilities.

    Args:
        model: (B, C, H, W), normalised, -> logits (B, K) or (B, K, H, W).
        preprocess: The run's.
        several: Whether an image may have several labels: sigmoid in place of softmax.
        half: Compute in half precision what lies between normalisation and probabilities. Those stay in float32: raw
            pixels of 16 bits are more than half precision can hold.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module, preprocess: Preprocess, *, several: bool = False, half: bool = False) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half() if half else model
        self.several = several
        self.half_precision = half
        factor = [1.0 / (preprocess.scale * std) for std in preprocess.std]
        offset = [mean / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True)]
        self.register_buffer("factor", torch.tensor(factor)[:, None, None])
        self.register_buffer("offset", torch.tensor(offset)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Map raw pixels (B, C, H, W), float32, to probabilities (B, K) or (B, K, H, W)."""
        image = pixels * self.factor - self.offset
        logits = self.model(image.half()).float() if self.half_precision else self.model(image)
        return logits.sigmoid() if self.several else logits.softmax(1)


def fold_batch_norm(model: nn.Module, shape: tuple[int, int, int]) -> tuple[nn.Module, int, int]:
    """Fold each BatchNorm that follows a convolution into that convolution's weights.

    What follows what is read from the traced network, so it holds for every backbone: a BatchNorm is folded when its
    input is a convolution's output that nothing else uses, and neither module is used twice. One that stands after an
    activation (Res2NetPlus) is left: zero padding, sums and splits stand between it and the next convolution.

    Args:
        model: In evaluation mode; it is not changed.
        shape: (C, H, W) of an image to trace with.

    Returns:
        The folded copy, how many were folded, and how many are left.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, *shape),))
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def owner(node: Any) -> str | None:
        """The module that a weight belongs to, where nothing else uses it."""
        if not isinstance(node, torch.fx.Node) or node.name not in names or len(node.users) != 1:
            return None
        return names[node.name].rpartition(".")[0]

    norms = [node for node in program.graph.nodes if node.op == "call_function" and node.target in _NORMS]
    folded = 0
    for node in norms:
        before = node.args[0]
        if before.op != "call_function" or before.target not in _CONVOLUTIONS or len(before.users) != 1:
            continue
        at, norm_at = owner(before.args[1]), owner(node.args[3])
        if at is None or norm_at is None:
            continue
        conv, norm = model.get_submodule(at), model.get_submodule(norm_at)
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        model.set_submodule(at, fuse_conv_bn_eval(conv, norm))
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        model.set_submodule(norm_at, nn.Sequential(*rest) if rest else nn.Identity())  # timm's BN holds an activation
        folded += 1
    return model, folded, len(norms) - folded


def trace(network: Deployed, pixels: NDArray[np.float32]) -> ExportedProgram:
    """Trace the network for any batch; for any size too, where the network can and sees more than one cell."""
    example = torch.zeros(2, *pixels.shape[1:])
    batch = Dim("batch", min=1, max=4096)
    sizes = {2: UNIT * Dim("rows", min=2, max=256), 3: UNIT * Dim("columns", min=2, max=256)}
    with torch.no_grad():
        if min(pixels.shape[2:]) >= 2 * UNIT:  # torch.export makes a graph of its own for a map of one cell
            try:
                return torch.export.export(network, (example,), dynamic_shapes=({0: batch, **sizes},))
            except Exception:  # its errors have no class in common: here, a network whose graph depends on the size
                pass
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def any_size(program: ExportedProgram) -> bool:
    """Whether the program takes images of any size."""
    shape = next(node for node in program.graph.nodes if node.name == "pixels").meta["val"].shape
    return not isinstance(shape[2], int)
