"""`optimize`: the one door to the fast form of a network.

Modules change their class and nothing else: `FastRes2Block` is a `Res2Block` with another `forward`. Parameters,
buffers, state-dict keys, copies and training mode stay as they are, and `plain` gives the classes back. Each fast
`forward` looks at what it is given and calls the plain one where it has nothing better: in reduced precision on a CPU,
while a graph is traced, compiled or exported, where a hook watches a part, and where a part is of a kind it does not
know. On a GPU the fused units run, with Triton's kernels between torch's convolutions.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.layers import DropPath
from timm.models.res2net import Bottle2neck
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.autograd import forward_ad

from r2kit.backbones._res2 import Res2Block
from r2kit.backbones.fast import (
    direct,
    functions,
    known,
    native,
    norm_act,
    product,
    weight_grad,
    window,
    winograd,
    winograd_grad,
)
from r2kit.backbones.fast.convolution import Conv
from r2kit.backbones.fast.functions import ConvNorm, UnitSpec
from r2kit.backbones.fast.known import HOOKS
from r2kit.backbones.fast.norm_act import Norm
from r2kit.backbones.mish import MishBeta

__all__ = ["optimize", "optimize_with_reason", "plain"]


def optimize(model: nn.Module) -> nn.Module:
    """Turn a network into its fast form, in place, and return it; outputs and gradients stay the same.

    For 32- and 64-bit floats on a CPU with a C++ compiler, and for a network on an NVIDIA or AMD GPU with Triton (under
    autocast too; never measured on one); elsewhere the network stays as it is, and a warning says so. The first call on
    a machine compiles for some seconds and keeps the result on disk.

    Args:
        model: Any network. Convolutions, and the units of Res2Net, Res2NetPlus and ResNet, become fast; other modules
            stay as they are.
    """
    reason = optimize_with_reason(model)
    if not is_fast(model):
        warnings.warn(f"r2kit.optimize: {reason}", stacklevel=2)
    return model


def optimize_with_reason(model: nn.Module) -> str:
    """Do what `optimize` does, and return one line that says what was done or why nothing was."""
    devices = {p.device for p in model.parameters()}
    if any(device.type not in ("cpu", "cuda") for device in devices):
        return "off: the kernels are for CPUs and for GPUs with Triton, and the network is on another device"
    for device in devices:
        if device.type == "cuda" and (why := _gpu_refusal(device)):
            return f"off: {why}"
    try:
        for source in () if {device.type for device in devices} == {"cuda"} else _SOURCES:
            native.load(source)
    except native.NativeUnavailableError as error:
        return f"off: {error}"
    units = convs = 0
    for module in list(model.modules()):
        fast = _FAST.get(type(module))
        if fast is None or (type(module) is nn.Sequential and not _has_pair(module)):
            continue
        units += fast in _UNITS
        convs += fast is FastConv2d
        module.__class__ = fast
    if not is_fast(model):
        return "off: the network has no convolution"
    left = Counter(type(m).__name__ for m in model.modules() if _is_slow_unit(m))
    rest = f"; as they were: {', '.join(f'{n} {name}' for name, n in sorted(left.items()))}" if left else ""
    return f"on: {units} fused units, {convs} convolutions{rest}"


def plain(model: nn.Module) -> nn.Module:
    """Give a network its plain classes back, in place, and return it."""
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return model


def is_fast(model: nn.Module) -> bool:
    """Whether `optimize` changed some module of a network."""
    return any(type(module) in _PLAIN for module in model.modules())


_SOURCES = tuple(kernel.SOURCE for kernel in (norm_act, direct, product, winograd, winograd_grad, weight_grad, window))

# ------------------------------------------------------------------------------------------- what can be fast, when


def _gpu_refusal(device: torch.device) -> str | None:
    """Return why a GPU has no kernels, or None."""
    try:
        from r2kit.backbones.fast import norm_act_gpu
    except ImportError:
        return "the network is on a GPU, and Triton is not installed (pip install triton)"
    return norm_act_gpu.refusal(device)


def _usable(x: Tensor, parts: Iterable[nn.Module], *, gpu: bool = True) -> bool:
    """Whether a fast forward pass may take this input and these parts; `gpu`: whether there is one on a GPU."""
    if type(x) is not Tensor or x.numel() == 0 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if forward_ad._current_level >= 0:  # the functions know no tangents
        return False
    if x.is_cuda:
        known = (torch.float16, torch.bfloat16, torch.float32)
        if not gpu or x.dtype not in known or _gpu_refusal(x.device) is not None:
            return False
    elif x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    # A mode that watches every operator (to count, to fake) would not see what the kernels do.
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None or _in_transform():
        return False
    return not any(part.__dict__[hooks] for part in parts for hooks in HOOKS)


def _in_transform() -> bool:
    """Whether a torch.func transform is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _act(module: nn.Module) -> tuple[str, float] | None:
    """Return the activation and its sharpness as the kernel takes them, or None for another kind."""
    if type(module) is nn.Identity:
        return "identity", 1.0
    if type(module) is nn.ReLU:
        return "relu", 1.0
    if type(module) in (nn.Mish, FastMish):
        return "mish", 1.0
    if type(module) is MishBeta:
        return "mish", float(module.beta)
    return None


