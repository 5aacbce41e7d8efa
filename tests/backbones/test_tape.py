"""What a unit calls is written down and made again only where that gives the same."""

import copy
import gc
import importlib
import itertools
import random
import threading
import weakref

import numpy as np
import pytest
import torch
from timm.models.res2net import Bottle2neck
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import avg_pool2d

from r2kit.backbones._res2 import Res2Block
from r2kit.backbones.fast import known, memory, native, norm_act, optimize_with_reason, plain, tape, window
from r2kit.backbones.fast.tape import Tapes, _lay_out
from r2kit.backbones.mish import MishBeta

optimize = importlib.import_module("r2kit.backbones.fast.optimize")


@pytest.fixture
def fast():
    torch.manual_seed(0)
    block = Res2Block(64, 16, base_width=68, order="act_norm", act_layer=MishBeta)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    assert optimize_with_reason(block).startswith("on: ")
    return block.to(memory_format=torch.channels_last)


def images(batch=2, side=9):
    return torch.randn(batch, 64, side, side).contiguous(memory_format=torch.channels_last)


def played(fast):
    """How many tapes a unit has."""
    states = known._KNOWN[fast].states.values() if fast in known._KNOWN else ()
    return sum(isinstance(found, tape.Tape) for state in states for found in state.spec.tapes._found.values())


def train(fast, x):
    fast.zero_grad()
    x = x.clone().requires_grad_()
    out = fast(x)
    (out * out.detach().cos()).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in fast.parameters())]


def warm(fast, x):
    for _ in range(3):
        train(fast, x)
    fast.eval()
    with torch.no_grad():
        for _ in range(3):
            fast(x)
    fast.train()


def assert_trained_alike(fast, other, x):
    pairs = list(zip(train(fast, x), train(other, x), strict=True))
    largest = max(float(expected.abs().max()) for _, expected in pairs if expected is not None)
    for found, expected in pairs:
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * largest)


