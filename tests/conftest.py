"""Small data that every test can make: no downloads, no packages beyond the core."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
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
