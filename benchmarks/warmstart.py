"""What is the warm start of Res2NetPlus worth? A small measured experiment on real images.

A small ReLU Res2Net (the source) is trained on half of the classes of an image folder. Then, on a few images of each of
the other classes, these are trained alike and tested on the rest:

- ``scratch``:   Res2NetPlus from random weights
- ``source``:    the ReLU network itself, fine-tuned
- ``converted``: Res2NetPlus converted from it, beta annealed from 25 to 1 over the first half
- ``jump``:      Res2NetPlus converted from it, but with Mish from the first step

All arms of one seed share the source, the images, and the order and augmentation of the batches. Every network is the
50-layer d-skeleton cut down in depth and width, so that a CPU can train it many times; see ``--help``.

    python benchmarks/warmstart.py --data path/to/image_folder --json warmstart.json

The images are any folder with one sub-folder per class.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from r2kit.backbones import create_model
from r2kit.backbones._res2 import StemSpec
from r2kit.backbones.warmstart import START_BETA, anneal_beta, convert, finalize, set_beta

ARMS = ("scratch", "source", "converted", "jump")
BETAS = (1e6, 25.0, 10.0, 5.0, 2.0, 1.0)
ENDINGS = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}


@dataclass
class Seed:
    """What one seed gave."""

    seed: int
    source_accuracy: float = 0.0
    logit_difference: float = 0.0
    accuracy_by_beta: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def load(root: Path, size: int, per_class: int | None) -> tuple[Tensor, Tensor, list[str]]:
    """Return images (N, 3, size, size) uint8, labels (N,) and class names of a folder of class folders."""
    names = sorted(p.name for p in root.iterdir() if p.is_dir())
    images, labels = [], []
    for label, name in enumerate(names):
        files = sorted(p for p in (root / name).iterdir() if p.suffix.lower() in ENDINGS)[:per_class]
        for file in files:
            with Image.open(file) as image:
                small = image.convert("RGB").resize((size, size), Image.Resampling.BOX)
            images.append(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels), names


def split(labels: Tensor, train: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the indices of `train` images of each class, and of all others."""
    first, rest = [], []
    for label in labels.unique().tolist():
        index = torch.nonzero(labels == label).flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        first.append(index[:train])
        rest.append(index[train:])
    return torch.cat(first), torch.cat(rest)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield shuffled index batches of one epoch; the last, short one is dropped."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn and flip each image at random: seen from above, there is no up."""
    turn = torch.randint(0, 4, (len(x),), generator=generator)
    flip = torch.rand(len(x), generator=generator) < 0.5
    out = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, turn, strict=True)])
    return torch.where(flip[:, None, None, None], out.flip(3), out)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(128)])
    return float((logits.argmax(1) == y).float().mean())


