"""13-band Sentinel-2 as GeoTIFF tiles: written on the spot, described, and a tiny network fine-tuned on them.

    python benchmarks/sentinel2.py --root ../shared/data/multispectral/sentinel2 --seeds 3
    python benchmarks/sentinel2.py --root ../shared/data/multispectral/sentinel2 --write tiles   # the tiles alone

Five dates of one scene, cut into 100 places of 10 x 10 pixels; the label of a tile is the land cover of most of its
pixels, classes of fewer than 10 places are left out. All dates of a place are one group, so that no place is trained on
and tested.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from rasterio.transform import Affine

import r2kit
from r2kit.data.datamodule import DataModule
from r2kit.recipe_file import load_recipe

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
TILE = 10


def write_tiles(root: Path, scenes: np.ndarray, cover: np.ndarray) -> Path:
    """Write the tiles and the table that lists them."""
    rows = []
    for top in range(0, scenes.shape[1] - TILE + 1, TILE):
        for left in range(0, scenes.shape[2] - TILE + 1, TILE):
            here = cover[top : top + TILE, left : left + TILE]
            label = int(np.bincount(here.ravel()).argmax())
            for date, scene in enumerate(scenes):
                path = root / f"{top:03d}-{left:03d}-{date}.tif"
                with rasterio.open(
                    path,
                    "w",
                    driver="GTiff",
                    height=TILE,
                    width=TILE,
                    count=len(BANDS),
                    dtype="float32",
                    crs="EPSG:32633",
                    transform=Affine(10, 0, 500_000 + 10 * left, 0, -10, 5_000_000 - 10 * top),
                ) as file:
                    file.write(scene[top : top + TILE, left : left + TILE].transpose(2, 0, 1))
                    file.descriptions = BANDS
                rows.append({"path": path.name, "label": f"cover{label}", "group": f"{top}-{left}"})
    table = pd.DataFrame(rows)
    table = table[table.groupby("label")["group"].transform("nunique") >= 10]
    table.to_csv(root / "tiles.csv", index=False)
    return root / "tiles.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="Write the tiles and tiles.csv into this folder, and train nothing.")
    options = parser.parse_args()
    scenes = np.load(options.root / "REFERENCE_SCENES.npy")
    cover = np.load(options.root / "LULC.npy")[..., 0]
    if options.write is not None:
        options.write.mkdir(parents=True)
        print(write_tiles(options.write, scenes, cover))
        return
    with tempfile.TemporaryDirectory() as folder:
        table = write_tiles(Path(folder), scenes, cover)
        for bands in (None, ["B04", "B03", "B02"]):
            found: dict[str, list[float]] = {"network": [], "logistic": [], "majority": []}
            for seed in range(options.seeds):
                recipe = {
                    "seed": seed,
                    "data": {"root": str(table), "image_size": 32, "workers": 0, "bands": bands, "split": "group"},
                    "model": {"name": "test_resnet"},
                    "train": {"epochs": 20, "batch_size": 16, "lr": 3e-3},
                }
                if seed == 0 and bands is None:
                    checked = load_recipe(recipe)
                    module = DataModule(checked.data, checked.augment, seed=0, batch_size=16)
                    module.setup()
                    print(module.band_statistics().round(4).to_string())
                    print(module.counts().to_string())
                run = r2kit.finetune(recipe, out=Path(folder) / f"{len(bands or BANDS)}-{seed}", quiet=True)
                result = json.loads(run.metrics_json.read_text())
                found["network"].append(result["accuracy"]["value"])
                for name in ("logistic", "majority"):
                    found[name].append(result["baselines"][name]["accuracy"]["value"])
            words = ", ".join(f"{k} {statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for k, v in found.items())
            print(f"{len(bands or BANDS)} bands: test accuracy {words}")


if __name__ == "__main__":
    main()