def assert_as_plain(fast, x):
    other = plain(copy.deepcopy(fast))
    with torch.no_grad():
        for net in (fast, other):
            net.eval()
        torch.testing.assert_close(fast(x), other(x), rtol=1e-4, atol=1e-4)
        for net in (fast, other):
            net.train()
    assert_trained_alike(fast, other, x)
    for found, expected in zip(fast.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def replaced(fast):
    fast.conv1.weight = nn.Parameter(torch.randn_like(fast.conv1.weight) * 0.1)


def moved(fast):
    fast.conv3.weight.data = torch.randn_like(fast.conv3.weight) * 0.1


def shared(fast):
    """Another parameter in the same memory: gradients belong to it."""
    fast.convs[0].weight = nn.Parameter(fast.convs[0].weight.data)


def sharper(fast):
    for module in fast.modules():
        if isinstance(module, MishBeta):
            module.set_beta(3.0)


def other_activation(fast):
    fast.acts[1] = nn.ReLU()


def other_eps(fast):
    fast.bns[0].eps = 0.5


def other_momentum(fast):
    fast.bn1.momentum = 0.7


def one_frozen(fast):
    fast.convs[1].weight.requires_grad_(False)


def one_norm_fixed(fast):
    fast.bns[1].eval()


def other_layout(fast):
    fast.to(memory_format=torch.contiguous_format)


def loaded(fast):
    fast.load_state_dict({name: value * 1.1 for name, value in fast.state_dict().items()})


def dropped(fast):
    fast.drop_path = nn.Dropout(0.0)


CHANGES = (
    *(replaced, moved, shared, sharper, other_activation, other_eps, other_momentum, one_frozen),
    *(one_norm_fixed, other_layout, loaded, dropped),
)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_noticed(fast, change):
    x = images()
    warm(fast, x)
    assert played(fast) == 3  # forward, backward, inference
    change(fast)
    if change is one_norm_fixed:
        for _ in range(4):
            assert_trained_alike(fast, plain(copy.deepcopy(fast)), x)
    for _ in range(4):
        assert_as_plain(fast, x)


def test_a_new_hook_is_called(fast):
    x, heard = images(), []
    warm(fast, x)
    fast.conv1.register_forward_hook(lambda *_: heard.append(1))
    train(fast, x)
    assert heard


def test_sizes_layouts_and_threads(fast):
    for _ in range(4):
        for batch, side in ((2, 9), (1, 9), (3, 4), (1, 1), (2, 1)):
            if batch * side > 1:
                assert_as_plain(fast, images(batch, side))
        assert_as_plain(fast, torch.randn(2, 64, 9, 9))
        assert_as_plain(fast, images(2, 12)[:, :, :9, 1:10])
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for _ in range(3):
                assert_as_plain(fast, images())
    finally:
        torch.set_num_threads(before)


def test_many_sizes_do_not_fill_the_memory(fast):
    fast.eval()
    with torch.no_grad():
        for side in range(2, 60):
            for _ in range(3):
                fast(images(1, side))
    (state,) = known._KNOWN[fast].states.values()
    assert len(state.spec.tapes._found) <= tape._MOST


def test_float64(fast):
    fast.double()
    warm(fast, images().double())
    assert played(fast) == 2  # backward torch takes a product
    assert_as_plain(fast, images().double())


def test_outputs_are_the_callers_own(fast):
    x = images()
    warm(fast, x)
    fast.eval()
    with torch.no_grad():
        first = fast(x)
        kept = first.clone()
        second = fast(images())
        assert torch.equal(first, kept)
        second.add_(1)
        assert torch.equal(fast(x), kept)


def test_gradients_may_be_taken_twice_and_added_up(fast):
    x = images()
    warm(fast, x)
    x = x.requires_grad_()
    out = fast(x)
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(first, second)
    once = [p.grad.clone() for p in fast.parameters()]
    fast(x).square().sum().backward()
    more = [p.grad.clone() for p in fast.parameters()]
    fast(x).square().sum().backward()
    for a, b, p in zip(once, more, fast.parameters(), strict=True):
        torch.testing.assert_close(p.grad - b, b - a, rtol=1e-4, atol=1e-4 * float((b - a).abs().max()))


def test_two_threads_play_at_once(fast):
    x = [images() for _ in range(2)]
    warm(fast, x[0])
    fast.eval()
    with torch.no_grad():
        expected = [fast(one) for one in x]
    wrong = []

    def go(one, wanted):
        with torch.no_grad():
            wrong.extend(1 for _ in range(100) if not torch.equal(fast(one), wanted))

    threads = [threading.Thread(target=go, args=pair) for pair in zip(x, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_unit_that_is_gone_leaves_nothing(fast):
    unit = copy.deepcopy(fast)
    warm(unit, images())
    weight = weakref.ref(unit.conv1.weight)
    assert unit in known._KNOWN
    del unit
    gc.collect()
    assert weight() is None


def test_a_weight_that_got_other_memory_before_the_gradient(fast):
    x = images()
    warm(fast, x)
    other = plain(copy.deepcopy(fast))
    losses = [net(x).square().mean() for net in (fast, other)]
    for net, loss in zip((fast, other), losses, strict=True):
        net.zero_grad()
        for parameter in net.parameters():
            parameter.data = parameter.data.clone()
        loss.backward()
    for found, expected in zip(fast.parameters(), other.parameters(), strict=True):
        largest = float(expected.grad.abs().max())
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-3 * largest + 1e-7)


def test_whatever_the_default_device_is(fast):
    x = images()
    expected = train(fast, x)
    with torch.device("meta"):
        for _ in range(3):
            found = train(fast, x)
    assert played(fast) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def numpy_eps(fast, value):
    fast.bns[0].eps = np.float64(value)


def numpy_momentum(fast, value):
    fast.bn1.momentum = np.float64(value)


def listed_padding(fast, value):
    fast.convs[0].padding = fast.convs[0].dilation = [1 + round(value)] * 2


def plain_attribute(fast, value):
    weight = fast.conv1.weight.detach()
    if "weight" in fast.conv1._parameters:
        del fast.conv1.weight
    fast.conv1.weight = weight * (0.5 + value)


@pytest.mark.parametrize("change", [numpy_eps, numpy_momentum, listed_padding, plain_attribute])
def test_what_nobody_knows_the_meaning_of_is_looked_at_each_time(fast, change):
    x = images()
    warm(fast, x)
    for value in (0.1, 0.1, 0.1, 0.9, 0.9):
        change(fast, value)
        assert_as_plain(fast, x)


def test_a_narrower_unit_in_the_same_memory():
    torch.manual_seed(0)
    fast = Res2Block(64, 16, base_width=272, scale=1, act_layer=nn.Mish).to(memory_format=torch.channels_last)
    optimize_with_reason(fast)
    warm(fast, images())
    assert played(fast) == 3
    with torch.no_grad():
        fast.conv1.weight.data = fast.conv1.weight.data[:34]
        fast.convs[0].weight.data = fast.convs[0].weight.data[:34, :34]
        fast.conv3.weight.data = fast.conv3.weight.data[:, :34]
        for bn in (fast.bn1, fast.bns[0]):
            for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
                tensor.data = tensor.data[:34]
    for _ in range(4):
        assert_as_plain(fast, images())


def test_a_function_in_place_of_a_part():
    torch.manual_seed(0)
    fast = Bottle2neck(64, 16, base_width=68, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d).to(
        memory_format=torch.channels_last
    )
    optimize_with_reason(fast)
    warm(fast, images())
    assert played(fast) == 3
    fast.se = lambda x: x * 0
    assert_as_plain(fast, images())


def test_gradients_lie_in_memory_as_torch_leaves_them(fast):
    fast.to(memory_format=torch.contiguous_format)
    for _ in range(4):
        grads = torch.autograd.grad(fast(images()).square().sum(), list(fast.parameters()))
        assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch uses what it calls out of date
def test_tangents(fast):
    fast.eval().requires_grad_(False)
    x, direction = images(), images()
    other = plain(copy.deepcopy(fast))
    with torch.no_grad():
        for _ in range(3):
            fast(x)
    with forward_ad.dual_level():
        found, expected = (forward_ad.unpack_dual(net(forward_ad.make_dual(x, direction))) for net in (fast, other))
    torch.testing.assert_close(found.tangent, expected.tangent)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_odd_parts_are_no_obstacle(fast):
    fast.note = ([1], 2)
    fast.se = nn.LazyBatchNorm2d()
    fast.eval()
    assert fast(images()).shape == (2, 64, 9, 9)
    fast.se = torch.jit.trace(nn.Identity(), images())
    assert fast(images()).shape == (2, 64, 9, 9)
    fast.se = nn.Identity()
    fast.se.table = nn.Parameter(torch.eye(3).to_sparse())
    assert fast(images()).shape == (2, 64, 9, 9)


@pytest.mark.parametrize("way", ["assigned", "moved away"])
def test_old_weights_are_let_go(fast, way):
    warm(fast, images())
    if way == "assigned":
        old = weakref.ref(fast.conv1.weight)
        fast.load_state_dict({name: value.clone() for name, value in fast.state_dict().items()}, assign=True)
        train(fast, images())
        gc.collect()
        assert old() is None
    else:
        assert fast in known._KNOWN
        fast.to("meta")
        assert fast not in known._KNOWN


def test_weights_made_from_others_are_not_kept(fast):
    base = {name: value.detach().clone().requires_grad_() for name, value in fast.named_parameters()}
    for _ in range(3):
        made = {name: value * 2 for name, value in base.items()}
        torch.func.functional_call(fast, made, (images(),)).sum().backward()
        assert fast not in known._KNOWN
    assert all(value.grad is not None for value in base.values())


def test_what_is_left_to_torch_is_known_too(fast, monkeypatch):
    fast.se = nn.Sequential(nn.Identity())
    asked = []
    monkeypatch.setattr(optimize, "_unit", lambda *_: asked.append(1))
    for _ in range(3):
        assert fast(images()).shape == (2, 64, 9, 9)
    assert len(asked) == 1


def test_a_weight_that_refers_to_its_unit(fast):
    unit = copy.deepcopy(fast)
    unit.conv1.weight.owner = unit
    warm(unit, images())
    gone = weakref.ref(unit)
    del unit
    gc.collect()
    assert gone() is None


def test_other_channels_and_sizes_are_refused_as_before(fast):
    stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3))
    optimize_with_reason(stem)
    for net, wrong in (
        (fast, torch.randn(2, 60, 9, 9)),
        (stem, torch.randn(2, 4, 9, 9)),
        (stem, torch.randn(2, 3, 2, 9)),
    ):
        for _ in range(3):
            with pytest.raises(RuntimeError):
                net(wrong)
    with pytest.raises(RuntimeError):
        stem[2](torch.randn(2, 15, 9, 9))


