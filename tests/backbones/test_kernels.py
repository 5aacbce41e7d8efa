"""The kernels of the fast form: every output and gradient is that of torch's operators in float64."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from r2kit.backbones.fast import (
    direct,
    norm_act,
    product,
    squares,
    weight_grad,
    winograd,
    winograd_grad,
)
from r2kit.backbones.fast.convolution import rows
from r2kit.backbones.fast.norm_act import Norm
from r2kit.backbones.fast.tile import finish


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("act", list(norm_act.ACTS))
@pytest.mark.parametrize(("act_first", "residual"), [(True, False), (False, False), (False, True)])
def test_norm_act_kernel(dtype, act, act_first, residual):
    for (count, chans), batch in itertools.product(
        ((1, 5), (7, 3), (3, 1), (65, 8), (130, 26), (67, 33)), (True, False)
    ):
        if batch and count == 1:
            continue
        x = (torch.randn(count, chans + 4, dtype=dtype) * 3 + 2)[:, 2 : 2 + chans]  # some channels of a wider tensor
        weight, bias, mean = torch.randn(3, chans, dtype=dtype)
        var = torch.rand(chans, dtype=dtype) + 0.5
        res = torch.randn(count, chans, dtype=dtype) if residual else None
        leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias, res)]
        theirs = Norm(act, 1.5, act_first, batch, 1e-5, 0.1, leaves[1], leaves[2], mean.clone(), var.clone())
        expected = norm_act.plain(leaves[0], theirs, leaves[3])
        dy, more = torch.randn(2, count, chans, dtype=dtype)
        expected.backward(dy + more)

        norm = Norm(act, 1.5, act_first, batch, 1e-5, 0.1, weight, bias, mean, var)
        stats = torch.empty(2, chans, dtype=dtype) if batch else None
        y, y2, dres = (torch.empty(count, chans, dtype=dtype) for _ in range(3))
        norm_act.forward(x, norm, stats, y, res=res, add=more, y2=y2)
        dx = dy.clone()  # the gradient may be written over what it is made from
        found = norm_act.backward(x, norm, stats, dx, dx, add=more, res=res, dres=dres if residual else None)
        again = x.clone()
        norm_act.forward(again, norm.fixed(stats), None, again, res=res)
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        pairs = [(y, expected), (y2, expected + more), (again, expected), (dx, leaves[0].grad)]
        pairs += [(found[0], leaves[1].grad), (found[1], leaves[2].grad)]
        pairs += [(mean, theirs.running_mean), (var, theirs.running_var)]
        if residual:
            pairs.append((dres, leaves[3].grad))
        for ours, wanted in pairs:
            torch.testing.assert_close(ours, wanted.detach(), **tolerance)


def test_norm_act_statistics_survive_a_large_mean():
    x = torch.randn(4096, 9) * 0.1 + 1000
    stats = torch.empty(2, 9)
    norm = Norm("identity", 1.0, False, True, 1e-5, 0.1, None, None, None, None)
    norm_act.forward(x, norm, stats, torch.empty_like(x))
    torch.testing.assert_close(stats[1].double(), x.double().var(0, correction=0), rtol=1e-4, atol=0)


def test_mish_at_its_ends():
    x = torch.tensor([[-1e4, -90.0, -88.0, -20.0, -1.0, 0.0, 1.0, 19.9, 20.1, 90.0, 1e4]])
    y = torch.empty_like(x)
    zeros, ones = torch.zeros(11), torch.ones(11)
    norm = Norm("mish", 1.0, True, False, 0.0, 0.1, None, None, zeros, ones)
    norm_act.forward(x, norm, None, y)
    torch.testing.assert_close(y, nn.functional.mish(x), rtol=5e-7, atol=1e-30)
    norm_act.forward(x * float("nan"), norm, None, y)
    assert y.isnan().all()


@pytest.mark.parametrize(
    ("batch", "chans", "out_chans", "height", "width", "kernel", "stride", "pad", "dilation"),
    [
        (2, 26, 26, 9, 7, (3, 3), 1, 1, 1),
        (3, 16, 5, 8, 5, (3, 3), 2, 1, 1),
        (1, 19, 17, 3, 3, (3, 3), 1, 2, 2),
        (130, 33, 7, 2, 1, (3, 3), 1, 1, 1),
        (2, 64, 12, 20, 21, (5, 3), 1, 2, 1),
        (5, 17, 13, 1, 1, (3, 3), 1, 1, 1),
    ],
)
def test_weight_grad_kernel(batch, chans, out_chans, height, width, kernel, stride, pad, dilation):
    x = torch.randn(batch, chans + 9, height, width).contiguous(memory_format=torch.channels_last)[:, 4 : 4 + chans]
    weight = torch.empty(out_chans, chans, *kernel)
    out = torch.conv2d(x, weight, None, stride, pad, dilation)
    dy = torch.randn(batch, out_chans + 3, *out.shape[2:]).contiguous(memory_format=torch.channels_last)[:, 1:-2]
    found = weight_grad.weight_grad(x, dy, kernel, stride, pad, dilation)
    expected = weight_grad.plain(x.double(), dy.double(), kernel, stride, pad, dilation)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("batch", "chans", "out_chans", "height", "width", "pad"),
    [
        *((2, 26, 26, 9, 7, 1), (1, 16, 5, 8, 5, 0), (3, 19, 40, 4, 4, 1), (33, 33, 17, 2, 3, 1), (2, 64, 16, 5, 5, 2)),
        *((2, 17, 33, 5, 6, 1), (1, 16, 500, 3, 7, 1), (5, 16, 499, 2, 2, 1)),  # few squares and many channels
    ],
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_winograd_kernel(dtype, batch, chans, out_chans, height, width, pad, layout):
    x = torch.randn(batch, chans + 9, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = x[:, 4 : 4 + chans]
    weight = torch.randn(out_chans, chans, 3, 3, dtype=dtype).contiguous(memory_format=layout)
    exact = torch.conv2d(x.double(), weight.double(), None, 1, pad)
    size = tuple(exact.shape[2:])
    out = torch.full_like(exact, float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    winograd.convolve(x, weight, size, (pad, pad), finish(rows(out)))
    # squares of 4 x 4 outputs round up to 2.5e-6 in float32, those of 2 x 2 and the direct sum up to 1e-6
    tolerance = 1e-13 if dtype == torch.float64 else 5e-6
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()
    # the same kernel turned is the transposed convolution
    back = torch.full((batch, out_chans, *size), float("nan"), dtype=dtype)
    back = back.contiguous(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv_transpose2d(x.double(), weight.transpose(0, 1).double(), None, 1, 2 - pad)
    winograd.convolve(x, weight.transpose(0, 1), size, (pad, pad), finish(rows(back)), turned=True)
    assert (back - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize(
    ("size", "expected"), [((2, 2), 2), ((3, 3), 4), ((4, 4), 4), ((5, 5), 2), ((6, 6), 2), ((7, 7), 4), ((2, 9), 2)]
)
def test_squares_are_those_with_fewer_products(size, expected):
    assert squares.square_side(size) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("batch", "chans", "out_chans", "height", "width", "pad"),
    [(2, 26, 26, 9, 7, 1), (1, 16, 16, 8, 5, 0), (3, 19, 40, 4, 4, 1), (33, 33, 17, 3, 3, 1), (9, 64, 16, 15, 17, 2)],
)
def test_winograd_weight_grad_kernel(dtype, batch, chans, out_chans, height, width, pad):
    x = torch.randn(batch, chans + 9, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = x[:, 4 : 4 + chans]
    sums = torch.conv2d(x, torch.zeros(out_chans, chans, 3, 3, dtype=dtype), None, 1, pad)
    dy = torch.randn(batch, out_chans + 3, *sums.shape[2:], dtype=dtype).contiguous(memory_format=torch.channels_last)
    dy = dy[:, 1:-2]
    found = winograd_grad.weight_grad(x, dy, (pad, pad))
    exact = weight_grad.plain(x.double(), dy.double(), (3, 3), 1, pad, 1)
    tolerance = 1e-13 if dtype == torch.float64 else 5e-6
    assert (found - exact).abs().max() <= tolerance * exact.abs().max()
    assert torch.equal(found, winograd_grad.weight_grad(x, dy, (pad, pad)))


@pytest.mark.parametrize("threads", [1, 3])
def test_weights_do_not_depend_on_the_number_of_threads(threads):
    x, dy = (part.contiguous(memory_format=torch.channels_last) for part in torch.randn(2, 8, 20, 16, 16))
    before, expected = torch.get_num_threads(), winograd_grad.weight_grad(x, dy, (1, 1))
    torch.set_num_threads(threads)
    try:
        assert torch.equal(winograd_grad.weight_grad(x, dy, (1, 1)), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("batch", "chans", "out_chans", "height", "width", "kernel", "stride", "pad"),
    [
        *((2, 26, 26, 9, 7, 1, (1, 1), 0), (1, 3, 5, 1, 1, 1, (1, 1), 0), (3, 19, 40, 5, 4, 1, (2, 2), 0)),
        *((8, 7, 50, 13, 11, 1, (2, 1), 0), (2, 26, 26, 9, 7, 3, (2, 2), 1), (3, 19, 40, 4, 5, 3, (2, 2), 1)),
        *((1, 16, 16, 8, 5, 3, (3, 3), 0), (33, 33, 67, 7, 6, 3, (2, 2), 0), (1, 16, 16, 1, 1, 3, (2, 2), 1)),
        *((2, 16, 17, 2, 1, 3, (2, 2), 2), (1, 16, 16, 9, 9, 3, (4, 4), 1), (9, 20, 33, 31, 17, 3, (2, 3), 1)),
        (2, 5, 6, 9, 8, 5, (2, 1), 2),
    ],
)
def test_direct_kernel(dtype, batch, chans, out_chans, height, width, kernel, stride, pad):
    x = torch.randn(batch, chans + 9, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = x[:, 4 : 4 + chans]
    weight = torch.randn(out_chans, chans, kernel, kernel, dtype=dtype)
    exact = torch.conv2d(x.double(), weight.double(), None, stride, pad)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    out = torch.full_like(exact, float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    direct.convolve(x, weight, tuple(exact.shape[2:]), stride, (pad, pad), finish(rows(out)))
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()
    dy = torch.randn(batch, out_chans + 3, *exact.shape[2:], dtype=dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)[:, 1:-2]
    mask = (True, False, False)
    exact = torch.ops.aten.convolution_backward(
        *(dy.double(), x.double(), weight.double(), None, stride, (pad, pad), (1, 1), False, (0, 0), 1, mask)
    )[0]
    dx = torch.full((batch, chans, height, width), float("nan"), dtype=dtype)
    dx = dx.contiguous(memory_format=torch.channels_last)
    direct.convolve(dy, weight, (height, width), stride, (pad, pad), finish(rows(dx)), back=True)
    assert (dx - exact).abs().max() <= tolerance * exact.abs().max()
    direct.convolve(dy, weight, (height, width), stride, (pad, pad), finish(rows(dx)), back=True, adds=True)
    assert (dx - 2 * exact).abs().max() <= 2 * tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("batch", "chans", "out_chans", "height", "width"),
    [(1, 1, 1, 1, 1), (2, 300, 7, 3, 5), (9, 513, 101, 5, 3), (3, 1030, 203, 9, 10), (5, 33, 97, 16, 16)],
)
def test_product_kernel(dtype, threads, batch, chans, out_chans, height, width):
    x = torch.randn(batch, chans + 9, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = x[:, 4 : 4 + chans]
    weight = torch.randn(out_chans, chans, 1, 1, dtype=dtype)
    exact = torch.conv2d(x.double(), weight.double())
    out = torch.full_like(exact, float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product.convolve(x, weight, finish(rows(out)))
    finally:
        torch.set_num_threads(before)
    assert (out - exact).abs().max() <= (1e-13 if dtype == torch.float64 else 2e-6) * exact.abs().max()


@pytest.mark.parametrize("act", list(norm_act.ACTS))
@pytest.mark.parametrize(("act_first", "residual"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("chans", [3, 17, 26])
def test_what_stands_behind_a_convolution(act, act_first, residual, chans):
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    conv = torch.randn(chans, 16, 3, 3)
    weight, bias, mean, offset = torch.randn(4, chans)
    norm = Norm(act, 1.5, act_first, False, 1e-5, 0.1, weight, bias, mean, torch.rand(chans) + 0.5)
    res, more = torch.randn(2, 70, chans)
    y, y2 = torch.empty(2, 70, chans)
    end = finish(y, offset, norm, res=res if residual else None, add=more, y2=y2)
    winograd.convolve(x, conv, (5, 7), (1, 1), end)
    sums = torch.conv2d(x, conv, offset, 1, 1).permute(0, 2, 3, 1).reshape(70, chans)
    expected = norm_act.plain(sums, norm, res if residual else None)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y2, expected + more, rtol=1e-4, atol=1e-4)


def test_gpu_kernels_through_the_interpreter():
    pytest.importorskip("triton", reason="the GPU kernels need Triton")
    script = Path(__file__).with_name("norm_act_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["same"], done.stderr
