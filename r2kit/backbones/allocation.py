"""Learned channel allocation for ScaleNet: from a trained seed network to a channel table.

1. `seed_structure` gives an over-provisioned network, all four scales of a block equally wide; train it as usual.
2. `read_gammas` reads from it, per block and scale, the BN scale behind each channel of the scale convolutions.
3. `allocate` ranks the channels by |gamma| *within each block*, all scales together, and keeps the best ones under a
   budget of channels or of multiply-adds. What survives, counted per scale, is the table.
4. Build the network from the table and train it from random weights: the seed's weights are not used again.

`even_split` is the control at the same budget: the same channels for each scale. `plot_shares` draws a table.

What the authors' sources say and what is inferred. Said: equal widths in the seed, the BN scale as the score, ranking
within a block and never across blocks, no rounding of the counts, training of the final network from scratch. Inferred:
the absolute value; the seed's width (the published tables fit a seed of `planes` channels per scale, the light one of
0.46 of that); the budget as one fraction for the whole network, ``ceil(fraction * planes)`` channels in a block (the
published tables fit 1.0 for light, about 1.36 for 50, 1.332 for 101 and 1.396 for 152). Ties are broken here by the
finer scale, then the lower channel.

Source: Li et al. 2019, arXiv:1904.09460; issues 1 and 4 of github.com/Eli-YiLi/ScaleNet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from r2kit.backbones.measure import count_macs, count_parameters
from r2kit.backbones.scalenet import ScaleBlock, ScaleNet
from r2kit.backbones.scalenet_tables import SCALES, SIDES, Row, Structure, read_structure, save_structure, stages_of
from r2kit.errors import ModelError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Allocation",
    "BlockGammas",
    "CostModel",
    "allocate",
    "even_split",
    "plot_shares",
    "rank_channels",
    "read_gammas",
    "read_structure",
    "save_structure",
    "seed_structure",
]

PLANES = (64, 128, 256, 512)
"""Channels of the four stages' 1x1 bottlenecks in the published networks."""


@dataclass(frozen=True)
class BlockGammas:
    """The BN scales of one block of a trained seed network.

    Args:
        gammas: For each of the scales 1, 2, 4, 7 a vector (channels,), empty for a scale without channels.
        planes: Channels of the block's 1x1 bottleneck.
        side: Side of the block's map for a 224-px image.
    """

    gammas: tuple[Tensor, Tensor, Tensor, Tensor]
    planes: int
    side: int

    @property
    def available(self) -> int:
        """Channels of the block, all scales together."""
        return sum(len(gamma) for gamma in self.gammas)


@dataclass(frozen=True)
class CostModel:
    """What a multiply-add budget is counted for: the network's ends and the image.

    Args:
        input_size: (C, H, W) of the image.
        num_classes: Outputs of the classifier.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    num_classes: int = 1000

    def macs(self, structure: Structure, planes: Sequence[int]) -> int:
        """Return the exact multiply-adds of the network, traced on the meta device."""
        # Norms and activations cost no multiply-adds, and leaving them out halves the time of a trace.
        return count_macs(self._build(structure, planes, nn.Identity, nn.Identity), self.input_size)

    def params(self, structure: Structure, planes: Sequence[int]) -> int:
        """Return the exact parameters of the network."""
        return count_parameters(self._build(structure, planes))

    def _build(
        self,
        structure: Structure,
        planes: Sequence[int],
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
    ) -> ScaleNet:
        """Build the network without memory."""
        return ScaleNet(
            structure,
            channels=planes,
            act_layer=act_layer,
            norm_layer=norm_layer,
            num_classes=self.num_classes,
            in_chans=self.input_size[0],
            device="meta",
        )


@dataclass(frozen=True)
class Allocation:
    """A channel table and what it costs.

    Args:
        structure: Rows ``(n1, n2, n4, n7, side)``, for ``structure=`` of a ScaleNet.
        fraction: Channels of each block over its `planes`; None where counts per stage were given.
        macs: Exact multiply-adds of the network for one image of the cost model.
        params: Exact parameters of the network.
    """

    structure: Structure
    fraction: float | None
    macs: int
    params: int


def seed_structure(
    blocks: Sequence[int] = (3, 4, 6, 3), planes: Sequence[int] = PLANES, width: float = 1.0
) -> Structure:
    """Return the table of an over-provisioned network: the same channels at every scale of a block.

    Args:
        blocks: Blocks of the four stages.
        planes: Channels of the four stages' 1x1 bottlenecks.
        width: Channels of each scale over `planes`; at least one channel.

    Raises:
        ModelError: If there are not four stages with a block each, or the width is not positive.
    """
    _check_stages(blocks, planes)
    if not width > 0:
        raise ModelError(f"width of the seed network must be positive, got {width}")
    rows: list[Row] = []
    for count, plane, side in zip(blocks, planes, SIDES, strict=True):
        n = max(1, round(width * plane))
        rows += [(n, n, n, n, side)] * count
    return tuple(rows)


def read_gammas(model: nn.Module) -> list[BlockGammas]:
    """Read the BN scales of a ScaleNet's blocks, in forward order, as float64 on the CPU.

    Args:
        model: A ScaleNet, or a module that holds one (a Lightning module, a compiled or distributed wrapper).

    Raises:
        ModelError: If there is no scale-aggregation block, a norm has no scale, or a scale is not finite.
    """
    found = []
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, ScaleBlock)]
    if not blocks:
        raise ModelError(f"channel allocation needs a ScaleNet, {type(model).__name__} has no scale-aggregation block")
    for name, block in blocks:
        gammas = [torch.zeros(0, dtype=torch.float64)] * len(SCALES)
        for key, norm in block.bn2.items():
            weight = getattr(norm, "weight", None)
            if not isinstance(weight, Tensor):
                raise ModelError(f"{name}.bn2.{key}: {type(norm).__name__} has no scale to rank channels by")
            if not bool(weight.isfinite().all()):
                raise ModelError(f"{name}.bn2.{key}: its scale is not finite; the seed network has diverged")
            gammas[int(key)] = weight.detach().cpu().double()
        found.append(BlockGammas((gammas[0], gammas[1], gammas[2], gammas[3]), block.planes, block.row[-1]))
    return found


def rank_channels(gammas: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Rank the channels of one block, best first: |gamma| descending, then scale index, then channel, ascending.

    Args:
        gammas: One vector (channels,) per scale.

    Returns:
        Pairs of scale index and channel.
    """
    channels = [
        (-value, scale, channel)
        for scale, gamma in enumerate(gammas)
        for channel, value in enumerate(gamma.detach().abs().double().tolist())
    ]
    return [(scale, channel) for _, scale, channel in sorted(channels)]


