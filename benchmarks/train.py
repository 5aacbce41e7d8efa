"""The same training through r2kit, fastai, timm's train.py and a plain loop: time, accuracy over time, memory.

    python benchmarks/train.py --root ../shared/data/aid --timm-script path/to/train.py --rounds 3

One image folder, one network from random weights, one batch size, as many epochs, AdamW with one learning rate and one
weight decay, a warm-up of half an epoch, a cosine to zero (fastai: its one-cycle; timm's script: a warm-up of a whole
epoch, it knows no halves), channels-last, one thread, one loader process, the same operations on the images (window of
0.7 to 1.0, flips, light). Each training is a program of its own; in every round they take turns. `r2kit` is the recipe
as it stands, `r2kit, plain network` the same with train.optimize=off: what the engine costs over the plain loop.

A step is measured from the end of one optimiser step to the end of the next within an epoch, by the clock and by
processor time; the first five of an epoch are left out. `to the end` is the whole program with its imports: r2kit also
measures the network, evaluates, and writes a report in it. Peak memory is of the training process, without its loader.

timm's wheel leaves its train.py out: take it from its repository. Without --timm-script it does not take part.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

LR, DECAY, JITTER, WINDOW, RATIO = 1e-3, 0.05, 0.1, (0.7, 1.0), (0.9, 1.1)
WAIT = 5
"""Steps at the start of an epoch that are not counted: the loader process has just been asked for the first batch."""


class Clock:
    """When each step and each epoch of this program ended."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []  # by the clock, by processor time of this process
        self.epochs: list[tuple[float, float]] = []  # by the clock, accuracy on the validation images

    def step(self, *_: Any) -> None:
        self.steps.append((time.time(), time.process_time()))

    def epoch(self, accuracy: float) -> None:
        self.epochs.append((time.time(), accuracy))

    def watch_torch(self) -> None:
        """Note every step of every optimiser of torch."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(self.step)


def with_r2kit(clock: Clock, options: argparse.Namespace, data: Path, out: Path, optimize: str) -> None:
    """As the command line does it: `r2kit finetune`."""
    from lightning.pytorch.callbacks import Checkpoint

    from r2kit.train import flow

    class Note(Checkpoint):  # those are called last
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            clock.epoch(pl_module.epoch_metrics["val_acc"])

    clock.watch_torch()
    flow.fit = partial(flow.fit, extra=[Note()])  # type: ignore[assignment]
    recipe = {
        "name": "benchmark",
        "seed": options.seed,
        "data": {
            "root": str(data),
            "image_size": options.size,
            "workers": 1,
            "test_fraction": 0.0,
            "on_leak": "keep",
        },
        "model": {"name": options.model},
        "augment": {
            "preset": "none",
            "transforms": [
                {"name": "RandomResizedCrop", "size": [options.size] * 2, "scale": list(WINDOW), "ratio": list(RATIO)},
                {"name": "HorizontalFlip", "p": 0.5},
                {"name": "VerticalFlip", "p": 0.5},
                {"name": "RandomBrightnessContrast", "brightness_limit": JITTER, "contrast_limit": JITTER, "p": 1.0},
            ],
        },
        "train": {
            "epochs": options.epochs,
            "batch_size": options.batch,
            "lr": LR,
            "weight_decay": DECAY,
            "optimize": optimize,
        },
    }
    flow.finetune(recipe, out=out / "run")


def with_fastai(clock: Clock, options: argparse.Namespace, data: Path, out: Path) -> None:
    """A Learner of its own data block, transforms, optimiser and one-cycle."""
    import timm
    import torch
    from fastai.callback.channelslast import ChannelsLast
    from fastai.vision.all import (
        Callback,
        CrossEntropyLossFlat,
        ImageDataLoaders,
        Learner,
        RandomResizedCrop,
        accuracy,
        aug_transforms,
        set_seed,
    )

    set_seed(options.seed)

    class Note(Callback):
        order = 90  # behind the recorder

        def after_step(self) -> None:
            clock.step()

        def after_epoch(self) -> None:
            clock.epoch(float(self.learn.recorder.log[3]))

    dls = ImageDataLoaders.from_folder(
        data,
        train="train",
        valid="val",
        bs=options.batch,
        num_workers=1,
        item_tfms=RandomResizedCrop(options.size, min_scale=WINDOW[0], ratio=RATIO),
        batch_tfms=aug_transforms(flip_vert=True, max_rotate=0, max_zoom=1, max_warp=0, max_lighting=JITTER),
        device=torch.device("cpu"),
    )
    model = timm.create_model(options.model, num_classes=dls.c)
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, cbs=[Note(), ChannelsLast()], path=out)
    learn.fit_one_cycle(options.epochs, lr_max=LR, wd=DECAY)
    learn.save("end")


def with_timm(clock: Clock, options: argparse.Namespace, data: Path, out: Path) -> None:
    """timm's own script, unchanged; what it writes into its summary is the epoch."""
    import torch
    from timm import utils

    import r2kit.backbones  # noqa: F401  registers the names

    clock.watch_torch()
    if not torch.cuda.is_available():  # some releases of the script wait for a GPU that they do not use
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    write, find = utils.update_summary, utils.init_distributed_device

    def summary(epoch: int, train: Any, valid: dict[str, float], *args: Any, **more: Any) -> None:
        clock.epoch(valid["top1"] / 100)
        write(epoch, train, valid, *args, **more)

    def device(args: argparse.Namespace) -> Any:
        args.device = "cpu"  # some releases of the script have no option for it
        return find(args)

    utils.update_summary, utils.init_distributed_device = summary, device
    words = {
        "data-dir": data,
        "val-split": "val",
        "model": options.model,
        "num-classes": len(list((data / "train").iterdir())),
        "img-size": options.size,
        "crop-pct": 1.0,
        "batch-size": options.batch,
        "workers": 1,
        "opt": "adamw",
        "lr": LR,
        "weight-decay": DECAY,
        "sched": "cosine",
        "epochs": options.epochs,
        "warmup-epochs": 1,
        "warmup-lr": LR / 10,
        "cooldown-epochs": 0,
        "smoothing": 0.0,
        "color-jitter": JITTER,
        "vflip": 0.5,
        "train-interpolation": "bilinear",
        "seed": options.seed,
        "output": out,
        "experiment": "timm",
    }
    sys.argv = [str(options.timm_script), *(f"--{key}={value}" for key, value in words.items())]
    sys.argv += ["--sched-on-updates", "--channels-last"]
    for key, values in (("scale", WINDOW), ("ratio", RATIO)):
        sys.argv += [f"--{key}", *map(str, values)]
    runpy.run_path(str(options.timm_script), run_name="__main__")


