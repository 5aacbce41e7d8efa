"""Files as the authors' own code writes them load as they are: names and shapes written down here from that code."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch

from r2kit.backbones import create_model
from r2kit.backbones._fit import fit_first_conv, without_memory

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def norm(name: str, width: int) -> Shapes:
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{leaf}", (width,)
    yield f"{name}.num_batches_tracked", ()


def stem(deep: bool, width: int = 32) -> Shapes:
    """The 7x7 convolution of v1; the three 3x3 of v1b and of ResNeSt."""
    if not deep:
        yield "conv1.weight", (64, 3, 7, 7)
    else:
        widths = (3, width, width, 2 * width)
        for index, (chs_in, chs_out) in enumerate(pairwise(widths)):
            yield f"conv1.{3 * index}.weight", (chs_out, chs_in, 3, 3)
            if index < 2:
                yield from norm(f"conv1.{3 * index + 1}", chs_out)
    yield from norm("bn1", 2 * width if deep else 64)


def unit_ends(block: str, chs_in: int, planes: int, width: int, first: bool, pooled: bool) -> Shapes:
    """What is around the 3x3 convolutions of every bottleneck. A pool in front moves the projection up by one."""
    yield f"{block}.conv1.weight", (width, chs_in, 1, 1)
    yield from norm(f"{block}.bn1", width)
    yield f"{block}.conv3.weight", (4 * planes, width, 1, 1)
    yield from norm(f"{block}.bn3", 4 * planes)
    if first:
        yield f"{block}.downsample.{int(pooled)}.weight", (4 * planes, chs_in, 1, 1)
        yield from norm(f"{block}.downsample.{int(pooled) + 1}", 4 * planes)


def stages(layers: Sequence[int]) -> Iterator[tuple[str, int, int, bool]]:
    """Name, channels in, planes, and whether it is the first of its stage, of every block."""
    chs_in = 64
    for stage, (depth, planes) in enumerate(zip(layers, (64, 128, 256, 512), strict=True), start=1):
        for index in range(depth):
            yield f"layer{stage}.{index}", chs_in, planes, index == 0
            chs_in = 4 * planes


def classifier() -> Shapes:
    yield "fc.weight", (1000, 2048)
    yield "fc.bias", (1000,)


def res2net(layers: Sequence[int], base_width: int, scale: int, v1b: bool, cardinality: int = 1) -> Shapes:
    """As `res2net.py`, `res2net_v1b.py` and `res2next.py` name them."""
    yield from stem(v1b)
    for block, chs_in, planes, first in stages(layers):
        width = planes * base_width // 64 * cardinality
        yield from unit_ends(block, chs_in, planes, width * scale, first, v1b)
        for split in range(scale - 1):
            yield f"{block}.convs.{split}.weight", (width, width // cardinality, 3, 3)
            yield from norm(f"{block}.bns.{split}", width)
    yield from classifier()


def resnest(layers: Sequence[int], radix: int, cardinality: int, base_width: int) -> Shapes:
    """As `resnet.py` and `splat.py` of ResNeSt name them, the fast networks and the others alike."""
    yield from stem(deep=True)
    for block, chs_in, planes, first in stages(layers):
        width = planes * base_width // 64 * cardinality
        yield from unit_ends(block, chs_in, planes, width, first, pooled=True)
        attention, inter = f"{block}.conv2", max(width * radix // 4, 32)
        yield f"{attention}.conv.weight", (radix * width, width // (cardinality * radix), 3, 3)
        yield from norm(f"{attention}.bn0", radix * width)
        yield f"{attention}.fc1.weight", (inter, width // cardinality, 1, 1)
        yield f"{attention}.fc1.bias", (inter,)
        yield from norm(f"{attention}.bn1", inter)
        yield f"{attention}.fc2.weight", (radix * width, inter // cardinality, 1, 1)
        yield f"{attention}.fc2.bias", (radix * width,)
    yield from classifier()


OF_50, OF_101, OF_152, OF_200 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 12, 48, 3)
FILES = {
    "res2net50_26w_4s": res2net(OF_50, 26, 4, v1b=False),
    "res2net50_48w_2s": res2net(OF_50, 48, 2, v1b=False),
    "res2net50_14w_8s": res2net(OF_50, 14, 8, v1b=False),
    "res2net50_26w_8s": res2net(OF_50, 26, 8, v1b=False),
    "res2net50_18w_4s": res2net(OF_50, 18, 4, v1b=False),
    "res2net50_18w_6s": res2net(OF_50, 18, 6, v1b=False),
    "res2net152_26w_4s": res2net(OF_152, 26, 4, v1b=False),
    "res2next50": res2net(OF_50, 4, 4, v1b=False, cardinality=8),
    "res2net50d": res2net(OF_50, 26, 4, v1b=True),
    "res2net101d": res2net(OF_101, 26, 4, v1b=True),
    "res2net152d": res2net(OF_152, 26, 4, v1b=True),
    "res2net200d": res2net(OF_200, 26, 4, v1b=True),
    "resnest50d": resnest(OF_50, 2, 1, 64),
    "resnest50d_1s1x64d": resnest(OF_50, 1, 1, 64),
    "resnest50d_2s1x64d": resnest(OF_50, 2, 1, 64),
    "resnest50d_4s1x64d": resnest(OF_50, 4, 1, 64),
    "resnest50d_1s2x40d": resnest(OF_50, 1, 2, 40),
    "resnest50d_2s2x40d": resnest(OF_50, 2, 2, 40),
    "resnest50d_4s2x40d": resnest(OF_50, 4, 2, 40),
    "resnest50d_1s4x24d": resnest(OF_50, 1, 4, 24),
}
ALL = {name: dict(shapes) for name, shapes in FILES.items()}


@pytest.mark.parametrize("name", ALL)
def test_names_and_shapes_are_the_authors(name: str) -> None:
    assert {key: tuple(t.shape) for key, t in without_memory(name).state_dict().items()} == ALL[name]


@pytest.mark.parametrize("name", ["res2net50_18w_4s", "res2net152d", "resnest50d_1s1x64d", "resnest50d_2s2x40d"])
@pytest.mark.parametrize("in_chans", [3, 13])
def test_a_file_loads_strictly(tmp_path: Path, name: str, in_chans: int) -> None:
    # One number for each tensor, so that the file is small.
    numbers = {key: (0.5 + index / 2048) for index, key in enumerate(ALL[name])}
    state = {
        key: torch.tensor(7) if key.endswith("tracked") else torch.tensor(numbers[key]).expand(shape)
        for key, shape in ALL[name].items()
    }
    torch.save(state, tmp_path / "published.pth")
    model = create_model(name, pretrained=tmp_path / "published.pth", in_chans=in_chans, num_classes=4)
    report = model.load_report
    assert report.left_out == report.missing == ("fc.bias", "fc.weight")
    assert report.classifier == "as initialised: 1000 classes in the file, 4 in the model"
    first = f"{model.pretrained_cfg['first_conv']}.weight"
    scale = 3 / in_chans  # the kernels are alike, so that every band has the same
    for key, tensor in model.state_dict().items():
        if not key.startswith("fc.") and not key.endswith("tracked"):
            wanted = numbers[key] * (scale if key == first else 1)
            assert torch.allclose(tensor, torch.tensor(wanted)), key


# One of each kind of first convolution.
@pytest.mark.parametrize(
    "name",
    ["res2net50_18w_4s", "res2netplus50d", "blres2net50", "scalenet50_light", "cifar_resnext29_8c64w", "resnest14d"],
)
def test_weights_for_three_bands_start_any_from_one_to_thirteen(name: str) -> None:
    """By timm's own rule, as when it loads its published weights."""
    plain = without_memory(name)
    key = f"{plain.pretrained_cfg['first_conv']}.weight"
    kernels = torch.randn(plain.state_dict()[key].shape)
    for bands in range(1, 14) if name == "resnest14d" else (1, 13):
        with torch.device("meta"):
            model = timm.create_model(name, in_chans=bands)
        state = {key: kernels}
        said = fit_first_conv(state, model.state_dict(), model, "repeat", None)
        assert state[key].shape == model.state_dict()[key].shape
        torch.testing.assert_close(state[key], timm.models.adapt_input_conv(bands, kernels))
        assert bool(said) == (bands != 3)
