"""Res2Net against ResNet on dense tasks, at equal epochs: the same decoder, data, seeds and steps.

    python benchmarks/dense.py roads --data ../shared/data/epfl_roads
    python benchmarks/dense.py water
    python benchmarks/dense.py sentinel2 --data ../shared/data/multispectral/sentinel2
    python benchmarks/dense.py saliency

Both networks start from random weights. With `--networks res2net14_bench resnet14_bench` they are those of
`detection.py`, of one block a stage, which a CPU trains in minutes. Every run is printed as one line; the last lines
are the mean, the range over the seeds, and the difference of equal seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from detection import ARMS

import r2kit
from r2kit.recipe_file import load_recipe

NETWORKS = ("res2net50d", "resnet50d")


def recipe(args: argparse.Namespace, network: str, seed: int, data: Path | None) -> dict:
    """The recipe of one run."""
    task: dict = {"kind": "segmentation", "decoder": args.decoder, "loss": {"cross_entropy": 1.0, "dice": 1.0}}
    spec: dict = {"image_size": args.size, "workers": 0}
    if args.task == "roads":
        spec |= {"root": str(data), "resize": "tile", "masks": {"threshold": 127.0, "names": ["land", "road"]}}
    elif args.task == "sentinel2":
        spec |= {"root": str(data), "resize": "tile"}
    elif args.task == "saliency":
        task = {"kind": "saliency"}
        spec |= {"split": "blocks", "bluemarble": {"tile": args.size, "masks": "salient"}}
    else:
        spec |= {"split": "blocks", "bluemarble": {"tile": args.size}}
    return {
        "name": f"{args.task}-{network}",
        "seed": seed,
        "data": spec,
        "task": task,
        "model": {"name": network},
        "train": {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr},
    }


def sentinel2_tiles(source: Path, out: Path, side: int = 50) -> Path:
    """Write five dates of 13 bands, cut into four corners each, as GeoTIFF with masks; the last corner is the test."""
    import rasterio
    from rasterio.transform import Affine

    scenes = np.load(source / "REFERENCE_SCENES.npy")  # (5, 101, 100, 13)
    classes = np.load(source / "LULC.npy")
    classes = np.broadcast_to(classes.reshape(-1, *scenes.shape[1:3]), scenes.shape[:3])
    values = np.unique(classes)
    for corner, part in enumerate(("train", "train", "val", "test")):
        y, x = divmod(corner, 2)
        window = (slice(y * side, (y + 1) * side), slice(x * side, (x + 1) * side))
        for date in range(len(scenes)):
            for kind, pixels in (("images", scenes[date][window]), ("masks", classes[date][window][..., None])):
                file = out / part / kind / f"d{date}c{corner}.tif"
                file.parent.mkdir(parents=True, exist_ok=True)
                array = pixels.astype(np.float32 if kind == "images" else np.uint8).transpose(2, 0, 1)
                with rasterio.open(
                    file,
                    "w",
                    driver="GTiff",
                    height=side,
                    width=side,
                    count=len(array),
                    dtype=array.dtype,
                    crs="EPSG:32633",
                    transform=Affine(10, 0, 500_000 + 10 * x * side, 0, -10, 5_100_000 - 10 * y * side),
                ) as dataset:
                    dataset.write(array)
    print(f"{len(scenes)} dates, {scenes.shape[3]} bands, classes {values.tolist()}: two corners train, one validates")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["roads", "water", "sentinel2", "saliency"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--decoder", default="unet")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--networks", nargs=2, default=NETWORKS, help=f"or {' '.join(reversed(ARMS))}")
    parser.add_argument("--set", nargs="*", default=[], help="further key.path=value of the recipe")
    args = parser.parse_args()
    main_figure = "miou" if args.task != "saliency" else "max_f"
    found: dict[str, list[float]] = {network: [] for network in args.networks}
    with tempfile.TemporaryDirectory() as folder:
        data = sentinel2_tiles(args.data, Path(folder) / "tiles") if args.task == "sentinel2" else args.data
        for seed in range(args.seeds):
            for network in args.networks:
                start = time.perf_counter()
                checked = load_recipe(recipe(args, network, seed, data), args.set)
                run = r2kit.finetune(checked, out=Path(folder) / f"{network}-{seed}", quiet=True)
                result = json.loads(run.metrics_json.read_text())
                value = result[main_figure]["value"]
                found[network].append(value)
                size = run.info["model"]
                baselines = {k: round(b["miou"]["value"], 4) for k, b in result.get("baselines", {}).items()}
                print(
                    f"{args.task} {network} seed {seed}: {main_figure} {value:.4f} on {result['images']} "
                    f"{result['split']} images, {size['parameters'] / 1e6:.1f} M parameters, "
                    f"{size['macs'] / 1e9:.2f} GMACs, baselines {baselines}, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    for network, values in found.items():
        print(f"{network}: mean {np.mean(values):.4f}, range {min(values):.4f} to {max(values):.4f}")
    first, second = (np.array(found[network]) for network in args.networks)
    gap = first - second
    each = ", ".join(f"{value:+.4f}" for value in gap)
    print(f"{args.networks[0]} minus {args.networks[1]}, equal seeds: {each}; mean {gap.mean():+.4f}")


if __name__ == "__main__":
    main()
