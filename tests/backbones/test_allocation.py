import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from r2kit.backbones.allocation import (
    BlockGammas,
    CostModel,
    allocate,
    even_split,
    plot_shares,
    rank_channels,
    read_gammas,
    read_structure,
    save_structure,
    seed_structure,
)
from r2kit.backbones.measure import count_macs, count_parameters
from r2kit.backbones.scalenet import ScaleNet
from r2kit.backbones.scalenet_tables import SCALENET50, SCALES, Structure
from r2kit.errors import ModelError

PLANES = (8, 8, 16, 16)
BLOCKS = (1, 1, 2, 1)
COST = CostModel(input_size=(1, 32, 32), num_classes=2)


def build(structure: Structure) -> ScaleNet:
    torch.manual_seed(0)
    return ScaleNet(structure, channels=PLANES, num_classes=2, in_chans=1)


def textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two classes, fine and coarse checks in noise: what tells them apart is scale."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (count,), generator=generator)
    yy, xx = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    fine, coarse = ((yy // 4 + xx // 4) % 2).float(), ((yy // 16 + xx // 16) % 2).float()
    image = torch.where(label[:, None, None] == 1, coarse, fine)[:, None]
    return image + 0.5 * torch.randn(image.shape, generator=generator), label


@pytest.fixture(scope="module")
def trained() -> ScaleNet:
    """A small seed network, trained for a few steps for real."""
    model = build(seed_structure(BLOCKS, PLANES)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = last = 0.0
    for step in range(15):
        image, label = textures(16, seed=step)
        loss = nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.5 * first
    return model.eval()


def test_seed_is_equally_wide_at_every_scale() -> None:
    seed = seed_structure((3, 4, 6, 3))
    assert len(seed) == 16
    assert seed[0] == (64, 64, 64, 64, 56)
    assert seed[-1] == (512, 512, 512, 512, 7)
    assert seed_structure((1, 1, 1, 1), width=0.459)[1] == (59, 59, 59, 59, 28)


def test_ranking_is_by_magnitude_then_scale_then_channel() -> None:
    gammas = [torch.tensor([0.5, -2.0, 0.5]), torch.tensor([0.5]), torch.zeros(0), torch.tensor([-0.5, 3.0])]
    assert rank_channels(gammas) == [(3, 1), (0, 1), (0, 0), (0, 2), (1, 0), (3, 0)]


def test_gammas_are_those_of_the_model() -> None:
    model = build(((3, 0, 2, 1, 56), (1, 1, 1, 1, 28), (1, 1, 1, 1, 14), (2, 1, 0, 4, 7)))
    torch.nn.init.constant_(model.layer1[0].bn2["2"].weight, -7.0)
    blocks = read_gammas(nn.ModuleDict({"inside": model}))
    assert [(block.planes, block.side, block.available) for block in blocks] == [
        (8, 56, 6),
        (8, 28, 4),
        (16, 14, 4),
        (16, 7, 7),
    ]
    assert [len(gamma) for gamma in blocks[0].gammas] == [3, 0, 2, 1]
    assert blocks[0].gammas[2].tolist() == [-7.0, -7.0]


def test_selection_is_within_each_block_never_across() -> None:
    """A block whose scales are all small keeps as many channels as one whose scales are all large."""

    def block(side: int, size: float, favoured: int) -> BlockGammas:
        gammas = [torch.full((10,), size) for _ in SCALES]
        gammas[favoured] = torch.full((10,), 2 * size)
        return BlockGammas((gammas[0], gammas[1], gammas[2], gammas[3]), 10, side)

    blocks = [block(56, 100.0, 0), block(28, 0.01, 1), block(14, 1.0, 2), block(7, 1.0, 3)]
    found = allocate(blocks, fraction=1.3, cost=COST)
    # Thirteen each: the favoured scale first, ties to the finest of the others.
    assert found.structure == ((10, 3, 0, 0, 56), (3, 10, 0, 0, 28), (3, 0, 10, 0, 14), (3, 0, 0, 10, 7))
    assert found.fraction == 1.3


@pytest.mark.parametrize(
    ("fraction", "sums"),
    [(1.0, [64, 128, 256, 512]), (1.36, [88, 175, 349, 697]), (1.332, [86, 171, 341, 682]), (1.1, [71, 141, 282, 564])],
)
def test_a_fraction_gives_the_published_budgets(fraction: float, sums: list[int]) -> None:
    found = even_split((1, 1, 1, 1), fraction=fraction, cost=CostModel((3, 32, 32), 2))
    assert [sum(row[:-1]) for row in found.structure] == sums


def test_a_product_that_floating_point_overshoots_is_not_rounded_up() -> None:
    assert 0.07 * 100 > 7
    found = even_split((1, 1, 1, 1), (100, 100, 100, 100), fraction=0.07, cost=COST)
    assert [sum(row[:-1]) for row in found.structure] == [7] * 4


def test_counts_per_stage(trained: ScaleNet) -> None:
    found = allocate(trained, per_stage=(9, 11, 13, 30), cost=COST)
    assert [sum(row[:-1]) for row in found.structure] == [9, 11, 13, 13, 30]
    assert found.fraction is None


def test_cost_is_exact(trained: ScaleNet) -> None:
    found = allocate(trained, fraction=1.0, cost=COST)
    model = build(found.structure)
    assert (count_macs(model, COST.input_size), count_parameters(model)) == (found.macs, found.params)


def test_trained_network_allocates_under_a_multiply_add_budget(trained: ScaleNet) -> None:
    budget = int(0.9 * count_macs(trained, COST.input_size))  # the stem alone is 0.8 of so narrow a network
    found = allocate(trained, macs=budget, cost=COST)
    again = allocate(read_gammas(trained), fraction=found.fraction, cost=COST)
    even = even_split(BLOCKS, PLANES, macs=budget, cost=COST)
    assert found == again
    assert 0.98 * budget < found.macs <= budget
    assert 0.98 * budget < even.macs <= budget
    assert found.structure != even.structure

    # It is the largest: the next fraction that changes a count is too dear.
    step = 1 / 16  # the least common multiple of the planes
    assert allocate(trained, fraction=found.fraction + step, cost=COST).macs > budget

    # What stays is what trained to the largest scales: in each block, no channel that went beats one that stayed.
    for block, row in zip(read_gammas(trained), found.structure, strict=True):
        values = [gamma.abs().sort(descending=True).values for gamma in block.gammas]
        kept = torch.cat([v[:n] for v, n in zip(values, row, strict=False)])
        gone = torch.cat([v[n:] for v, n in zip(values, row, strict=False)])
        assert kept.min() >= gone.max()

    image, label = textures(4, seed=99)
    loss = nn.functional.cross_entropy(build(found.structure)(image), label)
    loss.backward()
    assert loss.isfinite()


def test_even_split_gives_the_rest_to_the_finer_scales() -> None:
    found = even_split((1, 1, 1, 1), (8, 8, 8, 8), per_stage=(4, 5, 6, 7), cost=COST)
    assert found.structure == ((1, 1, 1, 1, 56), (2, 1, 1, 1, 28), (2, 2, 1, 1, 14), (2, 2, 2, 1, 7))


def test_table_travels_as_json(trained: ScaleNet, tmp_path: Path) -> None:
    found = allocate(trained, fraction=0.75, cost=COST)
    path = tmp_path / "structure.json"
    save_structure(found.structure, path)
    assert read_structure(path) == found.structure
    assert json.loads(path.read_text())[0] == list(found.structure[0])


def test_plot_shows_shares_by_depth() -> None:
    figure = plot_shares(SCALENET50, "ScaleNet-50")
    (axes,) = figure.axes
    assert len(axes.patches) == 4 * 16
    heights = [patch.get_height() for patch in axes.patches]
    assert [sum(heights[block::16]) for block in range(16)] == pytest.approx([100.0] * 16)
    assert heights[0] == pytest.approx(100 * 62 / 88)
    assert [text.get_text() for text in axes.texts] == ["stage 1", "stage 2", "stage 3", "stage 4"]
    assert axes.get_title() == "ScaleNet-50"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one budget"),
        ({"fraction": 1.0, "macs": 10**6}, "give exactly one budget"),
        ({"fraction": 0.0}, "fraction must be above 0"),
        ({"fraction": 4.5}, "at most 4, what the seed network has, got 4.5"),
        ({"per_stage": (1, 2, 3)}, r"per_stage needs four counts, got \[1, 2, 3\]"),
        ({"per_stage": (1, 1, 1, 65)}, "block 5 has 64 channels, 65 were asked for"),
        ({"per_stage": (0, 1, 1, 1)}, "block 1 has 32 channels, 0 were asked for"),
        ({"macs": 1000}, "1,000 multiply-adds cannot be met: one channel per block needs"),
        ({"macs": 10**12}, "leaves nothing to choose"),
    ],
)
def test_impossible_budgets(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        allocate(build(seed_structure(BLOCKS, PLANES)), cost=COST, **options)


def test_other_impossible_requests() -> None:
    with pytest.raises(ModelError, match="needs a ScaleNet, Linear has no"):
        read_gammas(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="width of the seed network must be positive"):
        seed_structure(width=0)
    with pytest.raises(ModelError, match="blocks must be four positive numbers"):
        seed_structure((3, 4, 6))
    with pytest.raises(ModelError, match="planes must be four positive numbers"):
        even_split((1, 1, 1, 1), (8, 8), fraction=1.0)
    model = build(seed_structure(BLOCKS, PLANES))
    nn.init.constant_(model.layer2[0].bn2["1"].weight, float("nan"))
    with pytest.raises(ModelError, match=r"layer2\.0\.bn2\.1: its scale is not finite"):
        allocate(model, fraction=1.0)
    bare = ScaleNet(seed_structure(BLOCKS, PLANES), channels=PLANES, norm_layer=nn.Identity)
    with pytest.raises(ModelError, match="Identity has no scale"):
        read_gammas(bare)
    with pytest.raises(ModelError, match="blocks of side 28 must exist"):
        allocate([b for b in read_gammas(build(seed_structure(BLOCKS, PLANES))) if b.side != 28], fraction=1.0)
