"""Do Res2Net's Grad-CAM maps cover objects better than ResNet's, as the papers of the family say?

    python benchmarks/explain.py --out runs/explain --seeds 0 1
    python benchmarks/explain.py --out runs/explain --seeds 0 1 --networks resnet50d res2net50d

Two networks learn alike, from random weights, to tell tiles of NASA Blue Marble with lakes inside land from tiles of
land alone; no mask is shown to them. On the lakes of held-out squares of the Earth that both networks name, `r2kit
explain` says how much of each map lies inside the lake (the energy-based pointing game) and whether its brightest point
does (the pointing game). The networks of the first line are those of `detection.py`, of one block a stage.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
from detection import ARMS
from PIL import Image

import r2kit
from r2kit import metrics
from r2kit.data.bluemarble import DEGREES, MASK_VALUES, load_grids, raw_files
from r2kit.explain import explain

SIDE, STEP, SQUARE = 32, 16, 128  # pixels: of a tile, from tile to tile, of a square that is held out whole
LAKE = (0.02, 0.5)  # share of a tile that its lakes have


def write_tiles(folder: Path) -> Path:
    """Write tiles with and without lakes, as many of each, their masks, and the table that names them."""
    world, _, surface = load_grids(*raw_files())
    lakes, land = [], []
    for y in range(0, surface.shape[0] - SIDE, STEP):
        for x in range(0, surface.shape[1] - SIDE, STEP):
            if y // SQUARE != (y + SIDE - 1) // SQUARE or x // SQUARE != (x + SIDE - 1) // SQUARE:
                continue  # a tile of two squares could be learned from and held out
            tile = surface[y : y + SIDE, x : x + SIDE]
            lake = tile == MASK_VALUES["lake"]
            if (tile == MASK_VALUES["sea"]).any():
                continue
            rim = np.concatenate([lake[0], lake[-1], lake[:, 0], lake[:, -1]])
            if not lake.any():
                land.append((y, x))
            elif LAKE[0] <= lake.mean() <= LAKE[1] and rim.mean() <= 0.1:
                lakes.append((y, x))
    near = {(y // SQUARE, x // SQUARE) for y, x in lakes}
    land = [(y, x) for y, x in land if (y // SQUARE, x // SQUARE) in near]  # the same regions
    land = [land[i] for i in np.linspace(0, len(land), min(len(land), len(lakes)), endpoint=False).astype(int)]
    rows = []
    for label, places in (("lake", lakes), ("land", land)):
        for y, x in places:
            name = f"{label}-{y:04d}-{x:04d}.png"
            window = (slice(y, y + SIDE), slice(x, x + SIDE))
            for part, pixels in (
                ("images", world[window]),
                ("masks", np.uint8(255) * (surface[window] == MASK_VALUES["lake"])),
            ):
                (folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / part / name)
            rows.append(
                {
                    "path": f"images/{name}",
                    "label": label,
                    "group": f"{y // SQUARE}-{x // SQUARE}",
                    "lon": -180.0 + (x + SIDE / 2) * DEGREES,
                    "lat": 90.0 - (y + SIDE / 2) * DEGREES,
                }
            )
    pd.DataFrame(rows).to_csv(folder / "tiles.csv", index=False)
    print(f"{len(lakes)} tiles with lakes and {len(land)} of land in {len(near)} squares")
    return folder / "tiles.csv"


def train(args: argparse.Namespace, table: Path, network: str, seed: int) -> r2kit.Run:
    """One run; a finished one is kept."""
    recipe = {
        "name": network,
        "seed": seed,
        "data": {"root": str(table), "image_size": args.size, "split": "group", "workers": 0},
        "model": {"name": network},
        "train": {"epochs": args.epochs, "batch_size": 32, "lr": args.lr},
        "augment": {"preset": "overhead"},
    }
    start = time.perf_counter()
    run = r2kit.finetune(recipe, out=args.out / f"{network}-{seed}", resume=True, quiet=True)
    accuracy = json.loads(run.metrics_json.read_text())["accuracy"]
    print(
        f"{network} seed {seed}: accuracy {100 * accuracy['value']:.1f} % ({100 * accuracy['low']:.1f} to "
        f"{100 * accuracy['high']:.1f}), {run.info['model']['parameters'] / 1e6:.1f} M parameters, "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return run


def look(first: r2kit.Run, second: r2kit.Run, method: str, folder: Path) -> pd.DataFrame:
    """The evidence of both on the held-out lakes that both name, beside their squares."""
    predictions = [pd.read_parquet(run.predictions("test")).set_index("id") for run in (first, second)]
    named = [set(table.index[(table["label"] == "lake") & (table["pred"] == "lake")]) for table in predictions]
    rows = predictions[0].loc[sorted(named[0] & named[1])]
    root = folder / "data"
    found = explain(
        first,
        list(rows["path"]),
        method=method,
        target="lake",
        against=second,
        masks=root / "masks",
        out=folder / f"{method}-{first.path.name}-{second.path.name}",
    ).table
    return found.assign(group=rows["group"].to_numpy())


def words(values: np.ndarray, groups: np.ndarray, bounds: tuple[float, float]) -> str:
    """A mean with its interval over squares."""
    found = metrics.bootstrap_interval(values, groups, bounds=bounds)
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--networks", nargs=2, default=ARMS, help="the ResNet first")
    parser.add_argument("--methods", nargs="+", default=["gradcam", "hirescam"])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    table = args.out / "data" / "tiles.csv"
    if not table.exists():
        write_tiles(args.out / "data")
    for seed in args.seeds:
        base, other = (train(args, table, network, seed) for network in args.networks)
        for method in args.methods:
            found = look(other, base, method, args.out)
            known = found[found["inside"].notna() & found["against_inside"].notna()]
            groups = known["group"].to_numpy(object)
            print(
                f"{method}, seed {seed}: {len(known)} lakes of {len(set(groups))} squares, which cover "
                f"{100 * known['covered'].mean():.1f} % of their tiles"
            )
            for what, column in (("evidence inside", "inside"), ("brightest point inside", "pointed")):
                ours = known[column].to_numpy(np.float64)
                theirs = known[f"against_{column}"].to_numpy(np.float64)
                print(
                    f"  {what}, %: {args.networks[1]} {words(ours, groups, (0.0, 1.0))}, "
                    f"{args.networks[0]} {words(theirs, groups, (0.0, 1.0))}, "
                    f"difference {words(ours - theirs, groups, (-1.0, 1.0))}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
