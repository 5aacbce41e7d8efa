"""The fast units as autograd functions: a convolution, a convolution with its norm, a whole Res2 or bottleneck unit.

Each keeps for its backward pass what a convolution read and what it wrote, and computes everything between the two
again; the plain modules keep the input of each activation, each normalisation and each addition too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from r2kit.backbones.fast import memory, native, norm_act, window
from r2kit.backbones.fast.convolution import Conv, room, rows
from r2kit.backbones.fast.norm_act import Norm
from r2kit.backbones.fast.tape import Tapes, Values


class ConvNorm(NamedTuple):
    """A convolution, and the norm and activation behind it (None: neither)."""

    conv: Conv
    weight: Tensor
    bias: Tensor | None
    norm: Norm | None


@dataclass(frozen=True)
class UnitSpec:
    """A Res2 unit; a plain bottleneck is one with a single split.

    Attributes:
        first: The 1x1 in front.
        inner: The convolutions of the splits.
        last: The 1x1 behind; its activation stands after the addition of the shortcut.
        chained: Whether each split but the first has the output of the one before added.
        passes_last: Whether one more split goes on without a convolution.
        pool: Stride of the 3x3 average pool of that split, or None.
        published_sum: Concatenate ``z0 + x1`` in place of ``z0``.
        side: The convolution and norm of the shortcut, or None where it is x itself or made elsewhere.
        tapes: What it calls, written down.
    """

    first: ConvNorm
    inner: tuple[ConvNorm, ...]
    last: ConvNorm
    chained: bool
    passes_last: bool
    pool: tuple[int, int] | None
    published_sum: bool
    side: ConvNorm | None
    tapes: Tapes = field(default_factory=Tapes, compare=False)

    @cached_property
    def parts(self) -> tuple[ConvNorm, ...]:
        """Every convolution in its order."""
        return (self.first, *self.inner, self.last, *(() if self.side is None else (self.side,)))

    @cached_property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What `tensors_of` gives for its parts."""
        return tuple(tensors_of(self.parts))

    @cached_property
    def constants(self) -> tuple[Tensor | None, ...]:
        """Every tensor that it reads or moves."""
        norms = [part.norm for part in self.parts if part.norm is not None]
        return (*self.tensors, *(t for norm in norms for t in (norm.running_mean, norm.running_var)))

    def places(self) -> list[Any]:
        """Return where the constants lie in memory, and how."""
        return [(t.data_ptr(), t.stride(), t.shape) for t in self.constants if t is not None]

    @cached_property
    def first_places(self) -> list[Any]:
        """Where they lay at the first forward pass, and at every later one: else the unit had been found out anew."""
        return self.places()

    @cached_property
    def is_fixed(self) -> bool:
        """Whether no norm takes the statistics of the batch."""
        return not any(part.norm is not None and part.norm.batch for part in self.parts)

    def run(self, what: Any, function: Any, *inputs: Tensor | None) -> Values:
        """Return ``function(*inputs)``, written down under `what` and the inputs' sizes."""
        x = inputs[0]
        assert x is not None
        if x.is_cuda:
            found: Values = function(*inputs)
            return found
        sizes = tuple(None if t is None else (t.shape, t.stride()) for t in inputs)
        return self.tapes.run((what, x.dtype, native.threads(), sizes), function, inputs, self.constants)