def test_one_value_a_channel_where_some_norms_are_fixed():
    block = Res2Block(
        64, 16, base_width=68, stride=2, downsample=nn.Sequential(nn.Conv2d(64, 64, 1, 2), nn.BatchNorm2d(64))
    )
    optimize_with_reason(block)
    for _ in range(3):
        block(images(2, 2))
    for bn in (block.bn1, *block.bns, block.bn3):
        bn.eval()
    block(images(2, 2))
    with pytest.raises(ValueError, match="more than 1 value"):
        block(images(1, 2))


# ------------------------------------------------------------------------------------------------------ the tapes


def add(x, y, out):
    """Write ``x + y`` by a kernel."""
    chans = x.shape[1]
    norm = norm_act.activation("identity", x, chans)
    norm_act.forward(x, norm._replace(running_mean=ZEROS[:chans], running_var=ONES[:chans]), None, None, add=y, y2=out)


ZEROS, ONES = torch.zeros(8), torch.ones(8)


def run_thrice(function, *inputs):
    """Run with tapes; whether the third time was played."""
    tapes, calls = Tapes(), 0

    def counted(*given):
        nonlocal calls
        calls += 1
        return function(*given)

    for _ in range(3):
        found = tapes.run("key", counted, inputs, (ZEROS, ONES))
    return calls == 2, found


