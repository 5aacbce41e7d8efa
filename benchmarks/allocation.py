"""Is ScaleNet's learned channel allocation worth anything? A small measured comparison at equal multiply-adds.

For each seed an over-provisioned ScaleNet is trained, its channels are ranked, and these are built under one budget of
multiply-adds, trained from random weights alike, and tested on held-out images:

- ``learned``: the channels that the seed network's BN scales keep
- ``even``:    the same number of channels for every scale, as in the seed network
- ``fine``:    all channels at full resolution, an ordinary bottleneck: is more than one scale of use here at all?

The budget is what the even split with one channel for each channel of the block's 1x1 costs. All arms of one seed share
the images, their order and augmentation, and the seed of their weights. The networks are cut down in depth and width,
so that a CPU can train them many times; see ``--help``.

    python benchmarks/allocation.py --json allocation.json                             (NASA Blue Marble tiles)
    python benchmarks/allocation.py --data path/to/image_folder --json allocation.json

The images of ``--data`` are any folder with one sub-folder per class. Blue Marble tiles are held out by whole squares
of land.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from warmstart import accuracy, interval, train  # the script beside this one

from r2kit.backbones.allocation import Allocation, BlockGammas, CostModel, allocate, even_split, seed_structure
from r2kit.backbones.measure import count_macs
from r2kit.backbones.scalenet import ScaleNet
from r2kit.backbones.scalenet_tables import SCALES, SIDES, Structure
from r2kit.data.datamodule import DataModule
from r2kit.recipe import AugmentSpec, DataSpec

ARMS = ("learned", "even", "fine")


@dataclass
class Seed:
    """What one seed gave."""

    seed: int
    seed_network: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    params: dict[str, int] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    structure: dict[str, Structure] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """Normalised training and test images (N, 3, H, W) and their labels (N,)."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(args: argparse.Namespace, seed: int) -> tuple[Images, int, str]:
    """Return the images of one seed's split, the number of classes, and how they were split."""
    root = None if args.data is None else str(args.data)
    spec = DataSpec(
        root=root, image_size=args.size, limit=args.limit, val_fraction=0.05, test_fraction=args.test, workers=0
    )
    data = DataModule(spec, AugmentSpec(preset="none"), seed=seed, batch_size=args.batch_size)
    data.setup()

    def part(name: str) -> tuple[Tensor, Tensor]:
        rows = data.split.rows(name)
        images = [data.preprocess.apply(data.source.read(row)) for row in rows.tolist()]
        return torch.stack(images), torch.from_numpy(data.labels[rows])

    return Images(*part("train"), *part("test")), len(data.classes), data.split.kind


def fit(
    name: str, structure: Structure, images: Images, classes: int, args: argparse.Namespace, result: Seed
) -> ScaleNet:
    """Train a network of a table from random weights and note the seconds of the processor."""
    torch.manual_seed(1000 + result.seed)
    model = ScaleNet(structure, channels=args.planes, num_classes=classes)
    start = time.process_time()
    train(model, images.x, images.y, args.epochs, args, result.seed, anneal=False)
    result.seconds[name] = round(time.process_time() - start, 1)
    return model


def only_fine(args: argparse.Namespace, budget: int, cost: CostModel) -> Allocation:
    """Return the largest network within the budget whose blocks keep full resolution only."""
    sides = [side for side, count in zip(SIDES, args.blocks, strict=True) for _ in range(count)]
    none = torch.zeros(0)
    blocks = []
    for side in sides:
        planes = args.planes[SIDES.index(side)]
        blocks.append(BlockGammas((torch.ones(len(SCALES) * planes), none, none, none), planes, side))
    return allocate(blocks, macs=budget, cost=cost)


