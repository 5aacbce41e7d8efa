import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, SEModule
from timm.models import group_parameters
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from r2kit.backbones._res2 import Res2Block
from r2kit.backbones.blresnet import BigLittleModule, BigLittleNet
from r2kit.backbones.measure import count_macs, count_parameters
from r2kit.errors import ModelError

# Parameters and multiply-adds of the authors' code at 224 px, beyond those of `r2kit.catalog`.
ALPHA_BETA = {
    (2, 2): (26_974_632, 2_910_650_368),
    (4, 2): (26_306_856, 2_490_777_600),
    (4, 4): (26_236_456, 2_477_129_728),
}


def little_net(**options: object) -> BigLittleNet:
    torch.manual_seed(0)
    return BigLittleNet(layers=(2, 3, 2, 1), num_classes=5, zero_init_last=False, **options)


@pytest.mark.parametrize(("alpha", "beta"), ALPHA_BETA)
def test_size_follows_alpha_and_beta(alpha: int, beta: int) -> None:
    model = timm.create_model("blresnet50", alpha=alpha, beta=beta, device="meta")
    assert (count_parameters(model), count_macs(model, (3, 224, 224))) == ALPHA_BETA[alpha, beta]


def test_depth_of_the_branches() -> None:
    model = timm.create_model("blresnet101", device="meta")
    stages = (model.layer1, model.layer2, model.layer3)
    assert [len(stage.big) for stage in stages] == [3, 7, 17]
    assert [len(stage.little) for stage in stages] == [1, 1, 3]
    assert len(model.layer4) == 3


def test_last_big_block_has_no_activation_unless_it_is_alone() -> None:
    model = little_net()
    assert isinstance(model.layer1.big[-1].act3, nn.ReLU)  # one big block
    assert isinstance(model.layer2.big[0].act3, nn.ReLU)
    assert isinstance(model.layer2.big[-1].act3, nn.Identity)
    assert isinstance(model.layer2.little[-1].act3, nn.ReLU)


def test_shortcuts() -> None:
    model = timm.create_model("blresnet50", device="meta")

    def kinds(block: nn.Module) -> list[str]:
        return [] if block.downsample is None else [type(m).__name__ for m in block.downsample]

    assert kinds(model.layer1.big[0]) == ["AvgPool2d", "Conv2d", "BatchNorm2d"]
    assert kinds(model.layer1.little[0]) == ["Conv2d", "BatchNorm2d"]
    assert kinds(model.layer2.fusion[0]) == ["AvgPool2d"]  # equal channels: the pool alone
    assert kinds(model.layer3.fusion[0]) == []
    pool = model.layer4[0].downsample[0]
    assert (pool.kernel_size, pool.stride, pool.padding, pool.count_include_pad) == (3, 2, 1, True)


def test_little_branch_of_a_resnext_has_wider_and_fewer_groups() -> None:
    for name, groups in (("blresnext50_32x4d", 16), ("blresnext101_64x4d", 32)):
        model = timm.create_model(name, device="meta")
        little, big = model.layer2.little[0].conv2, model.layer2.big[0].conv2
        assert (little.groups, big.groups) == (groups, 2 * groups)
        assert little.in_channels // little.groups == big.in_channels // big.groups == 8


def branch_by_the_book(blocks: nn.Sequential, x: Tensor, last_relu: bool) -> Tensor:
    """Plain bottlenecks, from their weights."""
    for number, block in enumerate(blocks):
        y = F.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
        stride = 2 if number == 0 and not last_relu else 1
        y = F.relu(block.bn2(F.conv2d(y, block.conv2.weight, stride=stride, padding=1)))
        y = block.bn3(F.conv2d(y, block.conv3.weight))
        shortcut = F.avg_pool2d(x, 3, 2, 1) if stride == 2 else x
        if block.conv1.in_channels != block.conv3.out_channels:
            shortcut = block.downsample[-1](F.conv2d(shortcut, block.downsample[-2].weight))
        y = y + shortcut
        x = F.relu(y) if last_relu or number + 1 < len(blocks) else y
    return x


