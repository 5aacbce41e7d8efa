import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import ResNet
from torch import nn

import r2kit.backbones  # noqa: F401
from r2kit.backbones.resnest import SplitAttentionBlock, fix_drop_path

NAMES = [f"resnest50d_{kind}" for kind in ("1s1x64d", "2s1x64d", "4s1x64d", "1s2x40d", "2s2x40d")]


@pytest.mark.parametrize("name", NAMES)
def test_pools_before_the_attention(name: str) -> None:
    first = timm.create_model(name, device="meta").layer2[0]
    assert isinstance(first, SplitAttentionBlock)
    assert first.avd_first.stride == 2
    assert first.avd_last is None
    assert first.conv2.conv.stride == (1, 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("avd_first", [False, True])  # pool behind and before the attention
@pytest.mark.parametrize(("radix", "cardinality"), [(0, 1), (1, 2), (4, 2)])
def test_block_equals_timms_without_drop_path(radix: int, cardinality: int, avd_first: bool, training: bool) -> None:
    torch.manual_seed(0)
    shortcut = nn.Conv2d(16, 128, 1, stride=2)
    options = {"radix": radix, "cardinality": cardinality, "base_width": 40, "avd": True, "avd_first": avd_first}
    theirs = ResNestBottleneck(16, 32, stride=2, downsample=shortcut, **options).train(training)
    ours = SplitAttentionBlock(16, 32, stride=2, downsample=shortcut, **options).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 9, 8)
    assert torch.equal(ours(x), theirs(x))


def test_fix_changes_no_tensor_and_no_eval_output() -> None:
    model = timm.create_model("resnest14d", num_classes=5, drop_path_rate=0.3, zero_init_last=False).eval()
    keys = list(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    assert fix_drop_path(model) is model
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


def certain_to_drop(block: nn.Module) -> nn.Module:
    block.drop_path = DropPath(1.0)
    return block.train()


def test_timm_still_drops_the_input() -> None:
    """When this fails, timm has mended its block and `SplitAttentionBlock` can go."""
    block = certain_to_drop(timm.create_model("resnest26d", zero_init_last=False).layer1[1])
    x = torch.randn(2, 256, 8, 8)
    assert not torch.equal(block(x), F.relu(x))


@pytest.mark.parametrize("wrapped", [False, True])
def test_fixed_blocks_drop_the_residual_branch(wrapped: bool) -> None:
    model = fix_drop_path(timm.create_model("resnest26d", zero_init_last=False, features_only=wrapped))
    identity, projecting = certain_to_drop(model.layer2[1]), certain_to_drop(model.layer2[0])
    x = torch.randn(2, 512, 8, 8)
    assert torch.equal(identity(x), F.relu(x))
    x = torch.randn(2, 256, 8, 8)
    projecting.downsample.eval()
    assert torch.equal(projecting(x), F.relu(projecting.downsample(x)))


def test_our_own_are_fixed_from_the_start() -> None:
    model = timm.create_model("resnest50d_2s1x64d", drop_path_rate=0.5, device="meta")
    blocks = [m for m in model.modules() if isinstance(m, ResNestBottleneck)]
    assert {type(block) for block in blocks} == {SplitAttentionBlock}
    assert [b.drop_path.drop_prob if b.drop_path else 0.0 for b in blocks] == pytest.approx(
        [0.5 * i / 15 for i in range(16)]
    )


def test_other_networks_are_left_alone() -> None:
    model = timm.create_model("resnet18", device="meta")
    types = [type(m) for m in model.modules()]
    assert isinstance(fix_drop_path(model), ResNet)
    assert [type(m) for m in model.modules()] == types


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="radixx"):
        timm.create_model("resnest50d_2s2x40d", radixx=4, device="meta")
    with pytest.raises(TypeError, match="radixx"):
        timm.create_model("resnest50d_2s2x40d", block_args={"radixx": 4}, device="meta")
