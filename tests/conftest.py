"""Small data that every test can make: no downloads, no packages beyond the core."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.objects.toy import make_objects

COLOURS = {"field": (60, 140, 40), "sand": (200, 170, 110), "water": (20, 40, 120)}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Iterator[Path]:
    """Tests build what they need in a cache of their own and leave the user's alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R2KIT_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _no_leftover_environment(monkeypatch):
    """A test neither sees nor leaves the variables with which processes of one run find each other."""
    for name in ("R2KIT_RUN", "LOCAL_RANK", "RANK", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


def make_images(root: Path, per_class: int, size: int = 24, seed: int = 0) -> Path:
    """Write root/CLASS/*.png: noisy pictures of one colour a class."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            noise = rng.normal(0, 30, (size, size, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """A folder of 3 classes with 12 images each."""
    return make_images(tmp_path_factory.mktemp("data") / "tiles", 12)


@pytest.fixture(scope="session")
def mask_folder(tmp_path_factory) -> Path:
    """Twelve pictures in images/ with masks of 0 and 255 in masks/."""
    root = tmp_path_factory.mktemp("data") / "masked"
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for index in range(12):
        mask = np.zeros((40, 40), dtype=np.uint8)
        mask[index : index + 20, 5:30] = 255
        pixels = np.where(mask[..., None], COLOURS["water"], COLOURS["field"]) + rng.normal(0, 20, (40, 40, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def quick_recipe(image_folder) -> dict:
    """A recipe that trains a tiny network for two epochs in about a second."""
    return {
        "name": "quick",
        "seed": 3,
        "data": {"root": str(image_folder), "image_size": 32, "workers": 0},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 8, "lr": 3e-3},
        "augment": {"mixup": 0.3, "cutmix": 0.3},
    }


@pytest.fixture(scope="session")
def finished_run(quick_recipe, tmp_path_factory):
    """A finished run of `quick_recipe`; tests read it and do not change it."""
    import r2kit

    return r2kit.finetune(quick_recipe, out=tmp_path_factory.mktemp("runs") / "quick", quiet=True)


@pytest.fixture(scope="session")
def objects_folder(tmp_path_factory) -> Path:
    """20 images of 80 x 112 pixels."""
    return make_objects(tmp_path_factory.mktemp("objects") / "set", 20)


@pytest.fixture(scope="session")
def detection_recipe(objects_folder) -> dict:
    """A recipe that trains a tiny detector on tiles in seconds."""
    return {
        "name": "toy",
        "data": {"root": str(objects_folder), "image_size": 64, "resize": "tile", "workers": 0},
        "task": {"kind": "detection", "width": 32, "max_detections": 20},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 1, "batch_size": 4, "lr": 3e-3},
        "augment": {"mosaic": 0.3, "copy_paste": 0.3},
    }


@pytest.fixture(scope="session")
def detection_run(detection_recipe, tmp_path_factory):
    """A finished run of `detection_recipe`; tests read it and do not change it."""
    import r2kit

    return r2kit.finetune(detection_recipe, out=tmp_path_factory.mktemp("runs") / "toy", quiet=True)


@pytest.fixture(scope="session")
def several_table(tmp_path_factory) -> Path:
    """60 pictures of 24 px: the left half is green with the label field, the right half yellow with sand."""
    root, rng, rows = tmp_path_factory.mktemp("several"), np.random.default_rng(0), []
    for i in range(60):
        pixels = rng.normal(60, 20, (24, 24, 3))
        field, sand = i % 2 == 0, i % 3 == 0
        pixels[:, :12] += np.array([0, 120, 0]) * field
        pixels[:, 12:] += np.array([140, 120, 0]) * sand
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / f"{i:02d}.png")
        cell = "; ".join(name for name, here in (("sand", sand), ("field", field)) if here)
        rows.append({"path": f"{i:02d}.png", "label": cell, "group": f"flight{i // 3}"})
    pd.DataFrame(rows).to_csv(root / "images.csv", index=False)
    return root / "images.csv"


@pytest.fixture(scope="session")
def several_recipe(several_table) -> dict:
    """A recipe of images with several labels."""
    return {
        "seed": 1,
        "task": {"kind": "multilabel"},
        "data": {
            "root": str(several_table),
            "image_size": 32,
            "workers": 0,
            "val_fraction": 0.2,
            "test_fraction": 0.25,
        },
        "model": {"name": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 8, "lr": 5e-3},
        "augment": {"mixup": 0.3, "cutmix": 0.3},
    }


@pytest.fixture(scope="session")
def several_run(several_recipe, tmp_path_factory):
    """A finished run of images with several labels; tests read it and do not change it."""
    import r2kit

    return r2kit.finetune(several_recipe, out=tmp_path_factory.mktemp("runs") / "several", quiet=True)


@pytest.fixture(scope="session")
def ponds(tmp_path_factory) -> Path:
    """Twenty pictures 40 x 56: dark blue ponds with value 9 in the mask on green land with 4, an unknown corner."""
    root = tmp_path_factory.mktemp("ponds")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for i in range(20):
        y, x = np.mgrid[:40, :56]
        pond = (y - rng.integers(10, 30)) ** 2 + (x - rng.integers(10, 46)) ** 2 < rng.integers(60, 150)
        image = np.where(pond[..., None], (30, 50, 120), (60, 130, 50)) + rng.normal(0, 20, (40, 56, 3))
        mask = np.where(pond, 9, 4).astype(np.uint8)
        mask[:4, :4] = 77
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def pond_recipe(ponds) -> dict:
    """A recipe of a segmentation in tiles."""
    return {
        "name": "ponds",
        "data": {
            "root": str(ponds),
            "image_size": 32,
            "resize": "tile",
            "workers": 0,
            "masks": {"classes": {"land": 4, "pond": 9}, "ignore": [77]},
        },
        "task": {"kind": "segmentation", "decoder": "fpn", "loss": {"dice": 1.0}, "class_weights": "balanced"},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 4, "lr": 3e-3},
    }


@pytest.fixture(scope="session")
def pond_run(pond_recipe, tmp_path_factory):
    """A finished run of `pond_recipe`; tests read it and do not change it."""
    import r2kit

    return r2kit.finetune(pond_recipe, out=tmp_path_factory.mktemp("runs") / "ponds", quiet=True)


@pytest.fixture(scope="session")
def salient_recipe(mask_folder) -> dict:
    """A recipe of salient objects."""
    masks = {"threshold": 127.0, "names": ["field", "pond"]}
    return {
        "name": "ponds",
        "data": {"root": str(mask_folder), "image_size": 32, "workers": 0, "masks": masks},
        "task": {"kind": "saliency", "width": 16, "loss": {"structure": 1.0}},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 4, "lr": 3e-3},
    }


@pytest.fixture(scope="session")
def salient_run(salient_recipe, tmp_path_factory):
    """A finished run of `salient_recipe`; tests read it and do not change it."""
    import r2kit

    return r2kit.finetune(salient_recipe, out=tmp_path_factory.mktemp("runs") / "salient", quiet=True)
