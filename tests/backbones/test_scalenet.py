import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from r2kit.backbones.scalenet import ScaleBlock, ScaleNet
from r2kit.backbones.scalenet_tables import (
    SCALENET50,
    SCALENET50_LIGHT,
    SCALENET101,
    SCALENET152,
    read_structure,
    save_structure,
    stages_of,
)
from r2kit.errors import ModelError

TINY = ((6, 3, 2, 1, 56), (8, 2, 2, 1, 28), (8, 4, 0, 2, 14), (8, 6, 4, 2, 7), (9, 0, 0, 3, 7))
CHANNELS = (8, 12, 16, 24)


def tiny(**options: object) -> ScaleNet:
    torch.manual_seed(0)
    return ScaleNet(TINY, channels=CHANNELS, num_classes=5, **options)


def settle(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BN something to do, and switch to eval."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.3, 0.3),
                (norm.running_mean, -0.3, 0.3),
                (norm.running_var, 0.5, 2.0),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return module.eval()


def block_by_the_book(block: ScaleBlock, x: Tensor) -> Tensor:
    """The published block, step by step from its description, from the weights alone, every branch run."""

    def norm(name: str, z: Tensor) -> Tensor:
        p = block.state_dict()
        return F.batch_norm(
            z, p[f"{name}.running_mean"], p[f"{name}.running_var"], p[f"{name}.weight"], p[f"{name}.bias"]
        )

    p = block.state_dict()
    if block.stride == 2:
        x = F.max_pool2d(x, 2, 2)
    shortcut = norm("downsample.1", F.conv2d(x, p["downsample.0.weight"])) if "downsample.0.weight" in p else x
    y = F.relu(norm("bn1", F.conv2d(x, p["conv1.weight"])))
    size = y.shape[2:]
    branches = []
    for i, (scale, count) in enumerate(zip((1, 2, 4, 7), block.row, strict=False)):
        z = F.max_pool2d(y, scale, scale) if scale > 1 else y
        if count == 0:
            continue
        weight = p[f"conv2.{i}.weight"]
        z = F.conv2d(z, weight, padding=weight.shape[-1] // 2)
        if scale > 1:
            whole = size[0] % z.shape[2] == 0 and size[1] % z.shape[3] == 0
            z = F.interpolate(z, size=size, mode="nearest" if whole else "bilinear")
        branches.append(norm(f"bn2.{i}", z))
    y = F.relu(torch.cat(branches, 1))
    return F.relu(norm("bn3", F.conv2d(y, p["conv3.weight"])) + shortcut)


def test_tables_have_the_published_depths_and_constant_sums_per_stage() -> None:
    for table, depths, sums in (
        (SCALENET50_LIGHT, [3, 4, 6, 3], [64, 128, 256, 512]),
        (SCALENET50, [3, 4, 6, 3], [88, 175, 349, 697]),
        (SCALENET101, [3, 4, 23, 3], [86, 171, 341, 682]),
        (SCALENET152, [3, 8, 36, 3], [90, 179, 358, 715]),
    ):
        stages = stages_of(table)
        assert [len(rows) for rows in stages] == depths
        assert [{sum(row[:-1]) for row in rows} for rows in stages] == [{total} for total in sums]


@pytest.mark.parametrize("shape", [(56, 56), (28, 28), (14, 14), (7, 7), (29, 57), (8, 13)])
@pytest.mark.parametrize(
    ("row", "stride", "project"),
    [((4, 3, 2, 1, 28), 1, False), ((5, 0, 0, 3, 7), 1, True), ((4, 2, 2, 2, 7), 1, False)],
)
def test_block_equals_the_published_one(
    shape: tuple[int, int], row: tuple[int, ...], stride: int, project: bool
) -> None:
    torch.manual_seed(0)
    block = settle(ScaleBlock(32, 8, row, stride=stride, project=project))
    x = torch.randn(2, 32, *shape)
    assert torch.equal(block(x), block_by_the_book(block, x))


def test_strided_block_pools_before_both_branches() -> None:
    torch.manual_seed(0)
    block = settle(ScaleBlock(24, 8, (4, 3, 2, 1, 14), stride=2, project=True))
    x = torch.randn(2, 24, 29, 30)
    out = block(x)
    assert out.shape == (2, 32, 14, 15)
    assert torch.equal(out, block_by_the_book(block, x))
    assert all(conv.stride == (1, 1) for conv in block.modules() if isinstance(conv, nn.Conv2d))


def test_kernels_follow_the_scale_index_not_the_factor() -> None:
    kernels = {
        side: [conv.kernel_size[0] for conv in ScaleBlock(8, 4, (1, 1, 1, 1, side)).conv2.values()]
        for side in (56, 28, 14, 7)
    }
    assert kernels == {56: [3, 3, 3, 3], 28: [3, 3, 3, 3], 14: [3, 3, 3, 3], 7: [3, 3, 3, 1]}


def test_keys_are_the_authors_and_empty_branches_have_none() -> None:
    keys = set(timm.create_model("scalenet50", device="meta").state_dict())
    assert {"layer1.0.downsample.0.weight", "layer1.0.conv2.3.weight", "layer4.2.bn2.0.running_var", "fc.bias"} <= keys
    # Row 3 of the table is (59, 26, 0, 3): no scale 4.
    assert {k.split(".")[3] for k in keys if k.startswith("layer1.2.conv2.")} == {"0", "1", "3"}


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_coarse_branches_see_the_whole_of_a_small_map(side: int) -> None:
    torch.manual_seed(0)
    block = settle(ScaleBlock(16, 4, (0, 0, 0, 6, 7)))
    x = torch.randn(2, 16, side, side + 1)
    y = F.relu(block.bn1(block.conv1(x)))
    branch = block.bn2["3"](block.conv2["3"](y.amax((2, 3), keepdim=True)))
    expected = F.relu(block.bn3(block.conv3(F.relu(branch))) + x)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 96), (208, 112), (16, 16), (1, 1)])