def tensors_of(parts: tuple[ConvNorm, ...]) -> list[Tensor | None]:
    """Return four for each part: weight and bias of the convolution, weight and bias of the norm."""
    found: list[Tensor | None] = []
    for part in parts:
        found += [part.weight, part.bias]
        found += [None, None] if part.norm is None else [part.norm.weight, part.norm.bias]
    return found


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _ConvNormFunction(Function):
    @staticmethod
    def forward(ctx: Any, part: ConvNorm, keep: bool, x: Tensor, *tensors: Tensor | None) -> Tensor:
        if not keep and part.norm is not None and not part.norm.batch:
            finished = part.conv.finished(x, part.weight, part.bias, part.norm)
            assert finished is not None
            return finished
        conv_out = part.conv.forward(x, part.weight, part.bias)
        if part.norm is None:
            out, stats = conv_out, None
        else:
            out = memory.empty_like(conv_out) if keep else conv_out
            stats = _stats(part.norm, conv_out)
            norm_act.forward(rows(conv_out), part.norm, stats, rows(out))
        if keep:
            ctx.part = part
            ctx.save_for_backward(x, None if part.norm is None else conv_out, stats, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        part: ConvNorm = ctx.part
        x, conv_out, stats, *_ = ctx.saved_tensors  # the rest: so that torch notices if a weight has changed
        need_x, *need = ctx.needs_input_grad[2:]
        dy = _channels_last(dy)
        dnorm: tuple[Tensor | None, Tensor | None] = (None, None)
        if part.norm is not None:
            dc = memory.empty_like(conv_out)
            dnorm = norm_act.backward(rows(conv_out), part.norm, stats, rows(dy), rows(dc))
            dy = dc
        dx = part.conv.input_grad(dy, x, part.weight) if need_x else None
        dweight, dbias = _conv_grads(part, need, dy, x)
        return None, None, dx, _laid_out(dweight, part.weight), dbias, *_needed(dnorm, need[2:])


def conv_norm(part: ConvNorm, x: Tensor) -> Tensor:
    """Return act(BN(conv(x))) or BN(act(conv(x))), (B, K, OH, OW), channels-last.

    Args:
        part: What to compute; without a norm, the convolution alone.
        x: (B, C, H, W).
    """
    tensors = tensors_of((part,))
    result: Tensor = _ConvNormFunction.apply(part, wants_grad(x, *tensors), _channels_last(x), *tensors)
    return result


class _NormActFunction(Function):
    @staticmethod
    def forward(ctx: Any, norm: Norm, x: Tensor, *tensors: Tensor | None) -> Tensor:
        out, stats = memory.empty_like(x), _stats(norm, x)
        norm_act.forward(rows(x), norm, stats, rows(out))
        ctx.norm = norm
        ctx.save_for_backward(x, stats, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, stats, *_ = ctx.saved_tensors
        dx = memory.empty_like(x)
        found = norm_act.backward(rows(x), ctx.norm, stats, rows(_channels_last(dy)), rows(dx))
        return None, dx, *_needed(found, ctx.needs_input_grad[2:])


def norm_alone(norm: Norm, x: Tensor) -> Tensor:
    """Return a norm and its activation of x, channels-last.

    Args:
        norm: What to compute.
        x: (B, C, H, W).
    """
    result: Tensor = _NormActFunction.apply(norm, _channels_last(x), norm.weight, norm.bias)
    return result


def activation(act: str, x: Tensor) -> Tensor:
    """Return act(x), channels-last.

    Args:
        act: A key of `norm_act.ACTS`.
        x: (B, C, H, W).
    """
    x = _channels_last(x)
    return norm_alone(norm_act.activation(act, x.detach(), x.shape[1]), x)


class _UnitFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, spec: UnitSpec, keep: bool, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        out, *kept = spec.run(("forward", keep), partial(_forward_unit, spec, keep), x, shortcut)
        if keep:
            ctx.spec, ctx.places = spec, spec.first_places
            ctx.save_for_backward(x, *kept, *tensors)
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        spec: UnitSpec = ctx.spec
        x, *kept = ctx.saved_tensors[: -len(spec.tensors)]  # the rest: so that torch notices if a weight has changed
        needs = ctx.needs_input_grad[2:]
        dout, function = _channels_last(dout), partial(_backward_unit, spec, needs)
        if spec.places() == ctx.places:
            dx, dshortcut, *grads = spec.run(("backward", needs), function, dout, x, *kept)
        else:  # somebody gave a weight other memory since, which autograd does not mind
            dx, dshortcut, *grads = function(dout, x, *kept)
        for i, part in enumerate(spec.parts):
            grads[4 * i] = _laid_out(grads[4 * i], part.weight)
        return None, None, dx, dshortcut, *grads


def _forward_unit(spec: UnitSpec, keep: bool, x: Tensor, shortcut: Tensor | None) -> Values:
    """Return a unit's output, and, to `keep`, what `_backward_unit` takes."""
    first, last = spec.first, spec.last
    assert first.norm is not None
    assert last.norm is not None
    width = first.weight.shape[0] // (len(spec.inner) + spec.passes_last)
    used = width * len(spec.inner)
    h = first.conv.forward(x, first.weight, first.bias)
    h_rows = rows(h)
    stats = [_stats(first.norm, h)]
    b = room(h, used, (h.shape[2], h.shape[3])) if keep else h.narrow(1, 0, used)
    b_rows = rows(b)
    norm_act.forward(h_rows.narrow(1, 0, used), first.norm.narrow(0, used), _cut(stats[0], 0, used), b_rows)

    conv_outs: list[Tensor] = []
    cat = cat_rows = torch.empty(0)
    z = b.narrow(1, 0, width)
    for i, part in enumerate(spec.inner):
        assert part.norm is not None
        c = part.conv.forward(z, part.weight, part.bias)
        if i == 0:
            cat = room(c, first.weight.shape[0], (c.shape[2], c.shape[3]))
            cat_rows = rows(cat)
        stats.append(_stats(part.norm, c))
        out, after = cat_rows.narrow(1, i * width, width), (i + 1) * width
        if spec.chained and i + 1 < len(spec.inner):
            published = spec.published_sum and i == 0
            z = cat.narrow(1, 0, width) if published else memory.empty_like(c)
            add = b_rows.narrow(1, after, width)
            norm_act.forward(rows(c), part.norm, stats[-1], None if published else out, add=add, y2=rows(z))
        else:
            norm_act.forward(rows(c), part.norm, stats[-1], out)
            if i + 1 < len(spec.inner):
                z = b.narrow(1, after, width)
        conv_outs.append(c)
    if not keep:
        conv_outs.clear()
    if spec.passes_last:
        norm, last_stats = first.norm.narrow(used, width), _cut(stats[0], used, width)
        tail_rows = h_rows.narrow(1, used, width)
        if spec.pool is None:
            norm_act.forward(tail_rows, norm, last_stats, cat_rows.narrow(1, used, width))
        else:
            tail = room(h, width, (h.shape[2], h.shape[3]))
            norm_act.forward(tail_rows, norm, last_stats, rows(tail))
            _average(tail, cat[:, used:], spec.pool)

    o = last.conv.forward(cat, last.weight, last.bias)
    stats.append(_stats(last.norm, o))
    side_out = side_stats = None
    if spec.side is not None:
        assert spec.side.norm is not None
        side_out = spec.side.conv.forward(x, spec.side.weight, spec.side.bias)
        side_stats = _stats(spec.side.norm, side_out)
        shortcut = memory.empty_like(side_out) if keep else side_out
        norm_act.forward(rows(side_out), spec.side.norm, side_stats, rows(shortcut))
    out4 = memory.empty_like(o) if keep else o
    norm_act.forward(rows(o), last.norm, stats[-1], rows(out4), res=rows(x if shortcut is None else shortcut))
    return (out4, shortcut, side_out, side_stats, h, cat, o, *conv_outs, *stats) if keep else (out4,)


def _backward_unit(
    spec: UnitSpec,
    needs: tuple[bool, ...],
    dout: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    side_out: Tensor | None,
    side_stats: Tensor | None,
    h: Tensor,
    cat: Tensor,
    o: Tensor,
    *kept: Tensor,
) -> Values:
    """Return the gradients of a unit's input, of its shortcut, and of what `tensors_of` gives, where `needs` says so.

    Args:
        spec: The unit.
        needs: One for each of those.
        dout: Gradient of its output.
        x: Its input.
        shortcut: As `_forward_unit` returned it, like everything that follows.
        side_out: What the shortcut's convolution wrote.
        side_stats: Statistics of its norm.
        h: What the first convolution wrote.
        cat: What the last convolution read.
        o: What it wrote.
        kept: What each inner convolution wrote, then the statistics of every other norm.
    """
    count = len(spec.inner)
    width = h.shape[1] // (count + spec.passes_last)
    used = width * count
    conv_outs, (stats1, *inner_stats, stats3) = kept[:count], kept[count:]
    need_x, need_shortcut, *parts = needs
    need = [parts[i : i + 4] for i in range(0, len(parts), 4)]
    first, last = spec.first, spec.last
    assert first.norm is not None
    assert last.norm is not None

    own = shortcut is None  # the identity: both gradients are of one tensor
    dres, do = memory.empty_like(o), memory.empty_like(o)
    dnorm = norm_act.backward(
        *(rows(o), last.norm, stats3, rows(dout), rows(do)),
        res=rows(x if shortcut is None else shortcut),
        dres=rows(dres),
    )
    dcat = last.conv.input_grad(do, cat, last.weight)
    wanted = need[count + 1]
    grads_last = [*_conv_grads(last, wanted, do, cat), *_needed(dnorm, wanted[2:])]
    del do
    if spec.side is not None:
        assert spec.side.norm is not None
        assert side_out is not None
        # dres becomes the gradient of what the side's convolution wrote
        dnorm = norm_act.backward(rows(side_out), spec.side.norm, side_stats, rows(dres), rows(dres))
        grads_last += [*_conv_grads(spec.side, need[-1], dres, x), *_needed(dnorm, need[-1][2:])]

    dh, h_rows, dcat_rows = memory.empty_like(h), rows(h), rows(dcat)
    dh_rows, norm1 = rows(dh), first.norm
    dnorm1 = memory.small((2, h.shape[1]), h, norm_act.sums_dtype(h))

    def close(start: int, length: int, dy: Tensor) -> None:
        """Take the gradient of some splits back through the first norm."""
        cut = (norm1.narrow(start, length), _cut(stats1, start, length))
        read, written = (part.narrow(1, start, length) for part in (h_rows, dh_rows))
        norm_act.backward(read, *cut, dy, written, sums=dnorm1.narrow(1, start, length))

    if spec.passes_last:
        dlast = dcat[:, used:]
        if spec.pool is not None:
            dtail = room(h, width, (h.shape[2], h.shape[3]))
            _average_grad(dlast, dtail, spec.pool)
            dlast = dtail
        close(used, width, rows(dlast))

    zs = _read_again(spec, h, cat, stats1, width)
    db = room(h, used, (h.shape[2], h.shape[3]))  # gradients of what the inner convolutions read
    db_rows = rows(db)
    grads_inner: list[Any] = []
    following: Tensor | None = None  # gradient of the next convolution's input, where this split is added to it
    for i in reversed(range(count)):
        part, c = spec.inner[i], conv_outs[i]
        assert part.norm is not None
        dy, add = dcat_rows.narrow(1, i * width, width), following
        if spec.published_sum and i == 0 and following is not None:
            dy, add = following, None  # it holds what came through the concatenation already
        dc = memory.empty_like(c)
        dnorm = norm_act.backward(rows(c), part.norm, inner_stats[i], dy, rows(dc), add=add)
        grads_inner = [*_conv_grads(part, need[i + 1], dc, zs[i]), *_needed(dnorm, need[i + 1][2:]), *grads_inner]
        dz = part.conv.input_grad(dc, zs[i], part.weight, out=db.narrow(1, i * width, width))
        chained = spec.chained and i > 0
        if chained and spec.published_sum and i == 1:
            dz.add_(dcat[:, :width])
        following = db_rows.narrow(1, i * width, width) if chained else None
    close(0, used, db_rows)

    grads_first = [*_conv_grads(first, need[0], dh, x), *_needed((dnorm1[0], dnorm1[1]), need[0][2:])]
    dx = first.conv.input_grad(dh, x, first.weight, into=dres if own else None) if need_x else None
    if need_x and spec.side is not None:
        dx = spec.side.conv.input_grad(dres, x, spec.side.weight, into=dx)
    return (dx, dres if need_shortcut and not own else None, *grads_first, *grads_inner, *grads_last)


def _read_again(spec: UnitSpec, h: Tensor, cat: Tensor, stats: Tensor | None, width: int) -> list[Tensor]:
    """Return what each inner convolution read: the splits behind the first norm, with what was added to them."""
    norm1 = spec.first.norm
    assert norm1 is not None
    used = width * len(spec.inner)
    z, h_rows = room(h, used, (h.shape[2], h.shape[3])), rows(h)
    z_rows = rows(z)
    known = int(spec.published_sum) if spec.chained else 0  # the first sum of all stands in the concatenation
    added = (1 + known) * width if spec.chained else used  # from here on a split has the one before it added

    def again(start: int, end: int, add_from: int | None = None) -> None:
        if start < end:
            norm = norm1.narrow(start, end - start).fixed(_cut(stats, start, end - start))
            read, out = h_rows.narrow(1, start, end - start), z_rows.narrow(1, start, end - start)
            if add_from is None:
                norm_act.forward(read, norm, None, out)
            else:
                norm_act.forward(read, norm, None, None, add=rows(cat).narrow(1, add_from, end - start), y2=out)

    again(0, width if spec.chained else used)
    again(added, used, added - width)
    zs = [z[:, i * width : (i + 1) * width] for i in range(len(spec.inner))]
    if known and len(zs) > 1:
        zs[1] = cat[:, :width]
    return zs


def _finished_unit(spec: UnitSpec, x: Tensor, shortcut: Tensor | None) -> Values:
    """Return a unit's output where every statistic is fixed and nothing is kept: each map is written once."""

    def finished(part: ConvNorm, x: Tensor, **where: Tensor | None) -> Tensor | None:
        assert part.norm is not None
        return part.conv.finished(x, part.weight, part.bias, part.norm, **where)

    h = finished(spec.first, x)
    assert h is not None
    width = h.shape[1] // (len(spec.inner) + spec.passes_last)
    used = width * len(spec.inner)
    size = spec.inner[0].conv.out_size(h.shape[2], h.shape[3])
    cat = room(h, h.shape[1], size)
    sums = [room(h, width, size) for _ in range(min(2, len(spec.inner) - 1))] if spec.chained else []
    z = h[:, :width]
    for i, part in enumerate(spec.inner):
        out = rows(cat)[:, i * width : (i + 1) * width]
        following = h[:, (i + 1) * width : (i + 2) * width]
        if spec.chained and i + 1 < len(spec.inner):
            published = spec.published_sum and i == 0
            chained = cat[:, :width] if published else sums[i % 2]
            finished(part, z, y=None if published else out, add=rows(following), y2=rows(chained))
            z = chained
        else:
            finished(part, z, y=out)
            z = following
    if spec.passes_last:
        _average(h[:, used:], cat[:, used:], spec.pool)
    if spec.side is not None:
        shortcut = finished(spec.side, x)
    found = finished(spec.last, cat, res=rows(x if shortcut is None else shortcut))
    return (found,)


def _average(x: Tensor, out: Tensor, step: tuple[int, int] | None) -> None:
    """Write the means of 3x3 windows of some channels, or, without a step, the channels themselves."""
    if x.is_cuda:
        out.copy_(x if step is None else torch.nn.functional.avg_pool2d(x, 3, step, 1))
    else:
        window.average(x, out, *((1, (1, 1)) if step is None else (3, step)))


def _average_grad(dy: Tensor, out: Tensor, step: tuple[int, int]) -> None:
    """Write the gradient of what `_average` read."""
    if dy.is_cuda:
        out.copy_(torch.ops.aten.avg_pool2d_backward(_channels_last(dy), out, [3], step, [1], False, True, None))
    else:
        window.average_grad(dy, out, 3, step)


def unit(spec: UnitSpec, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """Return the output of a unit, (B, K, OH, OW), channels-last.

    Args:
        spec: The unit.
        x: (B, C, H, W).
        shortcut: (B, K, OH, OW), or None for x itself and where the unit makes it.
    """
    x, shortcut = _channels_last(x), None if shortcut is None else _channels_last(shortcut)
    keep = wants_grad(x, shortcut, *spec.tensors)
    if not keep and spec.is_fixed:
        (out,) = spec.run("finished", partial(_finished_unit, spec), x, shortcut)
        assert out is not None
        return out
    result: Tensor = _UnitFunction.apply(spec, keep, x, shortcut, *spec.tensors)
    return result


def _stats(norm: Norm, x: Tensor) -> Tensor | None:
    """Return room for mean and variance, or None where the running ones are used."""
    return memory.small((2, x.shape[1]), x, norm_act.sums_dtype(x)) if norm.batch else None


def _cut(stats: Tensor | None, start: int, length: int) -> Tensor | None:
    return None if stats is None else stats.narrow(1, start, length)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _conv_grads(part: ConvNorm, need: list[bool], dy: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias, where they are needed."""
    weight = part.conv.weight_grad(dy, x, part.weight) if need[0] else None
    return weight, rows(dy).sum(0) if need[1] else None


def _laid_out(grad: Tensor | None, weight: Tensor) -> Tensor | None:
    """Return the gradient of a weight in memory as torch's operators leave it: contiguous if the weight is.

    What takes a gradient from `torch.autograd.grad` or a hook may count on that, torch's fused optimisers among them.
    """
    return grad.contiguous() if grad is not None and weight.is_contiguous() else grad


def _needed(grads: tuple[Tensor | None, Tensor | None], need: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))
