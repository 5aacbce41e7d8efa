import torch
from torch import nn

from r2kit.benchmark import measure_throughput


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


class Flat(nn.Module):
    """(B, C, H, W) -> (B, C)."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, image):
        return self.body(image).mean((2, 3))
