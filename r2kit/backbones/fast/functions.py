"""The fast units as autograd functions: a convolution, a convolution with its norm, a whole Res2 or bottleneck unit.

Each keeps for its backward pass what a convolution read and what it wrote, and computes everything between the two
again; the plain modules keep the input of each activation, each normalisation and each addition too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from r2kit.backbones.fast import memory, norm_act
from r2kit.backbones.fast.convolution import Conv, room, rows
from r2kit.backbones.fast.norm_act import Norm


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
    """

    first: ConvNorm
    inner: tuple[ConvNorm, ...]
    last: ConvNorm
    chained: bool
    passes_last: bool
    pool: tuple[int, int] | None
    published_sum: bool
    side: ConvNorm | None

    @property
    def parts(self) -> tuple[ConvNorm, ...]:
        """Every convolution in its order."""
        return (self.first, *self.inner, self.last, *(() if self.side is None else (self.side,)))


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
        return None, None, dx, *_conv_grads(part, need, dy, x), *_needed(dnorm, need[2:])


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
        if not keep and not any(part.norm is not None and part.norm.batch for part in spec.parts):
            return _finished_unit(spec, x, shortcut)
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
                cat[:, used:].copy_(torch.nn.functional.avg_pool2d(tail, 3, spec.pool, 1))

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
        if keep:
            ctx.spec, ctx.width = spec, width
            ctx.save_for_backward(x, shortcut, side_out, side_stats, h, cat, o, *conv_outs, *stats, *tensors)
        return out4

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        spec: UnitSpec = ctx.spec
        width: int = ctx.width
        count = len(spec.inner)
        used = width * count
        x, shortcut, side_out, side_stats, h, cat, o, *rest = ctx.saved_tensors
        conv_outs, (stats1, *inner_stats, stats3) = rest[:count], rest[count : 2 * count + 2]
        need_x, need_shortcut, *needs = ctx.needs_input_grad[2:]
        need = [needs[i : i + 4] for i in range(0, len(needs), 4)]
        first, last = spec.first, spec.last
        assert first.norm is not None
        assert last.norm is not None

        own = shortcut is None  # the identity: both gradients are of one tensor
        dres, do = memory.empty_like(o), memory.empty_like(o)
        dnorm = norm_act.backward(
            *(rows(o), last.norm, stats3, rows(_channels_last(dout)), rows(do)),
            res=rows(x if own else shortcut),
            dres=rows(dres),
        )
        dcat = last.conv.input_grad(do, cat, last.weight)
        wanted = need[count + 1]
        grads_last = [*_conv_grads(last, wanted, do, cat), *_needed(dnorm, wanted[2:])]
        del do
        if spec.side is not None:
            assert spec.side.norm is not None
            # dres becomes the gradient of what the side's convolution wrote
            dnorm = norm_act.backward(rows(side_out), spec.side.norm, side_stats, rows(dres), rows(dres))
            grads_last += [*_conv_grads(spec.side, need[-1], dres, x), *_needed(dnorm, need[-1][2:])]

        dh, h_rows, dcat_rows = memory.empty_like(h), rows(h), rows(dcat)
        dh_rows = rows(dh)
        dnorm1 = torch.empty(2, h.shape[1], dtype=norm_act.sums_dtype(h), device=h.device)

        def close(start: int, length: int, dy: Tensor) -> None:
            """Take the gradient of some splits back through the first norm."""
            cut = (first.norm.narrow(start, length), _cut(stats1, start, length))  # type: ignore[union-attr]
            read, written = (part.narrow(1, start, length) for part in (h_rows, dh_rows))
            dnorm1.narrow(1, start, length).copy_(torch.stack(norm_act.backward(read, *cut, dy, written)))

        if spec.passes_last:
            dlast = dcat[:, used:]
            if spec.pool is not None:
                like = torch.empty_like(h[:, used:], memory_format=torch.channels_last)
                dlast = torch.ops.aten.avg_pool2d_backward(
                    dlast.contiguous(memory_format=torch.channels_last), like, [3], spec.pool, [1], False, True, None
                )
            close(used, width, rows(_channels_last(dlast)))

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
        return (None, None, dx, dres if need_shortcut and not own else None, *grads_first, *grads_inner, *grads_last)


def _read_again(spec: UnitSpec, h: Tensor, cat: Tensor, stats: Tensor | None, width: int) -> list[Tensor]:
    """Return what each inner convolution read: the splits behind the first norm, with what was added to them."""
    assert spec.first.norm is not None
    used = width * len(spec.inner)
    z, h_rows = room(h, used, (h.shape[2], h.shape[3])), rows(h)
    z_rows = rows(z)
    known = int(spec.published_sum) if spec.chained else 0  # the first sum of all stands in the concatenation
    added = (1 + known) * width if spec.chained else used  # from here on a split has the one before it added

    def again(start: int, end: int, add_from: int | None = None) -> None:
        if start < end:
            norm = spec.first.norm.narrow(start, end - start).fixed(_cut(stats, start, end - start))  # type: ignore[union-attr]
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


def _finished_unit(spec: UnitSpec, x: Tensor, shortcut: Tensor | None) -> Tensor:
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
    z = h[:, :width]
    for i, part in enumerate(spec.inner):
        out = rows(cat)[:, i * width : (i + 1) * width]
        following = h[:, (i + 1) * width : (i + 2) * width]
        if spec.chained and i + 1 < len(spec.inner):
            published = spec.published_sum and i == 0
            chained = cat[:, :width] if published else room(h, width, size)
            finished(part, z, y=None if published else out, add=rows(following), y2=rows(chained))
            z = chained
        else:
            finished(part, z, y=out)
            z = following
    if spec.passes_last:
        tail = h[:, used:]
        cat[:, used:].copy_(tail if spec.pool is None else torch.nn.functional.avg_pool2d(tail, 3, spec.pool, 1))
    if spec.side is not None:
        shortcut = finished(spec.side, x)
    found = finished(spec.last, cat, res=rows(x if shortcut is None else shortcut))
    assert found is not None
    return found


def unit(spec: UnitSpec, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """Return the output of a unit, (B, K, OH, OW), channels-last.

    Args:
        spec: The unit.
        x: (B, C, H, W).
        shortcut: (B, K, OH, OW), or None for x itself and where the unit makes it.
    """
    tensors = tensors_of(spec.parts)
    shortcut = None if shortcut is None else _channels_last(shortcut)
    keep = wants_grad(x, shortcut, *tensors)
    result: Tensor = _UnitFunction.apply(spec, keep, _channels_last(x), shortcut, *tensors)
    return result


def _stats(norm: Norm, x: Tensor) -> Tensor | None:
    """Return room for mean and variance, or None where the running ones are used."""
    return torch.empty(2, x.shape[1], dtype=norm_act.sums_dtype(x), device=x.device) if norm.batch else None


def _cut(stats: Tensor | None, start: int, length: int) -> Tensor | None:
    return None if stats is None else stats.narrow(1, start, length)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _conv_grads(part: ConvNorm, need: list[bool], dy: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias, where they are needed."""
    weight = part.conv.weight_grad(dy, x, part.weight) if need[0] else None
    return weight, rows(dy).sum(0) if need[1] else None


def _needed(grads: tuple[Tensor | None, Tensor | None], need: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))