@pytest.mark.parametrize("size", [(16, 16), (15, 18)])
def test_module_equals_its_description(size: tuple[int, int]) -> None:
    model = little_net().eval()
    module = model.layer2
    assert isinstance(module, BigLittleModule)
    x = torch.randn(2, 256, *size)
    big = branch_by_the_book(module.big, x, last_relu=False)
    little = module.little_e(branch_by_the_book(module.little, x, last_relu=True))
    merged = F.relu(F.interpolate(big, size=size, mode="nearest") + little)
    fusion = module.fusion[0]
    y = F.relu(fusion.bn1(fusion.conv1(merged)))
    y = F.relu(fusion.bn2(F.conv2d(y, fusion.conv2.weight, stride=2, padding=1)))
    y = F.relu(fusion.bn3(fusion.conv3(y)) + F.avg_pool2d(merged, 3, 2, 1))
    torch.testing.assert_close(module.merge(x), merged)
    torch.testing.assert_close(module(x), y)


def test_features_are_the_sums_of_modules_one_and_two() -> None:
    model = little_net().eval()
    seen: dict[str, Tensor] = {}
    for name in ("act1", "layer1.act", "layer2.act", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(x)
        last, maps = model.forward_intermediates(x)
    assert [info["module"] for info in model.feature_info] == list(seen)
    assert all(torch.equal(a, b) for a, b in zip(maps, seen.values(), strict=True))
    assert torch.equal(last, maps[-1])
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 32, 48),
        (256, 16, 24),
        (512, 8, 12),
        (1024, 4, 6),
        (2048, 2, 3),
    ]


@pytest.mark.parametrize("last", range(5))
def test_features_only_keeps_just_what_it_needs(last: int) -> None:
    whole = little_net().eval()
    x = torch.randn(1, 3, 64, 64)
    _, maps = whole.forward_intermediates(x)
    pruned = little_net().eval()
    assert pruned.prune_intermediate_layers([last]) == [last]
    (out,) = pruned.forward_intermediates(x, indices=[last], intermediates_only=True)
    assert torch.equal(out, maps[last])
    tail, (again,) = pruned.forward_intermediates(x, indices=[last])
    assert torch.equal(again, out)
    assert torch.equal(tail, out)
    assert torch.equal(pruned.forward_features(x), out)
    assert pruned.num_features == out.shape[1]
    assert not any(p.startswith(f"layer{n}.") for p, _ in pruned.named_parameters() for n in range(last + 1, 5))
    assert any(p.startswith(f"layer{last}.fusion.") for p, _ in pruned.named_parameters()) == (last == 3)


def test_stop_early_runs_no_later_stage() -> None:
    model = little_net().eval()
    model.layer3.register_forward_hook(lambda *_: pytest.fail("stage 3 ran"))
    last, maps = model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=[2], stop_early=True)
    assert last.shape == (1, 512, 4, 4)
    assert maps[0].shape == (1, 512, 8, 8)


def test_parallel_blocks_drop_alike_and_the_rate_rises() -> None:
    model = timm.create_model("blresnet101", drop_path_rate=0.32, device="meta")

    def rates(blocks: nn.Sequential) -> list[float]:
        return [0.0 if block.drop_path is None else block.drop_path.drop_prob for block in blocks]

    in_order = [r for m in (model.layer1, model.layer2, model.layer3) for r in rates(m.big) + rates(m.fusion)]
    in_order += rates(model.layer4)
    assert in_order == pytest.approx([0.01 * i for i in range(33)])
    assert rates(model.layer3.little) == rates(model.layer3.big)[:3]


