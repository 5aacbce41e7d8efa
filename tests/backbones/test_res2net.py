import pytest
import timm
import torch
from timm.layers import SEModule
from torch import nn

import r2kit.backbones  # noqa: F401
from r2kit.backbones import count_parameters
from r2kit.errors import ModelError


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar_res2next29_6c24w4s", 24.3),
        ("cifar_res2next29_8c25w4s", 33.8),
        ("cifar_res2next29_6c24w6s", 36.7),
        ("cifar_resnext29_8c64w", 34.4),
    ],
)
def test_published_cifar_sizes_are_those_of_ten_classes(name: str, millions: float) -> None:
    """Table 4 of the paper, whose sizes only the grouped first unit reproduces."""
    assert round(count_parameters(timm.create_model(name, num_classes=10, device="meta")) / 1e6, 1) == millions


def test_cifar_features_and_intermediates() -> None:
    model = timm.create_model("cifar_res2next29_6c24w4s").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        features = timm.create_model("cifar_res2next29_6c24w4s", features_only=True).eval()
        features.load_state_dict(model.state_dict(), strict=False)
        assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8)]
        assert features.feature_info.reduction() == [1, 1, 2, 4]
        assert all(torch.equal(a, b) for a, b in zip(maps, features(x), strict=True))
        assert torch.equal(last, maps[-1])
        assert torch.equal(model.forward_features(x), last)
        assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
        with pytest.raises(AssertionError):
            model.forward_intermediates(x, indices=[4])


@pytest.mark.parametrize(("output_stride", "side"), [(4, 8), (2, 16), (1, 32)])
def test_cifar_output_stride(output_stride: int, side: int) -> None:
    model = timm.create_model("cifar_res2next29_6c24w4s", output_stride=output_stride, device="meta")
    assert model.forward_features(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 1024, side, side)
    assert model.feature_info[-1]["reduction"] == output_stride


def test_cifar_output_stride_is_checked() -> None:
    with pytest.raises(ModelError, match="must be 1, 2 or 4, got 32"):
        timm.create_model("cifar_res2next29_6c24w4s", output_stride=32)


@pytest.mark.parametrize("prune_head", [True, False])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_cifar_pruning(last: int, prune_head: bool) -> None:
    model = timm.create_model("cifar_resnext29_8c64w", device="meta")
    assert model.prune_intermediate_layers([last], prune_head=prune_head) == [last]
    x = torch.empty(1, 3, 32, 32, device="meta")
    assert model.forward_features(x).shape[1] == 256 * 2 ** (last - 1)
    assert isinstance(model.fc, nn.Linear) == (last == 3 and not prune_head)


def test_se_stands_in_every_unit() -> None:
    model = timm.create_model("seres2net50", device="meta")
    attentions = [m for m in model.modules() if isinstance(m, SEModule)]
    assert len(attentions) == 16
    assert attentions[0].fc1.out_channels == 256 // 16


def test_no_name_is_taken_from_timm() -> None:
    for name in timm.list_models(module="res2net") + timm.list_models(module="res2netplus"):
        home = timm.model_entrypoint(name).__module__
        assert home in ("timm.models.res2net", "r2kit.backbones.res2net", "r2kit.backbones.res2netplus"), name
    assert timm.model_entrypoint("res2net50_26w_4s").__module__ == "timm.models.res2net"