def test_any_size_works(size: tuple[int, int]) -> None:
    model = tiny().eval()
    out = model(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (1, 5)
    assert out.isfinite().all()


@pytest.mark.parametrize("side", [28, 56])  # the factors divide these: every resize is by nearest neighbour
def test_dilation_keeps_what_each_tap_sees(side: int) -> None:
    """A block of a stage without its stride gives, on a map doubled pixel by pixel, the doubled result."""
    torch.manual_seed(0)
    native = settle(ScaleBlock(16, 4, (3, 3, 2, 2, 7)))
    dilated = ScaleBlock(16, 4, (3, 3, 2, 2, 7), dilation=2).eval()
    dilated.load_state_dict(native.state_dict())
    x = torch.randn(1, 16, side, side)
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(dilated(doubled), F.interpolate(native(x), scale_factor=2.0, mode="nearest"))


def test_drop_path_drops_the_residual_branch() -> None:
    model = tiny(drop_path_rate=0.4)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    block = model.layer4[1].train()
    block.drop_path.drop_prob = 1.0
    x = torch.randn(2, 96, 7, 7)
    assert torch.equal(block(x), F.relu(x))


def test_features_of_other_depths_and_widths() -> None:
    infos = tiny(output_stride=8).feature_info
    assert [(i["num_chs"], i["reduction"]) for i in infos] == [(64, 2), (32, 4), (48, 8), (64, 8), (96, 8)]


def test_initialised_as_the_authors_do() -> None:
    conv = tiny().layer3[0].conv1  # 1 x 1 x 16 outputs
    assert conv.weight.std().item() == pytest.approx((2 / 16) ** 0.5, rel=0.1)
    assert all((m.weight == 1).all() for m in tiny().modules() if isinstance(m, nn.BatchNorm2d))
    assert (tiny(zero_init_last=True).layer1[0].bn3.weight == 0).all()


def test_structure_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    save_structure(TINY, path)
    assert json.loads(path.read_text()) == [list(row) for row in TINY]
    assert read_structure(path) == read_structure(str(path)) == TINY
    model = timm.create_model("scalenet50", structure=str(path), channels=CHANNELS, num_classes=5)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in tiny().state_dict().items()}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected a list of rows"),
        ("", "cannot be read"),
        (7, "expected a list of rows"),
        ([[1, 2, 3, 4]], r"row 1: expected five whole numbers .* got \[1, 2, 3, 4\]"),
        ([[1, 2, 3, 4.0, 56]], "row 1: expected five whole numbers"),
        ([[1, 2, 3, True, 56]], "row 1: expected five whole numbers"),
        (["12345"], "row 1: expected five whole numbers"),
        ([[1, 2, -3, 4, 56]], "row 1: channel counts must be 0 or more"),
        ([[0, 0, 0, 0, 56]], "row 1: channel counts must be 0 or more and not all 0"),
        ([[1, 2, 3, 4, 55]], r"row 1: side must be one of \(56, 28, 14, 7\) .* got 55"),
        ([*TINY, (1, 1, 1, 1, 14)], "row 6: side 14 follows 7"),
        (TINY[:3], "no row of side 7"),
    ],
)
def test_wrong_structure_is_one_clear_line(rows: object, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        ScaleNet(rows)
    assert "\n" not in str(error.value)


def test_wrong_files_name_themselves(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    with pytest.raises(ModelError, match=r"none\.json: cannot be read \(No such file"):
        read_structure(missing)
    broken = tmp_path / "broken.json"
    broken.write_text("[[1, 2")
    with pytest.raises(ModelError, match=r"broken\.json: not JSON"):
        read_structure(broken)
    broken.write_text("[[1, 2, 3, 4, 5]]")
    with pytest.raises(ModelError, match=r"broken\.json, row 1: side"):
        read_structure(broken)
    with pytest.raises(ModelError, match=r"out\.json: cannot be written"):
        save_structure(TINY, tmp_path / "no_folder" / "out.json")


def test_options_that_cannot_be_honoured_are_refused() -> None:
    with pytest.raises(TypeError, match="scael"):
        timm.create_model("scalenet50", scael=8, device="meta")
    with pytest.raises(ModelError, match="output_stride must be 8, 16 or 32, got 4"):
        tiny(output_stride=4)
    with pytest.raises(ModelError, match=r"channels must be four positive numbers.*\[8, 16\]"):
        ScaleNet(TINY, channels=(8, 16))
