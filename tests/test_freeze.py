import pytest
import torch

import r2kit
from r2kit.errors import ModelError
from r2kit.freeze import Freezer


@pytest.fixture
def net():
    return r2kit.create_model("test_resnet", num_classes=3)


def trained(model):
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_the_head_is_trained(net):
    freezer = Freezer(net)
    assert freezer.apply(0)
    assert trained(net) == {"fc"}
    assert not freezer.apply(99)
    assert freezer.parameters == sum(p.numel() for n, p in net.named_parameters() if not n.startswith("fc."))


def test_stages_are_freed_from_the_head_down_by_the_epoch_alone(net):
    freezer = Freezer(net, (1, 3, 4))
    assert [freezer.depth_at(epoch) for epoch in range(6)] == [5, 4, 4, 3, 0, 0]
    for epoch, wanted in ((3, {"fc", "layer4", "layer3"}), (0, {"fc"}), (2, {"fc", "layer4"})):
        assert freezer.apply(epoch)
        assert trained(net) == wanted
    freezer.apply(4)
    assert trained(net) == {"fc", "layer4", "layer3", "layer2", "layer1", "conv1", "bn1"}
    assert freezer.parameters == 0


def test_frozen_statistics_stand_still_and_freed_ones_move(net):
    freezer = Freezer(net, (1, 2))
    freezer.apply(1)
    before = {name: value.clone() for name, value in net.named_buffers()}
    net.train()
    freezer.hold()
    net(torch.randn(4, 3, 32, 32))
    moved = {name.split(".")[0] for name, value in net.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {"layer4"}


def test_more_steps_than_parts_are_refused(net):
    with pytest.raises(ModelError, match=r"train\.unfreeze: 6 steps, but the backbone has 5 parts"):
        Freezer(net, (1, 2, 3, 4, 5, 6))