def test_calls_of_kernels_are_played():
    x, y = torch.randn(2, 5, 8)

    def double(x, y):
        norm = norm_act.Norm("identity", 1.0, False, False, 0.0, 0.0, None, None, ZEROS, ONES)
        inner, out = memory.small((5, 8), x), memory.small((5, 8), x)
        norm_act.forward(x, norm, None, None, add=y, y2=inner)
        norm_act.forward(inner, norm, None, None, add=y, y2=out)
        return out, None, x, out[1:]

    was_played, (out, nothing, same, part) = run_thrice(double, x, y)
    assert was_played
    assert nothing is None
    assert same is x
    torch.testing.assert_close(out, x + 2 * y)
    assert torch.equal(part, out[1:])


def test_what_torch_computes_is_not():
    def torchs(x, y):
        out = memory.small((5, 8), x)
        norm = norm_act.Norm("identity", 1.0, False, False, 0.0, 0.0, None, None, ZEROS, ONES)
        norm_act.forward(x, norm, None, None, add=y * 2, y2=out)
        return (out,)

    was_played, (out,) = run_thrice(torchs, *torch.randn(2, 5, 8))
    assert not was_played
    assert out is not None


@pytest.mark.parametrize("kind", ["unknown constant", "room of torch's", "output from elsewhere"])
def test_what_leads_elsewhere_is_not(kind):
    mean = torch.zeros(8) if kind == "unknown constant" else ZEROS
    other = torch.ones(5, 8)

    def function(x):
        norm = norm_act.Norm("identity", 1.0, False, False, 0.0, 0.0, None, None, mean, ONES)
        out = torch.empty(5, 8) if kind == "room of torch's" else memory.small((5, 8), x)
        norm_act.forward(x, norm, None, out)
        return out, other if kind == "output from elsewhere" else None

    x = torch.randn(5, 8)
    was_played, (out, _) = run_thrice(function, x)
    assert not was_played
    torch.testing.assert_close(out, x)


