"""Res2Net against ResNet in a detector: one Faster R-CNN, data, order and epochs; only the backbone's block differs.

    python benchmarks/detection.py --data path/to/aerial_cars --epochs 4 --seeds 0 --out runs/detection

Both backbones have one bottleneck block a stage (a 14-layer network), so that a CPU trains them; the Res2Net's blocks
are those of res2net50_26w_4s. The photographs are read at half size, in tiles. Whole videos are held out: frames of one
are alike.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from timm.models import register_model
from timm.models.res2net import Bottle2neck
from timm.models.resnet import Bottleneck, ResNet, _create_resnet

import r2kit
from r2kit.evaluate import summary_lines

ARMS = ("resnet14_bench", "res2net14_bench")
CLASSES = ["car", "truck", "bus", "minibus"]
HELD = {"DJI_0013": "val", "DJI_0762": "val", "harlem": "test"}


@register_model
def resnet14_bench(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _create_resnet("resnet14t", pretrained, block=Bottleneck, layers=[1, 1, 1, 1], **kwargs)


@register_model
def res2net14_bench(pretrained: bool = False, **kwargs: Any) -> ResNet:
    options = {"block": Bottle2neck, "layers": [1, 1, 1, 1], "base_width": 26, "block_args": {"scale": 4}}
    return _create_resnet("resnet14t", pretrained, **options, **kwargs)


def half_size(source: Path, target: Path) -> Path:
    """Copy the set at half size, and divide it by video."""
    (target / "images").mkdir(parents=True)
    shutil.copytree(source / "labels", target / "labels")
    rows = []
    for path in sorted((source / "images").iterdir()):
        picture = Image.open(path).convert("RGB")
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
        picture.save(target / "images" / f"{path.stem}.png")
        video = re.sub(r"-?\d+$", "", path.stem).rstrip("-")
        rows.append({"id": f"images/{path.stem}.png", "split": HELD.get(video, "train")})
    pd.DataFrame(rows).to_csv(target / "split.csv", index=False)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    root = arguments.out / "data"
    if not root.exists():
        half_size(arguments.data, root)
    results = []
    for seed in arguments.seeds:
        for arm in ARMS:
            start = time.perf_counter()
            run = r2kit.finetune(
                {
                    "name": arm,
                    "seed": seed,
                    "data": {
                        "root": str(root),
                        "image_size": arguments.size,
                        "resize": "tile",
                        "split_file": str(root / "split.csv"),
                        "boxes": {"classes": CLASSES, "on_bad_box": "mend", "overlap": 0.1},
                        "workers": 0,
                    },
                    "task": {"kind": "detection", "width": 64, "regions": 64},
                    "model": {"name": arm},
                    "train": {"epochs": arguments.epochs, "batch_size": 4, "lr": 1e-3, "gradient_clip": 1.0},
                },
                out=arguments.out / f"{arm}-{seed}",
                overwrite=True,
            )
            result = json.loads(run.metrics_json.read_text())
            print(f"{arm} seed {seed}: {time.perf_counter() - start:.0f} s")
            print("\n".join(summary_lines(result)), flush=True)
            row = {"arm": arm, "seed": seed, "parameters": run.info["model"]["parameters"]}
            row |= {name: result[name]["value"] for name in ("map", "map_50", "map_75")}
            results.append({**row, "low": result["map"]["low"], "high": result["map"]["high"]})
    print(pd.DataFrame(results).to_string())
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
