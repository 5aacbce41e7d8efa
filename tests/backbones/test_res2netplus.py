"""Res2NetPlus against a second, functional reading of the article and of the published code."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2kit.backbones
from r2kit.backbones import count_parameters
from tests.backbones.randomness import randomise_norms

LAYERS = (2, 2, 1, 1)  # a first and a chained unit, at a fraction of the cost


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, layers=LAYERS, **options).eval()
    randomise_norms(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model


class Reading:
    """The forward pass written down a second time, over a state dict."""

    def __init__(
        self,
        state: dict[str, Tensor],
        stem: list[tuple[str, str]],
        scale_unit: Callable[["Reading", Tensor, str, int, bool], list[Tensor]],
        groups: int = 1,
        avg_down: bool = False,
    ) -> None:
        self.state, self.stem, self.scale_unit = state, stem, scale_unit
        self.groups, self.avg_down = groups, avg_down

    def conv(self, x: Tensor, key: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{key}.weight"]
        bias = self.state.get(f"{key}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2, groups=groups)

    def bn(self, x: Tensor, key: str) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{key}.{n}"] for n in names))

    def unit(self, x: Tensor, key: str, stride: int, first: bool) -> Tensor:
        z = self.bn(mish(self.conv(x, f"{key}.conv1")), f"{key}.bn1")
        outs = self.scale_unit(self, z, key, stride, first)
        z = self.bn(self.conv(torch.cat(outs, 1), f"{key}.conv3"), f"{key}.bn3")
        if first and self.avg_down:
            if stride > 1:
                x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
            x = self.bn(self.conv(x, f"{key}.downsample.1"), f"{key}.downsample.2")
        elif first:
            x = self.bn(self.conv(x, f"{key}.downsample.0", stride), f"{key}.downsample.1")
        return mish(z + x)

    def __call__(self, x: Tensor) -> Tensor:
        for i, (conv, bn) in enumerate(self.stem):
            x = self.bn(mish(self.conv(x, conv, stride=2 if i == 0 else 1)), bn)
        x = F.max_pool2d(x, 3, 2, 1)
        for stage, units in enumerate(LAYERS):
            for unit in range(units):
                x = self.unit(x, f"layer{stage + 1}.{unit}", 2 if stage > 0 and unit == 0 else 1, unit == 0)
        return F.linear(x.mean((2, 3)), self.state["fc.weight"], self.state["fc.bias"])


def mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))


def article(net: Reading, z: Tensor, key: str, stride: int, first: bool) -> list[Tensor]:
    """Convolution, Mish, BN for every scale; no tensor is changed after it was kept."""
    x0, x1, x2, x3 = z.chunk(4, 1)

    def step(t: Tensor, i: int) -> Tensor:
        return net.bn(mish(net.conv(t, f"{key}.convs.{i}", stride, net.groups)), f"{key}.bns.{i}")

    if first:
        return [step(x0, 0), step(x1, 1), step(x2, 2), F.avg_pool2d(x3, 3, stride, 1)]
    z0 = step(x0, 0)
    z1 = step(z0 + x1, 1)
    return [z0, z1, step(z1 + x2, 2), x3]


def published(net: Reading, z: Tensor, key: str, stride: int, first: bool) -> list[Tensor]:
    """Convolution, BN, Mish for every scale, with the published loop's in-place addition left to do its harm."""
    parts = z.chunk(4, 1)
    out, y = torch.empty(0), torch.zeros(1)
    for i in range(3):
        if first:
            y = parts[i]
        elif i == 0:
            y = y + parts[0]
        else:
            y += parts[i]  # when i is 1, `y` and `out` are one tensor
        y = mish(net.bn(net.conv(y, f"{key}.convs.{i}", stride), f"{key}.bns.{i}"))
        out = y if i == 0 else torch.cat((out, y), 1)
    return [out, F.avg_pool2d(parts[3], 3, stride, 1) if first else parts[3]]


OUR_STEM = [("conv1.0", "conv1.2"), ("conv1.3", "conv1.5"), ("conv1.6", "bn1")]
FILE_STEM = [("conv1.0", "conv1.2"), ("conv2.0", "conv2.2"), ("conv3.0", "conv3.2")]


@pytest.mark.parametrize("size", [64, 65])
@pytest.mark.parametrize(
    ("name", "options"),
    [("res2netplus50", {}), ("res2nextplus50", {"groups": 8}), ("res2netplus50d", {"avg_down": True})],
)
def test_is_what_the_article_describes(name: str, options: dict[str, object], size: int) -> None:
    model = build(name)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = Reading(model.state_dict(), OUR_STEM, article, **options)(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_res2fg_is_what_the_published_code_computes() -> None:
    """Also shows that the key map of the docstring is right: the reading uses the published file's own names."""
    model = build("res2netplus50_res2fg")
    to_file = {
        ours: theirs for pair in zip(OUR_STEM, FILE_STEM, strict=True) for ours, theirs in zip(*pair, strict=True)
    }
    state = {}
    for key, value in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        state[f"{to_file.get(module, module)}.{leaf}"] = value
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        expected = Reading(state, FILE_STEM, published)(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_res2fg_and_the_article_are_different_networks() -> None:
    model = build("res2netplus50_res2fg")
    clean = build("res2netplus50_res2fg", published_sum=False)
    other = build("res2netplus50")
    for twin in (clean, other):
        twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(model(x), clean(x), atol=1e-2)
        assert not torch.allclose(model(x), other(x), atol=1e-2)


def test_aliasing_needs_three_splits() -> None:
    """With two splits the published code has no second step, and both networks are one."""
    model, clean = (build("res2netplus50_res2fg", scale=2, published_sum=flag) for flag in (True, False))
    clean.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), clean(x))


def test_all_activations_are_native_mish() -> None:
    for name in timm.list_models("res2ne*plus*"):
        model = timm.create_model(name, device="meta")
        kinds = {type(m) for m in model.modules() if type(m).__module__.startswith("torch.nn.modules.activation")}
        assert kinds == {nn.Mish}, name


def test_d_has_a_bias_exactly_where_an_activation_follows() -> None:
    model = timm.create_model("res2netplus50d", device="meta")
    with_bias = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs - with_bias == {n for n in convs if n.endswith(("conv3", "downsample.1"))}
    assert set(timm.create_model("res2net50d", device="meta").state_dict()) - set(model.state_dict()) == {
        f"conv1.{i}.{leaf}"  # the two stem BNs stand behind the activation, one place later
        for i in (1, 4)
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("name", ["res2netplus50", "res2netplus101", "res2netplus50d"])
def test_arch_is_a_function_that_fastai_can_call(name: str) -> None:
    arch = getattr(r2kit.backbones.res2netplus, name)
    model = arch(False, layers=(1, 1, 1, 1), num_classes=3, in_chans=13)
    assert model(torch.randn(2, 13, 32, 32)).shape == (2, 3)
    assert count_parameters(arch(pretrained=False, device="meta")) > 25e6


def test_no_weights_is_said_at_once() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for res2netplus50"):
        timm.create_model("res2netplus50", pretrained=True, layers=(1, 1, 1, 1))
