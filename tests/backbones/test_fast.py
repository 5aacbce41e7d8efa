"""The fast form computes what the plain modules compute: outputs, every gradient, every buffer."""

import copy
import importlib
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.res2net import Bottle2neck
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torch.utils.checkpoint import checkpoint

import r2kit
from r2kit.backbones._res2 import Res2Block, Res2Net, StemSpec
from r2kit.backbones.fast import (
    direct,
    is_fast,
    native,
    norm_act,
    optimize_with_reason,
    plain,
    product,
    squares,
    weight_grad,
    winograd,
    winograd_grad,
)
from r2kit.backbones.fast.convolution import rows
from r2kit.backbones.fast.norm_act import Norm
from r2kit.backbones.fast.optimize import FastConv2d, FastRes2Block
from r2kit.backbones.fast.tile import finish
from r2kit.backbones.mish import MishBeta, mish_to_mish_beta

optimize = importlib.import_module("r2kit.backbones.fast.optimize")  # the package has a function of that name


def fast_copy(model):
    found = copy.deepcopy(model)
    assert optimize_with_reason(found).startswith("on: ")
    return found


def shake(model):
    """Give every norm statistics and weights that are not those it was made with."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def run(model, x, dtype, weight_of_output):
    """Output, gradients by name, buffers by name, of a copy of the model."""
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype).clone().requires_grad_()
    out = model(x)
    (out * weight_of_output(out)).sum().backward()
    grads = {"input": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}
    return {"output": out.detach(), **grads}, dict(model.named_buffers())


def weights(out):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def assert_same(model, x, *, single=True):
    """Equal in float64 to rounding; in float32 about as near to that as the plain modules are."""
    assert not is_fast(model)
    model = shake(model)
    exact, exact_buffers = run(model, x, torch.float64, weights)
    fast = fast_copy(model)
    found, buffers = run(fast, x, torch.float64, weights)
    largest = max(value.abs().max() for name, value in exact.items() if name != "output")
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name].shape == value.shape
        scale = value.abs().max() if name == "output" else largest
        assert (found[name] - value).abs().max() <= 1e-10 * scale, name
    for name, value in exact_buffers.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-10, atol=1e-12)
    if single:
        rough, _ = run(model, x, torch.float32, weights)
        found, buffers = run(fast, x, torch.float32, weights)
        for name, value in exact.items():
            scale = value.abs().max() if name == "output" else largest
            error, plain_error = ((it[name] - value).abs().max() / scale for it in (found, rough))
            assert error <= 4 * plain_error + 1e-5, (name, error, plain_error)
        for name, value in exact_buffers.items():
            torch.testing.assert_close(buffers[name].double(), value.double(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        ours = fast(x)
        torch.testing.assert_close(ours, model(x), rtol=1e-3, atol=1e-4)
    with torch.inference_mode():  # where every map is written once, with what stands behind its convolution
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            nets = (fast_copy(model), copy.deepcopy(model))
            ours, expected = (net.eval().to(dtype)(x.to(dtype)) for net in nets)
            assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


# --------------------------------------------------------------------------------------------------- the kernels


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


@pytest.mark.parametrize("chans", [200, 300, 600])
@pytest.mark.parametrize(("side", "stride"), [(5, 1), (9, 2), (40, 1)])
def test_wide_1x1_convolutions_with_few_and_many_rows(chans, side, stride):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(chans, 40, 1, stride, bias=False), nn.BatchNorm2d(40), nn.Mish())
    assert_same(net, torch.randn(1, chans, side, side).contiguous(memory_format=torch.channels_last))


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


def test_a_gpu_without_triton_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "r2kit.backbones.fast.norm_act_gpu", None)
    assert "Triton is not installed" in optimize._gpu_refusal(torch.device("cuda"))


# ----------------------------------------------------------------------------------------------------- the units


UNITS = {
    "plus": {"order": "act_norm", "act_layer": nn.Mish},
    "plus, biases": {"order": "act_norm", "act_layer": nn.Mish, "act_bias": True},
    "plus, annealed": {"order": "act_norm", "act_layer": MishBeta},
    "published": {"order": "norm_act", "conv1_order": "act_norm", "published_sum": True, "act_layer": nn.Mish},
    "v1": {},
    "eight splits": {"base_width": 14, "scale": 8},
    "two splits": {"scale": 2, "published_sum": True, "order": "act_norm", "act_layer": nn.Mish},
    "one split": {"scale": 1},
    "groups": {"base_width": 4, "cardinality": 8},
    "dilated": {"dilation": 2},
}
FIRST = {
    "strided": {"stride": 2},
    "projected": {},
    "grouped": {"stride": 2, "first_block": "grouped"},
}


def projection(inplanes, outplanes, stride, **_):
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("training", [True, False])
def test_unit(name, training):
    torch.manual_seed(0)
    unit = Res2Block(256, 64, **UNITS[name]).train(training)
    assert_same(unit, torch.randn(2, 256, 7, 5).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", ["plus", "published", "v1", "one split"])
def test_first_unit(name, first):
    torch.manual_seed(0)
    options = {**UNITS[name], **FIRST[first]}
    unit = Res2Block(48, 64, downsample=projection(48, 256, options.get("stride", 1)), **options)
    assert_same(unit, torch.randn(2, 48, 9, 7))


def test_one_image_and_memory_layouts():
    unit = Res2Block(256, 64, **UNITS["plus"])
    for layout in (torch.channels_last, torch.contiguous_format):
        assert_same(unit.to(memory_format=layout), torch.randn(1, 256, 5, 3).contiguous(memory_format=layout))


def test_units_of_timm():
    for block in (Bottle2neck, Bottleneck):
        torch.manual_seed(0)
        net = ResNet(block, (1, 2, 1, 1), channels=(64, 64, 64, 64), num_classes=3, stem_type="deep", stem_width=16)
        assert_same(net, torch.randn(3, 3, 33, 41))


def test_norm_that_stands_alone(monkeypatch):
    calls = []
    alone = optimize.functions.norm_alone
    monkeypatch.setattr(optimize.functions, "norm_alone", lambda *given: calls.append(1) or alone(*given))
    for affine, chans in ((True, 5), (False, 19)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, chans, 3), nn.MaxPool2d(2), nn.BatchNorm2d(chans, affine=affine))
        assert_same(net, torch.randn(1, 3, 9, 7).contiguous(memory_format=torch.channels_last))
    assert calls


def test_a_unit_makes_its_own_shortcut(monkeypatch):
    torch.manual_seed(0)
    fast = fast_copy(Res2Block(48, 64, downsample=projection(48, 256, 2), stride=2))
    monkeypatch.setattr(fast.downsample, "forward", None)  # it is not called
    assert fast(torch.randn(2, 48, 9, 7)).shape == (2, 256, 5, 4)


def test_whole_network_and_deep_stem():
    torch.manual_seed(0)
    stem = StemSpec(widths=(16, 16, 32), order="act_norm", act_bias=True)
    options = {"order": "act_norm", "act_bias": True, "act_layer": "mish", "avg_down": True}
    net = Res2Net((1, 1, 1, 2), stem=stem, channels=(32, 32, 32, 32), num_classes=3, **options)
    assert_same(net, torch.randn(4, 3, 70, 70))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["res2netplus50", "res2netplus50d", "res2netplus50_res2fg", "res2net50_26w_4s"])
def test_full_networks(name):
    assert_same(r2kit.create_model(name, num_classes=5), torch.randn(2, 3, 129, 97), single=False)


# -------------------------------------------------------------------------------------- it stays the plain network


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net = Res2Net((1, 2, 1, 1), order="act_norm", act_layer="mish", channels=(16,) * 4, num_classes=3, base_width=64)
    return shake(net)


def test_classes_change_and_nothing_else(small):
    fast = fast_copy(small)
    assert list(fast.state_dict()) == list(small.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in small.named_modules()]
    assert isinstance(fast.layer1[0], FastRes2Block)
    assert isinstance(fast.layer1[0], Res2Block)
    assert isinstance(fast.conv1, FastConv2d)
    assert [type(m) for m in plain(fast).modules()] == [type(m) for m in small.modules()]


def test_copies_and_files(small):
    fast = fast_copy(small).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = fast(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert is_fast(other)
            assert torch.equal(other(x), expected)
    other = copy.deepcopy(small).eval()
    other.load_state_dict(fast.state_dict())
    torch.testing.assert_close(other(x), expected)


def test_weights_may_change_between_calls(small):
    """Nothing is folded in advance, so that no write to a weight, not even through `.data`, goes unseen."""
    fast = fast_copy(small).eval()
    for module in fast.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.add_(0.1)
    other = plain(copy.deepcopy(fast))
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), other(x), rtol=1e-4, atol=1e-5)


def test_frozen_parts(small):
    net = copy.deepcopy(small)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("layer3" in name or "bn" in name)
    net.layer2.eval()
    x = torch.randn(2, 3, 33, 33)
    found, buffers = run(fast_copy(net), x, torch.float64, weights)
    expected, expected_buffers = run(net, x, torch.float64, weights)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    for name, value in expected_buffers.items():
        torch.testing.assert_close(buffers[name], value)


def test_two_runs_are_identical(small):
    fast = fast_copy(small)
    x = torch.randn(4, 3, 33, 33)
    first, second = (run(fast, x, torch.float32, weights)[0] for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_checkpointing(small):
    fast = fast_copy(small)
    expected, _ = run(fast, torch.ones(2, 3, 32, 32), torch.float64, weights)
    fast.set_grad_checkpointing(True)
    found, _ = run(fast, torch.ones(2, 3, 32, 32), torch.float64, weights)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    unit = fast_copy(small.layer1[0])
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    (direct,) = torch.autograd.grad(copy.deepcopy(unit)(x).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(unit, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(again, direct)


def test_a_changed_weight_is_noticed(small):
    fast = fast_copy(small)
    loss = fast(torch.randn(2, 3, 32, 32)).sum()
    with torch.no_grad():
        fast.layer1[0].conv1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_export_gives_the_plain_graph(small):
    x = torch.randn(2, 3, 32, 32)
    fast = fast_copy(small).eval()
    exported = torch.export.export(fast, (x,))
    assert any("mish" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), small.eval()(x), rtol=1e-4, atol=1e-5)
    small.train()


def test_hooks_on_parts_are_called(small):
    fast = fast_copy(small).eval()
    seen = []
    fast.layer1[0].convs[0].register_forward_hook(lambda *_: seen.append("called"))
    fast(torch.randn(1, 3, 32, 32))
    assert seen == ["called"]


def test_reduced_precision_is_left_to_torch(small):
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fast_copy(small)(x), copy.deepcopy(small)(x)
    assert torch.equal(found, expected)


def test_parts_of_another_kind_are_left_to_torch():
    x = torch.randn(2, 256, 8, 8)
    block = Res2Block(256, 64, drop_path=DropPath(0.5))
    for change in ("drop_path", "act", "norm", "momentum"):
        other = copy.deepcopy(block)
        if change == "act":
            other.act3 = nn.GELU()
        elif change == "norm":
            other.bn3 = nn.GroupNorm(2, 256)
        elif change == "momentum":
            other.bn1.momentum = None
        if change != "drop_path":
            other.drop_path = nn.Identity()
        torch.manual_seed(1)
        expected = copy.deepcopy(other)(x)
        torch.manual_seed(1)
        fast = fast_copy(other)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        assert fast.bn1.num_batches_tracked == 1


def test_one_value_a_channel_is_refused_as_before():
    unit = fast_copy(Res2Block(256, 64))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        unit(torch.randn(1, 256, 1, 1))
    assert unit.bn1.num_batches_tracked <= 1


def test_the_line_names_what_is_left():
    net = timm.create_model("resnest14d", num_classes=2)
    assert (
        optimize_with_reason(net)
        == "on: 0 fused units, 27 convolutions; as they were: 4 ResNestBottleneck, 4 SplitAttn"
    )
    assert optimize_with_reason(nn.Linear(2, 2)) == "off: the network has no convolution"


def test_without_a_compiler_it_stays_off(monkeypatch, small):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    native._compiler.cache_clear()
    net = copy.deepcopy(small)
    with pytest.warns(UserWarning, match=r"r2kit.optimize: off: no-such-compiler: .*No such file"):
        assert r2kit.optimize(net) is net
    assert not is_fast(net)
    monkeypatch.setenv("CXX", "false")
    assert optimize_with_reason(net) == "off: false failed: "
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert optimize_with_reason(net) == "off: no C++ compiler found (g++ or clang++)"
    native.load.cache_clear()
    native._compiler.cache_clear()


def test_compiled_once_for_all_processes(cache):
    native.load(norm_act.SOURCE)
    made = sorted((cache / "kernels").glob("*.so"))
    times = [path.stat().st_mtime_ns for path in made]
    native.load.cache_clear()
    native._compiler.cache_clear()
    native.load(norm_act.SOURCE)
    assert [path.stat().st_mtime_ns for path in sorted((cache / "kernels").iterdir())] == times


def test_annealing_goes_on_in_the_fast_form(small):
    net = copy.deepcopy(small)
    mish_to_mish_beta(net, 25.0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fast_copy(net.double())(x), net(x))


def test_mish_alone():
    for shape in ((2, 5, 3, 4), (1, 64, 9, 9), (7, 3)):
        x = torch.randn(shape)
        if len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Mish())
        assert optimize_with_reason(module).startswith("on: ")
        y, expected = module[1](x), nn.functional.mish(x)
        dy = torch.randn_like(y)
        torch.testing.assert_close(y, expected)
        (found,), (wanted,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
        torch.testing.assert_close(found, wanted)
