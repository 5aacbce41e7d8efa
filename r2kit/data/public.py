"""Public sets by name: torchvision downloads them, and they become a folder of images like a person's own.

A set is fetched once, into the cache folder; everything after that (checks, splits, near copies, fingerprints) is that
of `ImageFolder`. torchvision compares what it downloads with a checksum before anything opens it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchvision import datasets

from r2kit.cache import cache_folder
from r2kit.data.folder import ImageFolder
from r2kit.errors import DataError
from r2kit.recipe import DataSpec


@dataclass(frozen=True)
class PublicSet:
    """A set that torchvision knows."""

    factory: Any
    """torchvision's class."""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments that choose each of the set's own parts; none: it has no parts and is a folder of classes already."""


_TRAIN_TEST = {"train": {"train": True}, "test": {"train": False}}
_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
_SPLIT_VAL = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
PUBLIC_SETS = {
    "cifar10": PublicSet(datasets.CIFAR10, _TRAIN_TEST),
    "cifar100": PublicSet(datasets.CIFAR100, _TRAIN_TEST),
    "dtd": PublicSet(datasets.DTD, _SPLIT_VAL),
    "eurosat": PublicSet(datasets.EuroSAT),
    "fashion_mnist": PublicSet(datasets.FashionMNIST, _TRAIN_TEST),
    "fgvc_aircraft": PublicSet(datasets.FGVCAircraft, _SPLIT_VAL),
    "flowers102": PublicSet(datasets.Flowers102, _SPLIT_VAL),
    "food101": PublicSet(datasets.Food101, _SPLIT),
    "mnist": PublicSet(datasets.MNIST, _TRAIN_TEST),
    "oxford_pets": PublicSet(datasets.OxfordIIITPet, {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "stl10": PublicSet(datasets.STL10, _SPLIT),
}
"""Those with one class an image."""


def open_public(spec: DataSpec, workers: int) -> ImageFolder:
    """Open a public set, downloading it first where the cache does not hold it.

    Args:
        spec: Its `name` says which.
        workers: Threads that check the files.

    Raises:
        DataError: If it cannot be downloaded or written, or an image of it cannot be used.
    """
    name = spec.name or ""
    return ImageFolder(fetch(name), bands=spec.bands, on_bad_file=spec.on_bad_file, workers=workers)


def fetch(name: str) -> Path:
    """Return the folder of a public set, made on first use: CLASS/image, or PART/CLASS/image.

    Raises:
        DataError: If it cannot be downloaded or written.
    """
    known = PUBLIC_SETS[name]
    raw, ready = cache_folder() / "public" / "downloads", cache_folder() / "public" / name
    if not known.parts:
        return Path(_open(name, raw, {}).samples[0][0]).parent.parent
    if not ready.is_dir():
        draft = ready.with_name(f"{name}.{os.getpid()}.part")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            for part, arguments in known.parts.items():
                _write(_open(name, raw, arguments), draft / part)
            os.replace(draft, ready)
        except OSError as error:
            raise DataError(f"{draft}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return ready


def _open(name: str, root: Path, arguments: dict[str, Any]) -> Any:
    """A set, or one part of it, from the folder of downloads or else the network."""
    factory = PUBLIC_SETS[name].factory
    try:
        return factory(root, download=False, **arguments)
    except RuntimeError:  # not there, or not whole; torchvision shows the progress of the download itself
        pass
    try:
        root.mkdir(parents=True, exist_ok=True)
        return factory(root, download=True, **arguments)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        cause = getattr(error, "reason", error)
        reason = (getattr(cause, "strerror", None) or str(cause)).strip().splitlines()[0].rstrip(".")
        raise DataError(
            f"data.name={name}: cannot be downloaded ({reason}); without a network, bring it as a folder "
            "CLASS/image or train/CLASS/image and give data.root=FOLDER in place of data.name"
        ) from error


def _write(images: Any, folder: Path) -> None:
    """Write every image without loss, below the name of its class."""
    names = [str(name).replace("/", "-").replace("\\", "-") for name in images.classes]
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(images):
        image.save(folder / names[label] / f"{number:06d}.png", compress_level=1)