def run_seed(seed: int, args: argparse.Namespace) -> Seed:
    """Train a seed network, allocate, and train and test every arm."""
    result = Seed(seed)
    images, classes, _ = load(args, seed)
    cost = CostModel((3, args.size, args.size), classes)
    even = even_split(args.blocks, args.planes, fraction=1.0, cost=cost)

    wide = fit("seed network", seed_structure(args.blocks, args.planes, args.seed_width), images, classes, args, result)
    result.seed_network = accuracy(wide, images.x_test, images.y_test)
    result.macs["seed network"] = count_macs(wide, cost.input_size)
    for arm in args.arms:
        if arm == "learned":
            allocation = allocate(wide, macs=even.macs, cost=cost)
        else:
            allocation = even if arm == "even" else only_fine(args, even.macs, cost)
        model = fit(arm, allocation.structure, images, classes, args, result)
        result.accuracy[arm] = accuracy(model, images.x_test, images.y_test)
        result.macs[arm], result.params[arm] = allocation.macs, allocation.params
        counts = torch.tensor([row[:-1] for row in allocation.structure]).sum(0)
        result.shares[arm] = [round(float(share), 4) for share in counts / counts.sum()]
        result.structure[arm] = allocation.structure
        print(f"seed {seed} {arm:8s} {result.accuracy[arm]:.3f} ({result.seconds[arm]:.0f} CPU s)", flush=True)
    return result


def shown(values: list[float], sign: str = "") -> str:
    """Return mean and 95 % t-interval in points; one seed has no interval."""
    mean, half = interval(values)
    return f"{mean:{sign}.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:{sign}.1f}"


def table(results: list[Seed]) -> str:
    """Return the results as Markdown."""
    scales = " / ".join(str(scale) for scale in SCALES)
    lines = [
        f"| channels | test accuracy, % | minus `even`, same seed | MMACs | M parameters | % at scale {scales} |",
        "|---|---|---|---|---|---|",
    ]
    for arm in results[0].accuracy:
        own = shown([r.accuracy[arm] for r in results])
        pairs = [r.accuracy[arm] - r.accuracy["even"] for r in results]
        against = "" if arm == "even" else shown(pairs, "+")
        macs = sum(r.macs[arm] for r in results) / len(results) / 1e6
        params = sum(r.params[arm] for r in results) / len(results) / 1e6
        shares = torch.tensor([r.shares[arm] for r in results]).mean(0)
        split = " / ".join(f"{100 * float(share):.0f}" for share in shares)
        lines.append(f"| {arm} | {own} | {against} | {macs:.2f} | {params:.2f} | {split} |")
    own = shown([r.seed_network for r in results])
    macs = sum(r.macs["seed network"] for r in results) / len(results) / 1e6
    lines.append(f"| the seed network | {own} | | {macs:.2f} | | 25 / 25 / 25 / 25 |")
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one sub-folder per class; default: Blue Marble tiles")
    parser.add_argument("--json", type=Path, help="where to write every number; updated after each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="even is always needed")
    parser.add_argument("--size", type=int, default=48, help="side of the images, pixels")
    parser.add_argument("--limit", type=int, help="images at most, balanced over the classes")
    parser.add_argument("--test", type=float, default=0.3, help="share of the images that is held out for the test")
    parser.add_argument("--epochs", type=int, default=12, help="of the seed network and of every arm")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--blocks", type=int, nargs=4, default=[1, 2, 2, 1], help="blocks of each stage")
    parser.add_argument("--planes", type=int, nargs=4, default=[16, 32, 64, 128], help="1x1 channels of each stage")
    parser.add_argument("--seed-width", type=float, default=1.0, help="seed: channels of each scale over planes")
    args = parser.parse_args()
    if "even" not in args.arms:
        parser.error("--arms: the others are compared with even, so it must be among them")

    images, classes, kind = load(args, args.seeds[0])
    print(
        f"{len(images.y)} training and {len(images.y_test)} test images of {classes} classes, split: {kind}, "
        f"{args.size} px; {torch.get_num_threads()} thread(s)",
        flush=True,
    )
    results: list[Seed] = []
    for seed in args.seeds:
        results.append(run_seed(seed, args))
        if args.json:
            options = {k: v for k, v in vars(args).items() if k not in ("data", "json")}
            options["data"] = "bluemarble" if args.data is None else args.data.name
            machine = {"torch": torch.__version__, "cpu": platform.machine(), "threads": torch.get_num_threads()}
            content = {
                "options": options,
                "machine": machine,
                "images": {"train": len(images.y), "test": len(images.y_test), "classes": classes, "split": kind},
                "seeds": [asdict(r) for r in results],
            }
            args.json.write_text(json.dumps(content, indent=1) + "\n")
        print(table(results), flush=True)  # after each seed, for a run that is stopped


if __name__ == "__main__":
    main()
