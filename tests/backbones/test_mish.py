import copy

import pytest
import torch
from torch import nn

from r2kit.backbones.mish import MishBeta, mish_beta, mish_beta_to_mish, mish_to_mish_beta, set_beta


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0, 25.0])
def test_matches_its_definition(beta: float) -> None:
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    expected = x * torch.tanh(torch.logaddexp(torch.zeros(()), beta * x))
    torch.testing.assert_close(mish_beta(x, beta), expected, rtol=1e-8, atol=1e-10)


def test_beta_one_has_the_bits_of_mish() -> None:
    x = torch.randn(10_000, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = MishBeta()(x), nn.Mish()(y)
    assert torch.equal(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_gradient() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: mish_beta(t, 4.0), x)


@pytest.mark.parametrize("beta", [1.0, 25.0, 1000.0])
def test_distance_from_relu_shrinks_with_beta(beta: float) -> None:
    x = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    assert (mish_beta(x, beta) - x.relu()).abs().max() <= 0.31 / beta


def test_bfloat16_stays_bfloat16() -> None:
    assert MishBeta(25.0)(torch.randn(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_swapping_keeps_keys_and_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Mish(), nn.Sequential(nn.BatchNorm2d(4), nn.Mish(), nn.ReLU())).eval()
    keys = list(model.state_dict())
    x = torch.randn(2, 3, 5, 5)
    before = model(x)

    assert mish_to_mish_beta(model, 25.0) == 2
    assert list(model.state_dict()) == keys
    assert not any(m.training for m in model.modules())
    assert not torch.allclose(model(x), before)

    assert set_beta(model, 1.0) == 2
    assert torch.equal(model(x), before)
    assert mish_beta_to_mish(model) == 2
    assert torch.equal(model(x), before)
    assert not any(isinstance(m, MishBeta) for m in model.modules())
    assert isinstance(model[2][2], nn.ReLU)


def test_annealing_a_copy_leaves_the_original() -> None:
    model = nn.Sequential(MishBeta(25.0))
    set_beta(copy.deepcopy(model), 1.0)
    assert model[0].beta.item() == 25.0


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_refuses_a_beta_that_is_not_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be > 0"):
        MishBeta(beta)
    with pytest.raises(ValueError, match="beta must be > 0"):
        set_beta(nn.Sequential(MishBeta()), beta)


@pytest.mark.slow
def test_annealing_does_not_recompile() -> None:
    compiles = 0

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal compiles
        compiles += 1
        return graph

    act = MishBeta(25.0)
    compiled = torch.compile(act, backend=backend, fullgraph=True)
    x = torch.randn(100)
    for beta in (25.0, 10.0, 1.0):
        act.set_beta(beta)
        assert torch.equal(compiled(x), act(x))
    assert compiles == 1
