import copy

import pytest
import torch
from torch import nn

from r2kit.benchmark import check_same, measure_throughput
from r2kit.cli import main
from r2kit.errors import ModelError


def test_measuring_changes_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    for training in (True, False):
        assert measure_throughput(net, (3, 8, 8), 4, training=training) > 0
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_slower_network_is_slower():
    small, large = nn.Conv2d(3, 2, 1), nn.Sequential(*[nn.Conv2d(3, 3, 9, padding=4) for _ in range(20)])
    speeds = [measure_throughput(net, (3, 64, 64), 4, training=False) for net in (Flat(small), Flat(large))]
    assert speeds[0] > 2 * speeds[1]


@pytest.mark.parametrize(("budget", "steps"), [(0.0, 2), (1e9, 4)])
def test_a_slow_network_is_timed_once(budget, steps):
    net, images = nn.Conv2d(3, 2, 1), []
    net.register_forward_hook(lambda *_: images.append(1))

    def loss(model, image):
        images.append(1)
        return model(image).mean()

    assert measure_throughput(net, (3, 8, 8), 2, training=True, loss=loss, budget=budget) > 0
    assert len(images) == 2 * steps  # one that is not timed, and one or three that are; each counted at both places


class Flat(nn.Module):
    """(B, C, H, W) -> (B, C)."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, image):
        return self.body(image).mean((2, 3))


def test_command(capsys):
    sizes = ["--size", "32", "--batch-size", "2", "--rounds", "1"]
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "test_resnet", "--against", "test_byobnet", *sizes])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "32 px, batch 2" in out
    assert "against test_byobnet" in out
    assert out.count("test_resnet, fast form") == 2
    assert "fast form (r2kit.optimize, train.optimize=auto): on: 1 fused units, " in out


def test_a_wrong_fast_form_is_found():
    net = nn.Linear(2, 2)
    image = torch.ones(1, 2)
    assert check_same(net, net, image) == 0
    with pytest.raises(ModelError, match="differs from the plain one by"):
        check_same(net, nn.Linear(2, 2), image)


def test_a_branch_that_begins_with_zero_is_compared():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(net[1].weight)
    wrong = copy.deepcopy(net)
    nn.init.constant_(wrong[0].weight, 0.5)
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(net(image), wrong(image))
    assert check_same(net, net, image) == 0
    with pytest.raises(ModelError, match="differs from the plain one by"):
        check_same(net, wrong, image)
    assert not net[1].weight.any(), "the network given is not the one that is changed"


def test_unknown_name(capsys):
    with pytest.raises(SystemExit) as error:
        main(["benchmark", "res2netplus5"])
    assert error.value.code == 2
    assert "res2netplus5" in capsys.readouterr().err
