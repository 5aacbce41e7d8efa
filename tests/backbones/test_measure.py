import pytest
import torch
from torch import nn

from r2kit.backbones import count_macs, count_parameters


def test_each_kind_of_layer_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),  # 4x4 out
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 2, stride=2, bias=False),  # 8x8 out
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 10),
    )
    conv = 6 * 4 * 4 * (4 // 2) * 9
    transposed = 6 * 4 * 4 * 3 * 4  # every input element is multiplied into 3 channels of 2x2
    linear = 3 * 10
    assert count_macs(model, (4, 8, 8)) == conv + transposed + linear
    assert count_parameters(model) == (6 * 2 * 9 + 6) + 12 + 6 * 3 * 4 + (3 * 10 + 10)


def test_counting_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_macs(model, (3, 8, 8))
    assert model.training
    assert not model[0]._forward_hooks
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_shared_and_frozen_parameters() -> None:
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, layer, nn.Linear(5, 2))
    assert count_parameters(model) == 30 + 12
    layer.requires_grad_(False)
    assert count_parameters(model, trainable_only=True) == 12
    assert count_macs(nn.Sequential(nn.Flatten(), *model), (5, 1, 1)) == 25 + 25 + 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    assert count_macs(nn.Conv2d(3, 4, 1).to(dtype), (3, 2, 2)) == 48