@pytest.mark.parametrize("name", ["blresnet50", "blres2net50"])
def test_drop_path_drops_the_residual_branch(name: str) -> None:
    kind = {"block": Res2Block, "block_args": {"scale": 4}, "base_width": 26} if name == "blres2net50" else {}
    block = little_net(drop_path_rate=0.5, **kind).train().layer4[0]
    assert isinstance(block.drop_path, DropPath)
    block.drop_path.drop_prob = 1.0
    block.downsample.eval()
    x = torch.randn(2, 1024, 4, 4)
    assert torch.equal(block(x), F.relu(block.downsample(x)))


def test_blres2net_has_a_res2_unit_everywhere() -> None:
    model = timm.create_model("blres2net50", device="meta")
    assert not any(isinstance(m, Bottleneck) for m in model.modules())
    units = {name: m for name, m in model.named_modules() if isinstance(m, Res2Block)}
    assert len(units) == (2 + 1 + 1) + (3 + 1 + 1) + (5 + 1 + 1) + 3
    assert units["layer1.big.0"].split_width == 26
    assert units["layer1.little.0"].split_width == 13
    assert units["layer2.big.1"].chained
    assert not units["layer2.fusion.0"].chained  # it strides
    assert units["layer3.fusion.0"].chained
    assert isinstance(units["layer3.big.4"].act3, nn.Identity)


@pytest.mark.parametrize("name", ["blresnet50", "blres2net50"])
@pytest.mark.parametrize("stride", [8, 16])
def test_a_removed_stride_keeps_every_tensor(name: str, stride: int) -> None:
    dilated = timm.create_model(name, output_stride=stride, device="meta")
    native = timm.create_model(name, device="meta")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (dilated, native)]
    assert shapes[0] == shapes[1]
    dilations = {m.dilation[0] for m in dilated.layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3}
    assert dilations == ({1, 2} if stride == 16 else {2, 4})
    assert dilated.layer3.little[0].conv1.dilation == (1, 1)


def test_groups_go_up_with_depth_and_hold_parallel_blocks_together() -> None:
    model = timm.create_model("blresnet50", device="meta")
    groups = group_parameters(model, model.group_matcher())
    layer = {name: number for number, names in groups.items() for name in names}
    assert layer["conv1.weight"] == layer["bl_init.weight"] == layer["bn_l2.bias"] == 0
    assert layer["layer1.big.0.conv1.weight"] == layer["layer1.little.0.conv1.weight"] == 1
    order = ["layer1.big.1.conv1.weight", "layer1.fusion.0.conv1.weight", "layer2.big.0.conv1.weight"]
    assert [layer[name] for name in order] == [2, 3, 4]
    assert layer["layer1.little_e.0.weight"] == layer["layer1.fusion.0.conv1.weight"]
    assert layer["fc.weight"] == max(groups)
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 6


def test_initialised_as_the_authors_do() -> None:
    torch.manual_seed(0)
    model = BigLittleNet(layers=(2, 2, 2, 1), cardinality=32, base_width=4, attn_layer=SEModule)
    blocks = [m for m in model.modules() if isinstance(m, Bottleneck)]
    assert all((block.bn3.weight == 0).all() for block in blocks)
    assert all((block.se.fc1.bias == 0).all() and block.se.fc1.out_channels * 16 == block.se.fc1.in_channels
               for block in blocks)  # fmt: skip
    assert (model.layer1.little_e[1].weight == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3, 4, 6)}, "layers must be four numbers"),
        ({"layers": (1, 4, 6, 3)}, "the first three at least 2"),
        ({"alpha": 3}, "alpha must be 1, 2 or 4"),
        ({"beta": 0}, "beta at least 1"),
        ({"cardinality": 9, "base_width": 4}, "cardinality 9 must be a multiple of alpha 2"),
        ({"output_stride": 64}, "output_stride must be 8, 16 or 32, got 64"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        timm.create_model("blresnet50", device="meta", **options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="scael"):
        timm.create_model("blres2net50", scael=8, device="meta")
    with pytest.raises(TypeError, match="scael"):
        timm.create_model("blres2net50", block_args={"scael": 8}, device="meta")
    with pytest.raises(ModelError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        little_net().forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NHWC")