def _conv_norm(conv: nn.Module, bn: nn.Module, act: nn.Module, x: Tensor, *, act_first: bool) -> ConvNorm | None:
    """Return a convolution with its norm and activation, or None where one of them is of another kind."""
    if type(conv) not in (nn.Conv2d, FastConv2d):
        return None
    assert isinstance(conv, nn.Conv2d)
    geometry = Conv.of(conv)
    weight, bias = conv.weight, conv.bias
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if geometry is None or any(t is not None and not _fits(t, x) for t in (weight, bias)):
        return None
    norm = _norm(bn, act, x, act_first=act_first)
    return None if norm is None else ConvNorm(geometry, weight, bias, norm)


def _conv_act(conv: nn.Conv2d, act: nn.Module, x: Tensor) -> ConvNorm | None:
    """Return a convolution with its activation, or None where the convolution is of another kind."""
    geometry, found = Conv.of(conv), _act(act)
    if geometry is None or found is None or not all(_fits(t, x) for t in (conv.weight, conv.bias) if t is not None):
        return None
    norm = norm_act.activation(found[0], x.detach(), conv.out_channels)._replace(beta=found[1])
    return ConvNorm(geometry, conv.weight, conv.bias, norm)


def _norm(bn: nn.Module, act: nn.Module, x: Tensor, *, act_first: bool) -> Norm | None:
    """Return a norm with its activation, or None where one of them is of another kind."""
    found = _act(act)
    if type(bn) not in (nn.BatchNorm2d, FastBatchNorm2d) or found is None:
        return None
    assert isinstance(bn, nn.BatchNorm2d)
    sums = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    if any(t is not None and not _fits(t, x) and t.dtype != norm_act.sums_dtype(x) for t in sums):
        return None
    batch = bn.training or bn.running_mean is None
    moved = bn.training and bn.track_running_stats
    if batch and bn.training and bn.running_mean is not None and not moved:
        return None
    running = (bn.running_mean, bn.running_var) if moved or not batch else (None, None)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    return Norm(*found, act_first, batch, bn.eps, momentum, bn.weight, bn.bias, *running)


def _cast(x: Tensor) -> Tensor:
    """Return the input as autocast would give it to a convolution on a GPU; elsewhere as it is."""
    return x.to(torch.get_autocast_dtype("cuda")) if x.is_cuda and torch.is_autocast_enabled("cuda") else x


def _fits(tensor: Tensor, x: Tensor) -> bool:
    return tensor.dtype == x.dtype and tensor.device == x.device


def _step(bns: Iterable[nn.Module]) -> bool:
    """Count the batch in each norm that counts, as torch's does; False where a norm averages over all batches."""
    counting = [bn for bn in cast(Iterable[nn.BatchNorm2d], bns) if bn.training and bn.track_running_stats]
    if any(bn.momentum is None for bn in counting):
        return False
    for bn in counting:
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
    return True


# ------------------------------------------------------------------------------------------------ the fast classes


class FastConv2d(nn.Conv2d):
    """`nn.Conv2d` through `functions.conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, K, OH, OW)."""
        geometry = Conv.of(self)
        if (
            geometry is None
            or self.groups > 1
            or not _usable(x, (), gpu=False)
            or x.dim() != 4
            or not _fits(self.weight, x)
            or not _meets(self, geometry, x)
        ):
            return super().forward(x)
        return functions.conv_norm(ConvNorm(geometry, self.weight, self.bias, None), x)


class FastMish(nn.Mish):
    """`nn.Mish` with one exponential and one division, where it stands alone between channels-last maps."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply Mish to a tensor of any shape."""
        if not _usable(x, (), gpu=False) or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return functions.activation("mish", x)


class FastBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` where it stands alone between channels-last maps, as behind a stem."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        if (
            not _usable(x, (), gpu=False)
            or x.dim() != 4
            or x.shape[1] != self.num_features
            or not x.is_contiguous(memory_format=torch.channels_last)
        ):
            return super().forward(x)
        norm = _norm(self, nn.Identity(), x, act_first=False)
        if norm is None or (norm.batch and x.numel() == x.shape[1]) or not _step([self]):
            return super().forward(x)
        return functions.norm_alone(norm, x)


class FastSequential(nn.Sequential):
    """`nn.Sequential` that runs a convolution together with the norm and activation, or either, behind it."""

    def forward(self, x: Any) -> Any:
        """Apply the modules one after the other."""
        modules = list(self)
        i = 0
        while i < len(modules):
            found = _pair(modules[i : i + 3], x)
            if found is None:
                x = modules[i](x)
                i += 1
            else:
                part, bn, length = found
                counted = _step([] if bn is None else [bn])
                x = functions.conv_norm(part, _cast(x)) if counted else _each(modules[i : i + length], x)
                i += length
        return x


class _Unit:
    """A unit that forgets what was found out about it when its tensors are moved or cast."""

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        known.forget(self)
        return super()._apply(fn, recurse)  # type: ignore[misc]  # the other base class has it


class FastRes2Block(_Unit, Res2Block):
    """`Res2Block` through `functions.unit`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inplanes, H, W) to (B, 4 * planes, ceil(H / stride), ceil(W / stride))."""
        orders = (self.conv1_act_first, self.act_first)
        return _run(self, super().forward, x, [self.act1, *self.acts, self.act3], orders, self.chained)


class FastBottle2neck(_Unit, Bottle2neck):
    """timm's Res2Net unit through `functions.unit`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, K, OH, OW)."""
        acts = [self.relu] * (len(self.convs) + 2)
        return _run(self, super().forward, x, acts, (False, False), not self.is_first)


class FastBottleneck(_Unit, Bottleneck):
    """timm's ResNet unit, a Res2 unit with a single split, through `functions.unit`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, K, OH, OW)."""
        return _run(self, super().forward, x, [self.act1, self.act2, self.act3], (False, False), False)


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FastConv2d,
    nn.Mish: FastMish,
    nn.BatchNorm2d: FastBatchNorm2d,
    nn.Sequential: FastSequential,
    Res2Block: FastRes2Block,
    Bottle2neck: FastBottle2neck,
    Bottleneck: FastBottleneck,
}
_ACTS = (nn.ReLU, nn.Mish, FastMish, MishBeta)
_PLAIN = {fast: slow for slow, fast in _FAST.items()}
_UNITS = (FastRes2Block, FastBottle2neck, FastBottleneck)


def _is_slow_unit(module: nn.Module) -> bool:
    """Whether a module runs convolutions of its own with nothing fused around them."""
    if type(module) in _PLAIN or isinstance(module, nn.Sequential | nn.ModuleList):
        return False
    return any(type(child) is FastConv2d for child in module.children()) and not hasattr(module, "forward_features")


def _has_pair(module: nn.Module) -> bool:
    """Whether some convolution of a sequence is followed by a norm or an activation."""
    kinds = [type(child) for child in module.children()]
    return any(
        kind in (nn.Conv2d, FastConv2d)
        and ({nn.BatchNorm2d, FastBatchNorm2d} & {*kinds[i + 1 : i + 3]} or {*_ACTS} & {*kinds[i + 1 : i + 2]})
        for i, kind in enumerate(kinds)
    )


def _pair(modules: list[nn.Module], x: Any) -> tuple[ConvNorm, nn.Module | None, int] | None:
    """Return what the first of up to three modules begins: the fused part, its norm, and how many modules it takes."""
    if type(modules[0]) is not FastConv2d or len(modules) < 2 or not _usable(x, modules) or x.dim() != 4:
        return None
    identity = nn.Identity()
    part, bn = None, None
    x = _cast(x)
    if isinstance(modules[1], nn.BatchNorm2d):
        bn, length = modules[1], 3
        if len(modules) == 3:
            part = _conv_norm(modules[0], bn, modules[2], x, act_first=False)
        if part is None:
            part, length = _conv_norm(modules[0], bn, identity, x, act_first=False), 2
    elif len(modules) == 3 and isinstance(modules[2], nn.BatchNorm2d):
        bn, length = modules[2], 3
        part = _conv_norm(modules[0], bn, modules[1], x, act_first=True)
    elif type(modules[1]) in _ACTS and not x.is_cuda:
        part, length = _conv_act(modules[0], modules[1], x), 2
    if part is None or _single_value(part, x) or not _meets(modules[0], part.conv, x):
        return None
    return part, bn, length


def _meets(conv: nn.Module, geometry: Conv, x: Tensor) -> bool:
    """Whether a convolution takes (B, C, H, W) of such channels and of such a size; where not, torch says why."""
    return x.shape[1] == conv.in_channels and min(geometry.out_size(x.shape[2], x.shape[3])) >= 1


def _each(modules: list[nn.Module], x: Any) -> Any:
    for module in modules:
        x = module(x)
    return x


def _single_value(part: ConvNorm, x: Tensor) -> bool:
    """Whether torch would refuse to take statistics of the convolution's output: one value a channel."""
    height, width = part.conv.out_size(x.shape[2], x.shape[3])
    return part.norm is not None and part.norm.batch and x.shape[0] * height * width <= 1


def _run(
    block: Any,
    plain_forward: Callable[[Tensor], Tensor],
    x: Tensor,
    acts: list[nn.Module],
    orders: tuple[bool, bool],
    chained: bool,
) -> Tensor:
    """Run a unit fast, or plainly where something in it is of another kind.

    Args:
        block: The unit.
        plain_forward: Its plain forward pass.
        x: Its input.
        acts: Its activations in their order.
        orders: Whether the activation stands first behind the first convolution, and behind the inner ones.
        chained: Whether each split but the first has the output of the one before added.
    """
    if not _usable(x, ()):
        return plain_forward(x)
    given, x = x, _cast(x)
    # On a GPU weights may be cast anew each time.
    make = partial(_unit, block, x, acts, orders, chained)
    found = make() if x.is_cuda else known.remembered(block, x.dtype, make)
    if found is None:
        return plain_forward(given)
    spec, bns = found
    if not _suits(spec, x) or not _step(bns):
        return plain_forward(given)
    x = x.contiguous(memory_format=torch.channels_last)
    elsewhere = spec.side is None and not _does_nothing(block.downsample)
    return functions.unit(spec, x, block.downsample(x).to(x.dtype) if elsewhere else None)


def _suits(spec: UnitSpec, x: Tensor) -> bool:
    """Whether torch would compute a unit of an input: not of other channels, nor statistics of one value a channel."""
    out_size = spec.inner[0].conv.out_size(x.shape[2], x.shape[3])
    if x.shape[1] != spec.first.weight.shape[1] or min(out_size) < 1:
        return False
    behind = [part.norm for part in spec.parts[1:] if part.norm is not None and part.norm.batch]
    return not (_single_value(spec.first, x) or (behind and x.shape[0] * out_size[0] * out_size[1] <= 1))


class _Found(NamedTuple):
    """What a unit computes, and its norms."""

    spec: UnitSpec
    bns: list[nn.Module]


def _unit(block: Any, x: Tensor, acts: list[nn.Module], orders: tuple[bool, bool], chained: bool) -> _Found | None:
    """Return what a unit computes, or None where something in it is of another kind; arguments as in `_run`."""
    bottleneck = isinstance(block, Bottleneck)
    convs = [block.conv2] if bottleneck else list(block.convs)
    bns = [block.bn1, *([block.bn2] if bottleneck else block.bns), block.bn3]
    idle = (block.drop_block, block.se, block.drop_path, getattr(block, "aa", None))
    parts = [block.conv1, *convs, block.conv3, *bns, *acts]
    if not all(_does_nothing(module) for module in idle) or not _usable(x, parts):
        return None
    first = _conv_norm(block.conv1, bns[0], acts[0], x, act_first=orders[0])
    found = [_conv_norm(*trio, x, act_first=orders[1]) for trio in zip(convs, bns[1:-1], acts[1:-1], strict=True)]
    inner = tuple(part for part in found if part is not None)
    last = _conv_norm(block.conv3, bns[-1], acts[-1], x, act_first=False)
    if first is None or last is None or len(inner) < len(found):
        return None
    side, side_bns = _side(block.downsample, x)
    pool = getattr(block, "pool", None)
    spec = UnitSpec(
        first,
        inner,
        last,
        chained,
        passes_last=len(first.weight) > sum(len(part.weight) for part in inner),
        pool=convs[0].stride if isinstance(pool, nn.AvgPool2d) else None,
        published_sum=getattr(block, "published_sum", False),
        side=side,
    )
    return _Found(spec, [*bns, *side_bns])


def _side(downsample: nn.Module | None, x: Tensor) -> tuple[ConvNorm | None, list[nn.Module]]:
    """Return what makes a unit's shortcut, a convolution and its norm, and that norm; (None, []) for other kinds."""
    if type(downsample) is not FastSequential or len(downsample) != 2 or not _usable(x, [downsample], gpu=False):
        return None, []
    found = _pair(list(downsample), x)
    return (None, []) if found is None or found[1] is None else (found[0], [found[1]])


def _does_nothing(module: nn.Module | None) -> bool:
    """Whether a part of a unit leaves its input as it is."""
    if isinstance(module, DropPath):
        return not module.training or module.drop_prob == 0.0
    return module is None or type(module) is nn.Identity