def allocate(
    source: nn.Module | Sequence[BlockGammas],
    *,
    fraction: float | None = None,
    per_stage: Sequence[int] | None = None,
    macs: int | None = None,
    cost: CostModel = CostModel(),
) -> Allocation:
    """Keep the best channels of every block under one budget.

    Args:
        source: A trained seed network, or what `read_gammas` gave.
        fraction: Keep ``ceil(fraction * planes)`` channels in each block.
        per_stage: Keep this many channels in each block of the four stages.
        macs: Keep the largest fraction whose network has at most this many multiply-adds for one image.
        cost: What multiply-adds are counted for.

    Returns:
        The table. A block never keeps fewer than one channel or more than it has.

    Raises:
        ModelError: If not exactly one budget is given, or it cannot be met.
    """
    blocks = read_gammas(source) if isinstance(source, nn.Module) else list(source)
    planes = _planes_of(blocks)
    ranks = [rank_channels(block.gammas) for block in blocks]

    def build(counts: Sequence[int]) -> Structure:
        rows: list[Row] = []
        for block, ranked, count in zip(blocks, ranks, counts, strict=True):
            kept = [scale for scale, _ in ranked[:count]]
            n1, n2, n4, n7 = (kept.count(scale) for scale in range(len(SCALES)))
            rows.append((n1, n2, n4, n7, block.side))
        return read_structure(rows)

    return _fit(build, blocks, planes, fraction, per_stage, macs, cost)


def even_split(
    blocks: Sequence[int] = (3, 4, 6, 3),
    planes: Sequence[int] = PLANES,
    width: float = 1.0,
    *,
    fraction: float | None = None,
    per_stage: Sequence[int] | None = None,
    macs: int | None = None,
    cost: CostModel = CostModel(),
) -> Allocation:
    """Share every block's channels evenly among the scales, under the same kind of budget as `allocate`.

    What four does not divide goes to the finer scales. With `macs` the result has at most as many multiply-adds as the
    budget, and so compares with an `allocate` of the same budget.

    Args:
        blocks: Blocks of the four stages.
        planes: Channels of the four stages' 1x1 bottlenecks.
        width: Most channels of one scale over `planes`, as in the seed network.
        fraction: See `allocate`.
        per_stage: See `allocate`.
        macs: See `allocate`.
        cost: See `allocate`.

    Raises:
        ModelError: See `allocate` and `seed_structure`.
    """
    seed = seed_structure(blocks, planes, width)
    equal = [
        BlockGammas((torch.ones(n1), torch.ones(n2), torch.ones(n4), torch.ones(n7)), planes[SIDES.index(side)], side)
        for n1, n2, n4, n7, side in seed
    ]

    def build(counts: Sequence[int]) -> Structure:
        rows: list[Row] = []
        for block, count in zip(equal, counts, strict=True):
            share, rest = divmod(count, len(SCALES))
            n1, n2, n4, n7 = (share + (scale < rest) for scale in range(len(SCALES)))
            rows.append((n1, n2, n4, n7, block.side))
        return read_structure(rows)

    return _fit(build, equal, tuple(planes), fraction, per_stage, macs, cost)