def with_loop(clock: Clock, options: argparse.Namespace, data: Path, out: Path) -> None:
    """What one writes by hand with torch, torchvision and a network of timm."""
    import timm
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    clock.watch_torch()
    torch.manual_seed(options.seed)
    end = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    window = v2.RandomResizedCrop(options.size, scale=WINDOW, ratio=RATIO, antialias=True)
    vary = [window, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.ColorJitter(JITTER, JITTER)]
    sets = {
        "train": ImageFolder(str(data / "train"), v2.Compose([*vary, *end])),
        "val": ImageFolder(str(data / "val"), v2.Compose([v2.Resize((options.size, options.size)), *end])),
    }
    more = {"batch_size": options.batch, "num_workers": 1, "persistent_workers": True}
    train = DataLoader(sets["train"], shuffle=True, drop_last=True, **more)
    valid = DataLoader(sets["val"], **more)
    model = timm.create_model(options.model, num_classes=len(sets["train"].classes))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=options.epochs * len(train), pct_start=0.5 / options.epochs, cycle_momentum=False
    )
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for image, label in train:
            loss = cross_entropy(model(image.contiguous(memory_format=torch.channels_last)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        model.eval()
        hits = 0
        with torch.no_grad():
            for image, label in valid:
                logits = model(image.contiguous(memory_format=torch.channels_last))
                hits += int((logits.argmax(1) == label).sum())
        clock.epoch(hits / len(sets["val"]))
        print(f"epoch {epoch + 1} loss {total / len(train):.3f} acc {hits / len(sets['val']):.3f}", flush=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "last.pt")


TRAININGS = {
    "r2kit": partial(with_r2kit, optimize="auto"),
    "r2kit, plain network": partial(with_r2kit, optimize="off"),
    "fastai": with_fastai,
    "timm train.py": with_timm,
    "plain loop": with_loop,
}


def make_data(root: Path, out: Path, train: int, val: int, classes: int) -> Path:
    """Links to the first images of the first classes of a folder, as train/CLASS and val/CLASS."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir())[:classes]:
        images = sorted(path for path in folder.iterdir() if path.is_file())[: train + val]
        for number, path in enumerate(images):
            place = out / ("train" if number < train else "val") / folder.name / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
    return out


def run_child(name: str, options: argparse.Namespace, data: Path) -> None:
    """Train in this program, and print what the clock saw as the last line."""
    import torch

    torch.set_num_threads(options.threads)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        TRAININGS[name](clock, options, data, Path(folder))
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    found = {"end": time.time(), "steps": clock.steps, "epochs": clock.epochs, "peak_mb": peak / 1024}
    print("\nfound " + json.dumps(found), flush=True)


def measure(name: str, options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Run one training as a program of its own, and put its times together."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name, "--data", str(data)]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout[done.stdout.rindex("\nfound ") + 7 :])
    steps, each = found["steps"], len(found["steps"]) // options.epochs
    wall, work = [], []
    for epoch in range(options.epochs):
        of_epoch = steps[epoch * each : (epoch + 1) * each]
        for before, after in zip(of_epoch[WAIT:], of_epoch[WAIT + 1 :], strict=False):
            wall.append(after[0] - before[0])
            work.append(after[1] - before[1])
    return {
        "steps": len(steps),
        "step_ms": 1000 * statistics.median(wall),
        "step_cpu_ms": 1000 * statistics.median(work),
        "first_step": steps[0][0] - start,
        "training": found["epochs"][-1][0] - steps[0][0],
        "end": found["end"] - start,
        "peak_mb": found["peak_mb"],
        "epochs": [(when - start, accuracy) for when, accuracy in found["epochs"]],
    }


def reached(run: dict[str, Any], accuracy: float) -> float | None:
    """Seconds from the start of the program to the first epoch with an accuracy."""
    return next((when for when, value in run["epochs"] if value >= accuracy), None)


def middle(values: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def table(rounds: list[dict[str, dict[str, Any]]], base: str = "plain loop") -> str:
    """The figures of all trainings, and their ratios to the plain loop within each round, as Markdown."""
    names = list(rounds[0])
    head = ["", "step, ms", f"over the {base}", "the same by processor time", "first step, s", "to the end, s"]
    head += ["accuracy", "peak memory, MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        runs = [found[name] for found in rounds]
        row = [name, middle([run["step_ms"] for run in runs])]
        for key in ("step_ms", "step_cpu_ms"):
            ratio = statistics.median(found[name][key] / found[base][key] for found in rounds)
            row.append(f"{100 * (ratio - 1):+.1f} %")
        row += [middle([run[key] for run in runs]) for key in ("first_step", "end")]
        row.append(middle([100 * run["epochs"][-1][1] for run in runs]) + " %")
        row.append(f"{statistics.median(run['peak_mb'] for run in runs):.0f}")
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "Seconds from the command to an epoch with the last accuracy of another, r2kit against itself:", ""]
    for name in names:
        if name.startswith("r2kit"):
            continue
        words = []
        for found in rounds:
            goal = found[name]["epochs"][-1][1]
            own, other = reached(found["r2kit"], goal), reached(found[name], goal)
            words.append(f"{100 * goal:.1f} %: {'never' if own is None else f'{own:.0f}'} against {other:.0f}")
        lines.append(f"- {name}: {'; '.join(words)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="a folder of images, one folder a class")
    parser.add_argument("--timm-script", type=Path, help="timm's train.py, unchanged")
    parser.add_argument("--model", default="res2net50d", help="a name of timm or r2kit")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--classes", type=int, default=30, help="the first ones of the folder")
    parser.add_argument("--train", type=int, default=64, help="training images of each class")
    parser.add_argument("--val", type=int, default=16, help="validation images of each class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next ones count on")
    parser.add_argument("--only", nargs="+", choices=list(TRAININGS), help="those of the trainings")
    parser.add_argument("--out", type=Path, help="JSON file with every round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(options.child, options, options.data)
        return
    os.environ.update(OMP_NUM_THREADS=str(options.threads), PYTHONWARNINGS="ignore")
    names = options.only or [name for name in TRAININGS if name != "timm train.py" or options.timm_script is not None]
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(options.root, Path(folder) / "data", options.train, options.val, options.classes)
        for number in range(options.rounds):
            seeded = argparse.Namespace(**{**vars(options), "seed": options.seed + number})
            sys.argv[1:] = [*sys.argv[1:], "--seed", str(seeded.seed)]
            first = seeded.seed % len(names)  # another one begins each time
            turn = names[first:] + names[:first]
            found = {name: measure(name, seeded, data) for name in turn}
            rounds.append({name: found[name] for name in names})
            for name in names:
                run = rounds[-1][name]
                print(
                    f"round {number + 1} {name:22} step {run['step_ms']:.0f} ms, to the end {run['end']:.1f} s, "
                    f"accuracy {100 * run['epochs'][-1][1]:.1f} %, {run['peak_mb']:.0f} MB",
                    flush=True,
                )
            if options.out is not None:
                options.out.write_text(json.dumps(rounds, indent=1) + "\n")
    if "plain loop" in names and "r2kit" in names:
        print("\n" + table(rounds))


if __name__ == "__main__":
    main()
