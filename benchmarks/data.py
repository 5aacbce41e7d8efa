"""Images a second on one core: r2kit's loader against torchvision's ImageFolder and fastai's, the same operations.

    python benchmarks/data.py --root ../shared/data/aid --rounds 5

Operations: decode, cut a window of 0.7 to 1.0 of the area, resize to 224 x 224, flips, brightness, contrast, normalise,
stack to batches of 32. Everything runs in the main process with one thread; a worker process does the same work, so
this is what a core gives. The loaders take turns in every round; medians over the rounds, by process time. `decode
alone` is Pillow (rasterio for GeoTIFF) reading whole images into arrays: what no loader that decodes whole images on
this core can beat. `r2kit, cache` is data.cache_gb with every image decoded before. torchvision has no raster
reader and gets one of rasterio, without colour transforms, which take three bands at most; fastai gets the same reader,
and cuts its windows from the batch, because its window of single images takes Pillow's images only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import DatasetFolder, ImageFolder
from torchvision.transforms import v2

from r2kit.data.datamodule import DataModule
from r2kit.recipe import AugmentSpec, DataSpec

SIZE, BATCH = 224, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_jpegs(root: Path, count: int) -> Path:
    """JPEGs of 1024 x 1024 of two classes, textured like land: waves and noise, quality 90."""
    y, x = np.mgrid[:1024, :1024]
    for number in range(count):
        rng = np.random.default_rng(number)
        waves = [128 + 70 * np.sin(x / rng.uniform(9, 60) + y / rng.uniform(9, 60)) for _ in range(3)]
        pixels = np.stack(waves, axis=-1) + rng.normal(0, 14, (1024, 1024, 3))
        path = root / f"class{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return root


def write_tiffs(root: Path, count: int) -> Path:
    """GeoTIFFs of 256 x 256 with 13 bands of uint16, deflate, smooth with noise."""
    y, x = np.mgrid[:256, :256]
    for number in range(count):
        rng = np.random.default_rng(number)
        waves = [2000 + 900 * np.sin(x / rng.uniform(9, 60) + y / rng.uniform(9, 60)) for _ in range(13)]
        pixels = (np.stack(waves) + rng.normal(0, 60, (13, 256, 256))).astype(np.uint16)
        path = root / f"class{number % 2}" / f"{number:03d}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path, "w", driver="GTiff", height=256, width=256, count=13, dtype="uint16", compress="deflate"
        ) as file:
            file.write(pixels)
    return root


def read_raster(path: str) -> torch.Tensor:
    with rasterio.open(path) as file:
        return torch.from_numpy(file.read().astype(np.float32))


def paths_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def decode_alone(root: Path, bands: int) -> Iterator[int]:
    for path in paths_of(root):
        if bands == 3:
            np.asarray(Image.open(path).convert("RGB"))
        else:
            read_raster(str(path))
        yield 1


def ours(root: Path, cache_gb: float = 0.0) -> Callable[[], Iterator[int]]:
    spec = DataSpec(root=str(root), image_size=SIZE, workers=0, split="stratified", on_leak="drop", cache_gb=cache_gb)
    module = DataModule(spec, AugmentSpec(), seed=0, batch_size=BATCH)
    module.setup()
    loader = module.loader(np.arange(len(module.source.manifest)), train=True)

    def batches() -> Iterator[int]:
        for batch in loader:
            yield len(batch["image"])

    return batches


def torchvision_loader(root: Path, bands: int) -> Callable[[], Iterator[int]]:
    window = v2.RandomResizedCrop(SIZE, scale=(0.7, 1.0), ratio=(0.9, 1.1), antialias=True)
    turns = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    if bands == 3:  # the usual recipe: PIL image, window, flips, colour, tensor, normalise
        light = v2.ColorJitter(brightness=0.1, contrast=0.1)
        end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        data = ImageFolder(str(root), v2.Compose([window, *turns, light, *end]))
    else:  # its colour transforms take three bands at most
        steps = v2.Compose([window, *turns, v2.Normalize((2000.0,) * bands, (640.0,) * bands)])
        data = DatasetFolder(str(root), read_raster, extensions=(".tif",), transform=steps)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)

    def batches() -> Iterator[int]:
        for image, _ in loader:
            yield len(image)

    return batches


def fastai_loader(root: Path, bands: int) -> Callable[[], Iterator[int]]:
    from fastai.vision import all as fastai

    turns = {"flip_vert": True, "max_rotate": 0, "max_zoom": 1, "max_warp": 0}
    window = {"min_scale": 0.7, "ratio": (0.9, 1.1)}
    if bands == 3:
        image = fastai.ImageBlock
        single = fastai.RandomResizedCrop(SIZE, **window)
        batch = [*fastai.aug_transforms(**turns), fastai.Normalize.from_stats(MEAN, STD)]
    else:  # its light is for values in 0..1
        image = fastai.TransformBlock(type_tfms=lambda path: fastai.TensorImage(read_raster(str(path))))
        single = None
        norm = fastai.Normalize.from_stats((2000.0,) * bands, (640.0,) * bands)
        cut = fastai.RandomResizedCropGPU(SIZE, **window)
        batch = [cut, *fastai.aug_transforms(**turns, max_lighting=0), norm]
    block = fastai.DataBlock(
        blocks=(image, fastai.CategoryBlock),
        get_items=paths_of,
        get_y=fastai.parent_label,
        splitter=lambda items: (list(range(len(items))), [0]),
        item_tfms=single,
        batch_tfms=batch,
    )
    loader = block.dataloaders(root, bs=BATCH, num_workers=0, device=torch.device("cpu")).train
    loader.drop_last = False

    def batches() -> Iterator[int]:
        for image, _ in loader:
            yield len(image)

    return batches


def speed(batches: Callable[[], Iterator[int]]) -> float:
    """Images per second of process time: what others do on the machine counts less."""
    start = time.process_time()
    count = sum(batches())
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="a folder of JPEGs, one folder a class")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=480, help="images of the folder, evenly spaced")
    parser.add_argument("--sets", nargs="+", default=["folder", "jpeg1024", "tiff13"], help="which of the three")
    parser.add_argument("--out", type=Path, help="JSON file with every round")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(0)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["R2KIT_CACHE"] = f"{folder}/cache"
        some = Path(folder) / "some"
        every = paths_of(options.root)
        for path in every[:: max(1, len(every) // options.limit)]:
            (some / path.parent.name).mkdir(parents=True, exist_ok=True)
            (some / path.parent.name / path.name).symlink_to(path.resolve())
        sets = {
            "folder": (some, 3),
            "jpeg1024": (write_jpegs(Path(folder) / "jpeg", 64), 3),
            "tiff13": (write_tiffs(Path(folder) / "tiff", 96), 13),
        }
        for name in options.sets:
            root, bands = sets[name]
            loaders = {"decode alone": lambda root=root, bands=bands: decode_alone(root, bands), "r2kit": ours(root)}
            loaders["r2kit, cache"] = ours(root, cache_gb=4.0)
            loaders["torchvision"] = torchvision_loader(root, bands)
            loaders["fastai"] = fastai_loader(root, bands)
            rounds: dict[str, list[float]] = {loader: [] for loader in loaders}
            for number in range(options.rounds + 1):
                for loader, batches in loaders.items():
                    value = speed(batches)
                    if number:  # the first round warms up
                        rounds[loader].append(value)
            found[name] = rounds
            base = rounds["torchvision"]
            for loader, values in rounds.items():
                ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
                print(
                    f"{name:10} {loader:14} {statistics.median(values):8.1f} images/s  x{ratio:.2f} of torchvision",
                    flush=True,
                )
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
