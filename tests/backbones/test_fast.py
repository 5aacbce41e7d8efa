"""The fast form computes what the plain modules compute: outputs, every gradient, every buffer."""

import copy
import importlib
import pickle
import sys

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
    is_fast,
    native,
    norm_act,
    optimize_with_reason,
    plain,
)
from r2kit.backbones.fast.optimize import FastConv2d, FastRes2Block
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
    assert_again(fast, x)
    with torch.inference_mode():  # where every map is written once, with what stands behind its convolution
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            nets = (fast_copy(model), copy.deepcopy(model))
            ours, expected = (net.eval().to(dtype)(x.to(dtype)) for net in nets)
            assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def assert_again(fast, x):
    """What was written down gives the very bits of what it was written from: in training and at inference."""
    fast, x = copy.deepcopy(fast).float(), x.float()
    found = []
    for _ in range(4):
        fast.zero_grad()
        given = x.clone().requires_grad_()
        out = fast(given)
        (out * weights(out)).sum().backward()
        found.append([out.detach(), given.grad, *(p.grad for p in fast.parameters())])
    modes = [module.training for module in fast.modules()]
    fast.eval()
    with torch.inference_mode():
        still = [fast(x) for _ in range(4)]
    for module, mode in zip(fast.modules(), modes, strict=True):
        module.training = mode
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    assert all(torch.equal(again, still[0]) for again in still[1:])


# ----------------------------------------------------------------------------------------------------- the units


@pytest.mark.parametrize("chans", [200, 300, 600])
@pytest.mark.parametrize(("side", "stride"), [(5, 1), (9, 2), (40, 1)])
def test_wide_1x1_convolutions_with_few_and_many_rows(chans, side, stride):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(chans, 40, 1, stride, bias=False), nn.BatchNorm2d(40), nn.Mish())
    assert_same(net, torch.randn(1, chans, side, side).contiguous(memory_format=torch.channels_last))


def test_a_gpu_without_triton_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "r2kit.backbones.fast.norm_act_gpu", None)
    assert "Triton is not installed" in optimize._gpu_refusal(torch.device("cuda"))


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


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.Mish(), MishBeta(1.5), nn.SiLU()])
@pytest.mark.parametrize("behind", [[], [nn.MaxPool2d(2)], [nn.BatchNorm2d(20)]])
def test_an_activation_behind_a_convolution(act, behind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(17, 20, 3, padding=1), act, *behind, nn.Conv2d(20, 5, 1))
    assert_same(net, torch.randn(3, 17, 9, 7))


def test_an_activation_is_written_with_the_sums(monkeypatch):
    fast = fast_copy(nn.Sequential(nn.Conv2d(17, 20, 3), nn.Mish())).eval()
    monkeypatch.setattr(fast[1], "forward", None)  # it is not called
    with torch.inference_mode():
        assert fast(torch.randn(2, 17, 9, 7)).shape == (2, 20, 7, 5)


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
