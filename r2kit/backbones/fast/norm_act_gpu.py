"""Kernel: what `norm_act` does, on a GPU, in Triton.

The same formulas as there, over the rows (pixels) and channels of channels-last memory. All four kernels are bound by
memory, so each value is read as seldom as the order of sums allows: once for the statistics and once for the output
forward; once for the two sums and once for dx backward. The activation is computed again each time.

Statistics of many rows: each program takes some rows and channels, keeps mean and sum of squared differences from it,
and merges one block of rows into them after the other (Chan et al. 1979: with d the difference of two means of n and m
values, mean += d m / (n + m), squares += squares' + d^2 n m / (n + m)); the programs' results are merged the same way.
So a large mean costs no digits, and there are no atomic additions, whose order would change from run to run.

float16 and bfloat16 are read and written; statistics, sums and everything between are float32 (float64 for float64).

Reference: `norm_act.plain`. Correctness is tested through Triton's interpreter (``TRITON_INTERPRET=1``), which runs on
a CPU. Benchmark, on a GPU: ``python -m r2kit.backbones.fast.norm_act_gpu``.
"""

# In Triton a capital letter marks what is known when a kernel is compiled.
# ruff: noqa: N803
# mypy: allow-untyped-defs

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2kit.backbones.fast import norm_act
from r2kit.backbones.fast.norm_act import ACTS, Norm

_ROWS_OF_A_PROGRAM = 512  # that it sums over
_ROWS = 32  # of a block
_VALUES = 4096  # of a block at most

_IDENTITY, _RELU, _MISH = (tl.constexpr(ACTS[name]) for name in ("identity", "relu", "mish"))


@triton.jit
def _act(z, beta, ACT: tl.constexpr):
    if ACT == _RELU:
        return tl.where(z < 0, 0.0, z)
    if ACT == _MISH:
        t = z * beta
        t = tl.where(t > 20, 20.0, t)
        t = tl.where(t < -87, -87.0, t)
        e = tl.exp(t)
        n = e * (e + 2)
        return z * (n / (n + 2))
    return z


@triton.jit
def _slope(z, beta, ACT: tl.constexpr):
    if ACT == _RELU:
        return tl.where(z > 0, 1.0, 0.0)
    if ACT == _MISH:
        t = z * beta
        t = tl.where(t > 20, 20.0, t)
        t = tl.where(t < -87, -87.0, t)
        e = tl.exp(t)
        n = e * (e + 2)
        r = 1.0 / (n + 2)
        return n * r + (t * 4) * (e * (e + 1)) * (r * r)
    return z * 0.0 + 1.0


@triton.jit
def _read(ptr, ld, r, c, inside, FLOAT: tl.constexpr):
    return tl.load(ptr + r.to(tl.int64)[:, None] * ld + c[None, :], mask=inside, other=0.0).to(FLOAT)