def plot_shares(structure: Sequence[Sequence[int]], title: str = "") -> Figure:
    """Draw what share of each block's channels every scale has, by depth.

    Args:
        structure: A channel table.
        title: Title of the figure.

    Raises:
        ModelError: If the table is not of the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    table = read_structure(structure)
    figure = Figure(figsize=(max(6.0, 0.22 * len(table) + 2.5), 3.6), layout="constrained")
    axes = figure.add_subplot()
    depths = range(1, len(table) + 1)
    bottoms = [0.0] * len(table)
    colors = ("#1b4f72", "#2e86c1", "#85c1e9", "#d6eaf8")  # one hue, finer is darker: reads in grey too
    for index, (scale, color) in enumerate(zip(SCALES, colors, strict=True)):
        shares = [100 * row[index] / sum(row[:-1]) for row in table]
        axes.bar(depths, shares, bottom=bottoms, width=0.92, color=color, label=f"scale {scale}")
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
    edge = 0.5
    for stage, rows in enumerate(stages_of(table), start=1):
        middle = edge + len(rows) / 2
        axes.annotate(f"stage {stage}", (middle, 101), ha="center", va="bottom", fontsize=8, annotation_clip=False)
        edge += len(rows)
        if stage < len(SIDES):
            axes.axvline(edge, color="black", linewidth=0.8)
    axes.set(xlim=(0.5, len(table) + 0.5), ylim=(0, 100), xlabel="block", ylabel="share of channels (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title:
        axes.set_title(title, pad=16)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _fit(
    build: Callable[[Sequence[int]], Structure],
    blocks: Sequence[BlockGammas],
    planes: Sequence[int],
    fraction: float | None,
    per_stage: Sequence[int] | None,
    macs: int | None,
    cost: CostModel,
) -> Allocation:
    """Turn one of the three budgets into a count for each block, build the table and price it."""
    if sum(budget is not None for budget in (fraction, per_stage, macs)) != 1:
        raise ModelError("give exactly one budget: fraction, per_stage or macs")

    def counts_at(fraction: float) -> list[int]:
        # The slack keeps ceil(0.07 * 100) at 7 although the product is 7.000000000000001.
        wanted = (math.ceil(fraction * block.planes - 1e-9) for block in blocks)
        return [min(max(1, count), block.available) for count, block in zip(wanted, blocks, strict=True)]

    if per_stage is not None:
        if len(per_stage) != len(SIDES):
            raise ModelError(f"per_stage needs four counts, got {list(per_stage)}")
        counts = [per_stage[SIDES.index(block.side)] for block in blocks]
        for number, (count, block) in enumerate(zip(counts, blocks, strict=True), start=1):
            if not 1 <= count <= block.available:
                raise ModelError(f"per_stage: block {number} has {block.available} channels, {count} were asked for")
    elif fraction is not None:
        most = min(block.available / block.planes for block in blocks)
        if not 0 < fraction <= most:
            raise ModelError(
                f"fraction must be above 0 and at most {most:g}, what the seed network has, got {fraction}"
            )
        counts = counts_at(fraction)
    else:
        assert macs is not None
        fraction = _largest_fraction(lambda f: cost.macs(build(counts_at(f)), planes), blocks, macs)
        counts = counts_at(fraction)
    structure = build(counts)
    return Allocation(structure, fraction, cost.macs(structure, planes), cost.params(structure, planes))


def _largest_fraction(macs_at: Callable[[float], int], blocks: Sequence[BlockGammas], budget: int) -> float:
    """Bisect for the largest fraction within the budget; the counts, and so the cost, never fall as it grows."""
    # Between two multiples of 1 / lcm no block's count changes, so an exact search needs to look at these alone.
    grid = math.lcm(*(block.planes for block in blocks))
    low, high = 1, math.ceil(max(block.available / block.planes for block in blocks) * grid)
    smallest = macs_at(low / grid)
    if smallest > budget:
        raise ModelError(
            f"a budget of {budget:,} multiply-adds cannot be met: one channel per block needs {smallest:,}"
        )
    largest = macs_at(high / grid)
    if largest <= budget:
        raise ModelError(
            f"a budget of {budget:,} multiply-adds leaves nothing to choose: all channels of the seed network need "
            f"{largest:,}; give a smaller budget or train a wider seed"
        )
    while low < high:  # the answer is within [low, high]
        middle = (low + high + 1) // 2
        if macs_at(middle / grid) <= budget:
            low = middle
        else:
            high = middle - 1
    return low / grid


def _planes_of(blocks: Sequence[BlockGammas]) -> tuple[int, ...]:
    """Return the planes of the four stages."""
    planes = []
    for side in SIDES:
        widths = {block.planes for block in blocks if block.side == side}
        if len(widths) != 1:
            raise ModelError(f"blocks of side {side} must exist and have the same planes, got {sorted(widths)}")
        planes.append(widths.pop())
    return tuple(planes)


def _check_stages(blocks: Sequence[int], planes: Sequence[int]) -> None:
    """Refuse anything but four stages."""
    if len(blocks) != len(SIDES) or min(blocks) < 1:
        raise ModelError(f"blocks must be four positive numbers, one per stage, got {list(blocks)}")
    if len(planes) != len(SIDES) or min(planes) < 1:
        raise ModelError(f"planes must be four positive numbers, one per stage, got {list(planes)}")
