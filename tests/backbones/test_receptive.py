import pytest
import torch
from torch import nn

from r2kit.backbones import create_model
from r2kit.backbones._res2 import Res2Block
from r2kit.backbones.receptive import effective_receptive_field, receptive_field


def side(field):
    """Height and width of what is reached."""
    rows, columns = field.any(1).nonzero(), field.any(0).nonzero()
    return int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Mish])
def test_two_convolutions_see_five_pixels_and_a_stride_more(act):
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), act(), nn.Conv2d(3, 4, 3, padding=1))
    assert side(receptive_field(net, (2, 15, 15))) == (5, 5)
    strided = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), act(), nn.Conv2d(3, 4, 3, padding=1))
    assert side(receptive_field(strided, (2, 31, 31))) == (7, 7)


def test_each_split_of_a_unit_sees_two_pixels_more_than_the_one_before():
    block = Res2Block(64, 16, scale=4)
    width = block.conv3.in_channels // 4
    fields = [
        receptive_field(block, (64, 17, 17), layer=block.conv3, channels=slice(i * width, (i + 1) * width))
        for i in range(4)
    ]
    assert [side(field)[0] for field in fields] == [3, 5, 7, 1]  # the last split passes through
    assert side(receptive_field(block, (64, 17, 17)))[0] == 7


def test_the_network_is_left_as_it_was():
    torch.manual_seed(0)
    block = Res2Block(64, 16, scale=4).train()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    receptive_field(block, (64, 9, 9))
    field = effective_receptive_field(block, (64, 9, 9), images=2)
    assert block.training
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(parameter.grad is None for parameter in block.parameters())
    assert not block.conv3._forward_pre_hooks
    assert torch.equal(field, effective_receptive_field(block, (64, 9, 9), images=2))


def test_what_has_an_effect_lies_inside_what_can_have_one():
    torch.manual_seed(0)
    net = create_model("cifar_res2next29_6c24w4s", num_classes=0, global_pool="")
    stem = nn.Sequential(net.conv1, net.bn1, net.act1, net.layer1[0])
    reach, effect = receptive_field(stem, (3, 21, 21)), effective_receptive_field(stem, (3, 21, 21), images=4)
    assert effect.max() == 1.0
    assert not (effect > 0)[~reach].any()
    assert (effect > 0).sum() > 0.9 * reach.sum()
    assert effect[reach].mean() < 0.5  # most of the field has little to say


def test_what_is_no_map_or_no_layer_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"want maps \(B, D, h, w\), and the layer gives \(1, 18\)"):
        receptive_field(net, (1, 5, 5))
    with pytest.raises(ValueError, match="the ReLU is no module of the Sequential"):
        receptive_field(net, (1, 5, 5), layer=nn.ReLU())