@triton.jit
def _write(ptr, ld, r, c, inside, value):
    tl.store(ptr + r.to(tl.int64)[:, None] * ld + c[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _moments(
    x, ldx, mean_out, squares_out, rows, chans, beta,
    ACT: tl.constexpr, FLOAT: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, CHANS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = tl.program_id(1) * CHANS + tl.arange(0, CHANS)
    count = tl.zeros([CHANS], FLOAT)
    mean = tl.zeros([CHANS], FLOAT)
    squares = tl.zeros([CHANS], FLOAT)
    for start in range(0, SHARE, ROWS):
        r = program * SHARE + start + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & (c < chans)[None, :]
        here = tl.sum(tl.where(inside, 1.0, 0.0).to(FLOAT), 0)
        value = _act(_read(x, ldx, r, c, inside, FLOAT), beta, ACT)
        share = 1.0 / tl.maximum(here, 1.0)
        block_mean = tl.sum(tl.where(inside, value, 0.0), 0) * share
        off = tl.where(inside, value - block_mean[None, :], 0.0)
        step = block_mean - mean
        total = tl.maximum(count + here, 1.0)
        squares += tl.sum(off * off, 0) + step * step * count * here / total
        mean += step * here / total
        count += here
    tl.store(mean_out + program * chans + c, mean, mask=c < chans)
    tl.store(squares_out + program * chans + c, squares, mask=c < chans)


@triton.jit
def _forward(
    x, ldx, scale, shift, res, ldres, add, ldadd, y, ldy, y2, ldy2, rows, chans, beta,
    ACT: tl.constexpr, FIRST: tl.constexpr, FLOAT: tl.constexpr, RES: tl.constexpr, Y: tl.constexpr, Y2: tl.constexpr,
    ROWS: tl.constexpr, CHANS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANS + tl.arange(0, CHANS)
    inside = (r < rows)[:, None] & (c < chans)[None, :]
    a = tl.load(scale + c, mask=c < chans, other=0.0)[None, :]
    b = tl.load(shift + c, mask=c < chans, other=0.0)[None, :]
    value = _read(x, ldx, r, c, inside, FLOAT)
    if FIRST:
        value = _act(value, beta, ACT) * a + b
    else:
        value = value * a + b
        if RES:
            value += _read(res, ldres, r, c, inside, FLOAT)
        value = _act(value, beta, ACT)
    if Y2:
        value2 = value + _read(add, ldadd, r, c, inside, FLOAT)
        _write(y2, ldy2, r, c, inside, value2)
    if Y:
        _write(y, ldy, r, c, inside, value)


@triton.jit
def _inner(
    x, ldx, mean, scale, shift, res, ldres, dy, lddy, add, ldadd, r, c, inside, chans, beta,
    ACT: tl.constexpr, FIRST: tl.constexpr, FLOAT: tl.constexpr, RES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The gradient at the normalisation's output, what is normalised minus its mean, and x."""
    value = _read(x, ldx, r, c, inside, FLOAT)
    d = _read(dy, lddy, r, c, inside, FLOAT)
    if ADD:
        d += _read(add, ldadd, r, c, inside, FLOAT)
    m = tl.load(mean + c, mask=c < chans, other=0.0)[None, :]
    if FIRST:
        centred = _act(value, beta, ACT) - m
    else:
        a = tl.load(scale + c, mask=c < chans, other=0.0)[None, :]
        b = tl.load(shift + c, mask=c < chans, other=0.0)[None, :]
        u = value * a + b
        if RES:
            u += _read(res, ldres, r, c, inside, FLOAT)
        d *= _slope(u, beta, ACT)
        centred = value - m
    return d, centred, value


@triton.jit
def _sums(
    x, ldx, mean, scale, shift, res, ldres, dy, lddy, add, ldadd, sum_out, product_out, rows, chans, beta,
    ACT: tl.constexpr, FIRST: tl.constexpr, FLOAT: tl.constexpr, RES: tl.constexpr, ADD: tl.constexpr,
    SHARE: tl.constexpr, ROWS: tl.constexpr, CHANS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = tl.program_id(1) * CHANS + tl.arange(0, CHANS)
    total = tl.zeros([CHANS], FLOAT)
    product = tl.zeros([CHANS], FLOAT)
    for start in range(0, SHARE, ROWS):
        r = program * SHARE + start + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & (c < chans)[None, :]
        d, centred, _ = _inner(
            x, ldx, mean, scale, shift, res, ldres, dy, lddy, add, ldadd, r, c, inside, chans, beta,
            ACT, FIRST, FLOAT, RES, ADD,
        )  # fmt: skip
        d = tl.where(inside, d, 0.0)
        total += tl.sum(d, 0)
        product += tl.sum(d * centred, 0)
    tl.store(sum_out + program * chans + c, total, mask=c < chans)
    tl.store(product_out + program * chans + c, product, mask=c < chans)


@triton.jit
def _backward(
    x, ldx, mean, scale, shift, offset, factor, res, ldres, dy, lddy, add, ldadd, dx, lddx, dres, lddres,
    rows, chans, beta,
    ACT: tl.constexpr, FIRST: tl.constexpr, FLOAT: tl.constexpr, RES: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, CHANS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANS + tl.arange(0, CHANS)
    inside = (r < rows)[:, None] & (c < chans)[None, :]
    d, centred, value = _inner(
        x, ldx, mean, scale, shift, res, ldres, dy, lddy, add, ldadd, r, c, inside, chans, beta,
        ACT, FIRST, FLOAT, RES, ADD,
    )  # fmt: skip
    a = tl.load(scale + c, mask=c < chans, other=0.0)[None, :]
    o = tl.load(offset + c, mask=c < chans, other=0.0)[None, :]
    f = tl.load(factor + c, mask=c < chans, other=0.0)[None, :]
    grad = a * (d - o - centred * f)
    if FIRST:
        grad *= _slope(value, beta, ACT)
    if RES:
        _write(dres, lddres, r, c, inside, d)
    _write(dx, lddx, r, c, inside, grad)


def forward(
    x: Tensor,
    norm: Norm,
    stats: Tensor | None,
    y: Tensor | None,
    *,
    res: Tensor | None = None,
    add: Tensor | None = None,
    y2: Tensor | None = None,
) -> None:
    """Do what `norm_act.forward` does, on a GPU; float16, bfloat16, float32 or float64."""
    rows, chans = x.shape
    constants: dict[str, Any] = {"ACT": ACTS[norm.act], "FLOAT": _float(x)}
    if norm.batch:
        assert stats is not None
        programs = triton.cdiv(rows, _ROWS_OF_A_PROGRAM)
        moments = stats.new_empty(2, programs, chans)
        constants_of_it = {**constants, "ACT": ACTS[norm.act if norm.act_first else "identity"]}
        _moments[(programs, triton.cdiv(chans, _width(chans)))](
            *(x, x.stride(0), moments[0], moments[1], rows, chans, norm.beta),
            **constants_of_it, SHARE=_ROWS_OF_A_PROGRAM, **_blocks(chans),
        )  # fmt: skip
        counts = torch.full((programs, 1), float(_ROWS_OF_A_PROGRAM), dtype=stats.dtype, device=x.device)
        counts[-1] = rows - (programs - 1) * _ROWS_OF_A_PROGRAM
        mean = (moments[0] * counts).sum(0) / rows
        var = (moments[1] + counts * (moments[0] - mean).square()).sum(0) / rows
        stats[0], stats[1] = mean, var
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_((var * (rows / (rows - 1))).to(norm.running_var.dtype), norm.momentum)
    _, scale, shift = _coefficients(norm, stats)
    _forward[_grid(rows, chans)](
        *_matrix(x), scale, shift, *_matrix(res), *_matrix(add), *_matrix(y), *_matrix(y2), rows, chans, norm.beta,
        FIRST=norm.act_first, RES=res is not None, Y=y is not None, Y2=y2 is not None, **constants, **_blocks(chans),
    )  # fmt: skip


def backward(
    x: Tensor,
    norm: Norm,
    stats: Tensor | None,
    dy: Tensor,
    dx: Tensor,
    *,
    add: Tensor | None = None,
    res: Tensor | None = None,
    dres: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `norm_act.backward` does, on a GPU."""
    rows, chans = x.shape
    mean, scale, shift = _coefficients(norm, stats)
    flags = {"ACT": ACTS[norm.act], "FIRST": norm.act_first, "FLOAT": _float(x)}
    flags |= {"RES": res is not None, "ADD": add is not None}
    programs = triton.cdiv(rows, _ROWS_OF_A_PROGRAM)
    parts = mean.new_empty(2, programs, chans)
    given = (*_matrix(res), *_matrix(dy), *_matrix(add))
    _sums[(programs, triton.cdiv(chans, _width(chans)))](
        *_matrix(x), mean, scale, shift, *given, parts[0], parts[1], rows, chans, norm.beta,
        **flags, SHARE=_ROWS_OF_A_PROGRAM, **_blocks(chans),
    )  # fmt: skip
    total, product = parts.sum(1)
    var = norm.running_var if stats is None else stats[1]
    assert var is not None
    rstd = torch.rsqrt(var.to(mean.dtype) + norm.eps)
    offset, factor = total / rows, product * rstd.square() / rows
    if not norm.batch:
        offset, factor = torch.zeros_like(offset), torch.zeros_like(factor)
    _backward[_grid(rows, chans)](
        *_matrix(x), mean, scale, shift, offset, factor, *given, *_matrix(dx), *_matrix(dres), rows, chans, norm.beta,
        **flags, **_blocks(chans),
    )  # fmt: skip
    kind = total.dtype if norm.weight is None else norm.weight.dtype
    found = (product * rstd).to(kind), total.to(kind)
    if sums is not None:
        sums.copy_(torch.stack(found))
    return found


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Return why the kernels cannot be used on a device, or None: they are tried there once, on a few rows."""
    # The caller may be at inference or under autocast.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        x = torch.linspace(-3, 3, 350, device=device).reshape(70, 5).clone()
        dy = x.cos()
        weight, bias = torch.ones(5, device=device), torch.zeros(5, device=device)
        norm = Norm("mish", 1.0, True, True, 1e-5, 0.1, weight, bias, None, None)
        leaf = x.clone().requires_grad_()
        expected = norm_act.plain(leaf, norm)
        (expected_dx,) = torch.autograd.grad(expected, leaf, dy)
        y, dx, stats = torch.empty_like(x), torch.empty_like(x), torch.empty(2, 5, device=device)
        try:
            forward(x, norm, stats, y)
            backward(x, norm, stats, dy, dx)
        except Exception as error:  # a compiler's errors have no common class
            said = str(error).splitlines()
            return f"the GPU kernels fail: {type(error).__name__}: {said[0] if said else ''}"
    if not (torch.allclose(y, expected, atol=1e-4) and torch.allclose(dx, expected_dx, atol=1e-4)):
        return "the GPU kernels give other numbers than torch's operators"
    return None


def _coefficients(norm: Norm, stats: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, scale and shift of each channel, in the type that sums have."""
    mean, var = (norm.running_mean, norm.running_var) if stats is None else (stats[0], stats[1])
    assert mean is not None
    assert var is not None
    kind = torch.float64 if mean.dtype == torch.float64 else torch.float32
    mean, scale = mean.to(kind), torch.rsqrt(var.to(kind) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach()
    return mean.contiguous(), scale.to(kind), shift.to(kind)


def _float(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _width(chans: int) -> int:
    """Channels of a block: all in one where they fit."""
    return min(128, triton.next_power_of_2(chans))


def _blocks(chans: int) -> dict[str, int]:
    return {"ROWS": min(_ROWS, _VALUES // _width(chans)), "CHANS": _width(chans)}


def _grid(rows: int, chans: int) -> tuple[int, int]:
    return triton.cdiv(rows, _blocks(chans)["ROWS"]), triton.cdiv(chans, _width(chans))


def _matrix(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if tensor is None else (tensor, tensor.stride(0))


def main(rows: int = 256 * 56 * 56, chans: int = 104, rounds: int = 10) -> None:
    """Print milliseconds of the kernels and of torch's operators, forward and backward, bfloat16, medians."""
    for act, act_first in (("mish", True), ("mish", False), ("relu", False)):
        ones, zeros = torch.ones(chans, device="cuda"), torch.zeros(chans, device="cuda")
        norm = Norm(act, 1.0, act_first, True, 1e-5, 0.1, ones, zeros, zeros.clone(), ones.clone())
        x, dy = torch.randn(2, rows, chans, device="cuda", dtype=torch.bfloat16)
        y, stats = torch.empty_like(x), torch.empty(2, chans, device="cuda")
        leaf = x.clone().requires_grad_()
        milliseconds: dict[str, list[float]] = {}
        for _ in range(rounds + 1):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
            marks[0].record()
            forward(x, norm, stats, y)
            marks[1].record()
            backward(x, norm, stats, dy, y)
            marks[2].record()
            out = norm_act.plain(leaf, norm)
            marks[3].record()
            out.backward(dy)
            marks[4].record()
            torch.cuda.synchronize()
            for i, name in enumerate(("forward", "backward", "plain forward", "plain backward")):
                milliseconds.setdefault(name, []).append(marks[i].elapsed_time(marks[i + 1]))
        line = ", ".join(f"{name} {statistics.median(found[1:]):.2f}" for name, found in milliseconds.items())
        print(f"{act}, {'act -> BN' if act_first else 'BN -> act'}, {rows} rows, {chans} channels, bf16, ms: {line}")


if __name__ == "__main__":
    main()