def train(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int, args: argparse.Namespace, seed: int, anneal: bool
) -> None:
    """Train in place: AdamW, one epoch of warm-up, cosine, label smoothing 0.1."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(y) // args.batch_size
    steps = epochs * per_epoch
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    model.train()
    step = 0
    for _ in range(epochs):
        for index in batches(len(y), args.batch_size, generator):
            warm = min(1.0, (step + 1) / per_epoch)
            rate = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            if anneal:
                set_beta(model, anneal_beta(step / steps))
            optimizer.zero_grad()
            F.cross_entropy(model(augment(x[index], generator)), y[index], label_smoothing=0.1).backward()
            optimizer.step()
            step += 1


def relu_net(classes: int, args: argparse.Namespace) -> nn.Module:
    """Return the small source network."""
    shape = {"layers": args.layers, "channels": args.channels, "stem_width": args.stem_width}
    return create_model("res2net50d", num_classes=classes, zero_init_last=False, **shape)


def plus_net(classes: int, args: argparse.Namespace) -> nn.Module:
    """Return the Res2NetPlus of the same shape."""
    stem = StemSpec((args.stem_width, args.stem_width, 2 * args.stem_width), order="act_norm", act_bias=True)
    return create_model("res2netplus50d", num_classes=classes, layers=args.layers, channels=args.channels, stem=stem)


def run_seed(seed: int, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Seed:
    """Train a source, convert it, and train and test every arm."""
    result = Seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randperm(int(labels.max()) + 1, generator=generator)
    half = len(classes) // 2

    def task(chosen: Tensor, per_class: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return normalised train and test images and labels of the chosen classes."""
        index = torch.nonzero(torch.isin(labels, chosen)).flatten()
        y = torch.searchsorted(chosen.sort().values, labels[index])
        first, rest = split(y, per_class, generator)
        x = images[index].float() / 255
        mean, std = x[first].mean((0, 2, 3), keepdim=True), x[first].std((0, 2, 3), keepdim=True)
        x = (x - mean) / std
        return x[first], y[first], x[rest], y[rest]

    def timed(name: str, model: nn.Module, x: Tensor, y: Tensor, epochs: int, anneal: bool = False) -> nn.Module:
        """Train, and note the seconds."""
        start = time.process_time()
        train(model, x, y, epochs, args, seed, anneal)
        result.seconds[name] = round(time.process_time() - start, 1)
        return model

    x, y, x_test, y_test = task(classes[:half], args.source_train)
    torch.manual_seed(seed)
    source = timed("pretraining", relu_net(half, args), x, y, args.source_epochs)
    result.source_accuracy = accuracy(source, x_test, y_test)
    twin = plus_net(half, args)
    convert(source, twin, x.split(128), beta=BETAS[0], max_images=args.calibration)
    twin.eval()
    with torch.no_grad():
        result.logit_difference = float((source(x_test[:128]) - twin(x_test[:128])).abs().max())
    for beta in BETAS:
        set_beta(twin, beta)
        result.accuracy_by_beta[f"{beta:g}"] = accuracy(twin, x_test, y_test)

    pretrained = {k: v.clone() for k, v in source.state_dict().items() if not k.startswith("fc.")}
    classes_left = len(classes) - half
    x, y, x_test, y_test = task(classes[half:], args.target_train)
    for arm in ARMS:
        torch.manual_seed(1000 + seed)
        if arm == "scratch":
            model = plus_net(classes_left, args)
        else:
            model = relu_net(classes_left, args)
            model.load_state_dict(pretrained, strict=False)
            if arm != "source":
                plus = plus_net(classes_left, args)
                convert(model, plus, x.split(128), beta=START_BETA if arm == "converted" else 1.0)
                model = plus
        timed(arm, model, x, y, args.target_epochs, anneal=arm == "converted")
        result.accuracy[arm] = accuracy(finalize(model) if arm != "source" else model, x_test, y_test)
        print(f"seed {seed} {arm:10s} {result.accuracy[arm]:.3f} ({result.seconds[arm]:.0f} CPU s)", flush=True)
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % t-interval, in points."""
    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, 100 * float(half)


def table(results: list[Seed]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| start | test accuracy, % | minus `source`, same seed | minus `scratch`, same seed |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        own = [r.accuracy[arm] for r in results]
        cells = ["{:.1f} ± {:.1f}".format(*interval(own))]
        for other in ("source", "scratch"):
            pairs = [r.accuracy[arm] - r.accuracy[other] for r in results]
            cells.append("" if arm == other else "{:+.1f} ± {:.1f}".format(*interval(pairs)))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", "| source task, never trained again | accuracy, % |", "|---|---|"]
    lines.append("| the ReLU source | {:.1f} ± {:.1f} |".format(*interval([r.source_accuracy for r in results])))
    for beta in BETAS:
        values = [r.accuracy_by_beta[f"{beta:g}"] for r in results]
        lines.append("| converted, beta {:g} | {:.1f} ± {:.1f} |".format(beta, *interval(values)))
    worst = max(r.logit_difference for r in results)
    lines += ["", f"Largest difference of a logit from the source's at beta {BETAS[0]:g}: {worst:.1e}."]
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one sub-folder per class")
    parser.add_argument("--json", type=Path, help="where to write every number; updated after each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--limit", type=int, help="images of each class at most")
    parser.add_argument("--source-train", type=int, default=100, help="training images of each source class")
    parser.add_argument("--target-train", type=int, default=40, help="training images of each target class")
    parser.add_argument("--source-epochs", type=int, default=12)
    parser.add_argument("--target-epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--calibration", type=int, default=512, help="images that the new statistics are measured on")
    parser.add_argument("--layers", type=int, nargs=4, default=[2, 2, 2, 2], help="units of each stage")
    parser.add_argument("--channels", type=int, nargs=4, default=[16, 32, 64, 128], help="nominal width of each stage")
    parser.add_argument("--stem-width", type=int, default=16)
    args = parser.parse_args()

    images, labels, names = load(args.data, args.size, args.limit)
    print(
        f"{len(labels)} images of {len(names)} classes, {args.size} px; {torch.get_num_threads()} thread(s)", flush=True
    )
    parameters = sum(p.numel() for p in plus_net(len(names) // 2, args).parameters())
    print(f"network: {parameters / 1e6:.2f} M parameters", flush=True)
    results: list[Seed] = []
    for seed in args.seeds:
        results.append(run_seed(seed, images, labels, args))
        if args.json:
            options = {
                k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("data", "json")
            }
            machine = {"torch": torch.__version__, "cpu": platform.machine(), "threads": torch.get_num_threads()}
            content = {
                "options": options,
                "machine": machine,
                "parameters": parameters,
                "seeds": [asdict(r) for r in results],
            }
            args.json.write_text(json.dumps(content, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
