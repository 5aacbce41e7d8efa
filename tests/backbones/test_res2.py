"""The split-and-fuse unit: equal to timm's where timm has it, and to its own definition everywhere else."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SEModule
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from r2kit.backbones._res2 import Res2Block, Res2Net, StemSpec
from r2kit.errors import ModelError
from tests.backbones.randomness import randomise_norms

DEEP = StemSpec(widths=(32, 32, 64))
OF_TIMM = {
    "res2net50_26w_4s": {"layers": (3, 4, 6, 3)},
    "res2net50_48w_2s": {"layers": (3, 4, 6, 3), "base_width": 48, "scale": 2},
    "res2net50_14w_8s": {"layers": (3, 4, 6, 3), "base_width": 14, "scale": 8},
    "res2net50_26w_6s": {"layers": (3, 4, 6, 3), "scale": 6},
    "res2net50_26w_8s": {"layers": (3, 4, 6, 3), "scale": 8},
    "res2net101_26w_4s": {"layers": (3, 4, 23, 3)},
    "res2next50": {"layers": (3, 4, 6, 3), "base_width": 4, "cardinality": 8},
    "res2net50d": {"layers": (3, 4, 6, 3), "stem": DEEP, "avg_down": True},
    "res2net101d": {"layers": (3, 4, 23, 3), "stem": DEEP, "avg_down": True},
}


def timm_and_ours(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = timm.create_model(name, **options)
    randomise_norms(theirs)
    ours = Res2Net(**OF_TIMM[name], **options, device="meta")
    ours.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()}, strict=True, assign=True)
    return theirs, ours


def assert_same_outputs(name: str, sizes: tuple[int, ...]) -> None:
    theirs, ours = timm_and_ours(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for size in sizes:
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert torch.equal(ours.eval()(x), theirs.eval()(x)), size


def test_outputs_are_timms_at_full_size() -> None:
    assert_same_outputs("res2net50_26w_4s", (224, 225))


@pytest.mark.parametrize("name", ["res2net50_48w_2s", "res2net50_14w_8s", "res2next50", "res2net50d"])
def test_outputs_are_timms(name: str) -> None:
    assert_same_outputs(name, (64, 65))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OF_TIMM))
def test_outputs_are_timms_at_full_size_for_all(name: str) -> None:
    assert_same_outputs(name, (224, 225))


@pytest.mark.parametrize("options", [{"output_stride": 8}, {"in_chans": 13, "global_pool": "catavgmax"}])
def test_options_mean_what_they_mean_in_timm(options: dict[str, object]) -> None:
    theirs, ours = timm_and_ours("res2net50d", **options)
    x = torch.randn(1, options.get("in_chans", 3), 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_training_step_is_timms() -> None:
    theirs, ours = timm_and_ours("res2net50_26w_4s")
    x = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model.train()(x).square().mean().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(ours.layer4[2].bn3.running_var, theirs.layer4[2].bn3.running_var)


def test_scale_one_is_the_plain_bottleneck() -> None:
    torch.manual_seed(0)
    plain = Bottleneck(64, 16).eval()
    randomise_norms(plain)
    unit = Res2Block(64, 16, base_width=64, scale=1).eval()
    renamed = {k.replace("conv2", "convs.0").replace("bn2", "bns.0"): v for k, v in plain.state_dict().items()}
    unit.load_state_dict(renamed, strict=True)
    x = torch.randn(2, 64, 9, 9)
    assert torch.equal(unit(x), plain(x.clone()))


def test_attention_stands_before_the_addition() -> None:
    class Gate(nn.Module):
        def __init__(self, channels: int, **_: object) -> None:
            super().__init__()
            assert channels == 64

        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    unit = Res2Block(64, 16, attn_layer=Gate)
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(unit(x), x.relu())


def test_grouped_first_unit_is_independent_convolutions() -> None:
    """Grouped by cardinality * scale: every split sees only itself, and none is skipped."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(32, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64))
    unit = Res2Block(32, 16, 2, down, base_width=32, scale=4, cardinality=2, first_block="grouped").eval()
    randomise_norms(unit)
    assert len(unit.convs) == 1
    x = torch.randn(2, 32, 8, 8)
    z = unit.act1(unit.bn1(unit.conv1(x)))
    width = 16  # 16 * 32 // 64 * 2 channels a split
    outs = [
        F.conv2d(part, weight, stride=2, padding=1, groups=2)
        for part, weight in zip(z.split(width, 1), unit.convs[0].weight.split(width, 0), strict=True)
    ]
    z = unit.bns[0](torch.cat(outs, 1)).relu()
    expected = (unit.bn3(unit.conv3(z)) + down(x)).relu()
    torch.testing.assert_close(unit(x), expected)


def test_works_on_a_frozen_input_and_leaves_it() -> None:
    for order in ("norm_act", "act_norm"):
        unit = Res2Block(64, 16, order=order, act_layer=nn.Mish, attn_layer=SEModule)
        x = torch.randn(2, 64, 8, 8)
        kept = x.clone()
        unit(x).sum().backward()
        assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale must be >= 1"),
        ({"act_bias": True}, "act_bias needs order 'act_norm'"),
        ({"order": "act_norm", "conv1_order": "norm_act", "act_bias": True}, "act_bias needs order"),
        ({"base_width": 2}, "leaves splits without channels"),
        ({"reduce_first": 2}, "do not exist in this family"),
        ({"aa_layer": nn.AvgPool2d}, "do not exist in this family"),
    ],
)
def test_refuses_what_it_cannot_honour(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Res2Block(64, 16, **options)


def test_unknown_options_are_errors() -> None:
    with pytest.raises(TypeError, match="scael"):
        Res2Block(64, 16, scael=8)
    with pytest.raises(TypeError, match="scael"):
        Res2Net((1, 1, 1, 1), scael=8)
    with pytest.raises(ModelError, match="output_stride must be 8, 16 or 32, got 4"):
        Res2Net((1, 1, 1, 1), output_stride=4)


def test_stem_refuses_what_it_cannot_honour() -> None:
    with pytest.raises(ModelError, match="needs three widths"):
        StemSpec(order="act_norm")
    with pytest.raises(ModelError, match="act_bias needs order"):
        StemSpec(widths=(32, 32, 64), act_bias=True)


def test_initialisation_is_that_of_the_sources() -> None:
    torch.manual_seed(0)
    model = Res2Net((1, 1, 1, 1), stem=DEEP)
    conv = model.layer4[0].conv3
    assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.02)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    zeroed = Res2Net((1, 1, 1, 1), zero_init_last=True)
    assert (zeroed.layer2[0].bn3.weight == 0).all()
    assert (zeroed.layer2[0].bn1.weight == 1).all()