def test_inputs_that_overlap_are_not():
    x = torch.randn(10, 8)

    def function(x, y):
        norm = norm_act.Norm("identity", 1.0, False, False, 0.0, 0.0, None, None, ZEROS, ONES)
        out = memory.small((6, 8), x)
        norm_act.forward(x, norm, None, None, add=y, y2=out)
        return (out,)

    was_played, (out,) = run_thrice(function, x[:6], x[4:])
    assert not was_played
    torch.testing.assert_close(out, x[:6] + x[4:])


def test_inputs_that_overlap_with_constants_are_not():
    def function(x):
        norm = norm_act.Norm("identity", 1.0, False, False, 0.0, 0.0, None, None, ZEROS, ONES)
        out = memory.small((1, 8), x)
        norm_act.forward(x, norm, None, out)
        return (out,)

    was_played, (out,) = run_thrice(function, ONES.view(1, 8))
    assert not was_played
    assert torch.equal(out, ONES.view(1, 8))


def test_values_used_at_one_time_do_not_overlap():
    chance = random.Random(0)
    for _ in range(100):
        pieces = {}
        for source in range(12):
            first = chance.randrange(10)
            pieces[source] = (chance.randrange(1, 50_000), first, chance.randrange(first, 10))
        total, places = _lay_out(pieces)
        for (a, (size_a, first_a, last_a)), (b, (size_b, first_b, last_b)) in itertools.combinations(pieces.items(), 2):
            if first_a <= last_b and first_b <= last_a:
                assert places[a] + size_a <= places[b] or places[b] + size_b <= places[a]
        assert all(places[source] % 64 == 0 and places[source] + pieces[source][0] <= total for source in pieces)
        assert total <= sum(-(-size // tape._LINE) * tape._LINE for size, _, _ in pieces.values())


def test_every_field_of_a_kernel_takes_eight_bytes():
    modules = [importlib.import_module(f"r2kit.backbones.fast.{name}") for name in native_modules()]
    for module in modules:
        args = module._Args
        assert tape._pointers(args)
        assert memoryview(bytes(args())).nbytes % 8 == 0
        assert all(getattr(args, field[0]).offset % 8 == 0 for field in args._fields_)


def native_modules():
    return [source.__name__.rsplit(".", 1)[-1] for source in (norm_act, window)] + [
        *("direct", "product", "winograd", "winograd_grad", "weight_grad")
    ]


# ------------------------------------------------------------------------------------------------------ the windows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [(1, 1), (2, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize(
    ("batch", "chans", "tall", "across"), [(2, 26, 9, 7), (1, 5, 1, 1), (3, 40, 2, 5), (1, 16, 8, 8)]
)
def test_window_kernel(dtype, step, batch, chans, tall, across):
    wide = torch.randn(batch, chans + 7, tall, across, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = wide[:, 3 : 3 + chans]
    leaf = x.clone().requires_grad_()
    expected = avg_pool2d(leaf, 3, step, 1)
    made = torch.full((batch, chans + 2, *expected.shape[2:]), 7.0, dtype=dtype)
    made = made.contiguous(memory_format=torch.channels_last)
    window.average(x, made[:, 1:-1], 3, step)
    torch.testing.assert_close(made[:, 1:-1], expected)
    assert (made[:, 0] == 7).all()
    assert (made[:, -1] == 7).all()
    dy = torch.randn_like(expected)
    expected.backward(dy)
    dx = torch.full_like(wide, 7.0)
    window.average_grad(dy.contiguous(memory_format=torch.channels_last), dx[:, 3 : 3 + chans], 3, step)
    torch.testing.assert_close(dx[:, 3 : 3 + chans], leaf.grad)
    assert (dx[:, :3] == 7).all()
    assert (dx[:, 3 + chans :] == 7).all()


def test_a_window_of_one_place_is_a_copy():
    x, out = images()[:, 5:40], torch.zeros(2, 35, 9, 9).contiguous(memory_format=torch.channels_last)
    window.average(x, out, 1, (1, 1))
    assert torch.equal(out, x)
    assert native.threads() >= 1
