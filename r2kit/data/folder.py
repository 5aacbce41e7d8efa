"""Images in folders, one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from r2kit.data.files import ImageFiles
from r2kit.data.reader import IMAGE_SUFFIXES, find_images
from r2kit.data.stacks import bands_in
from r2kit.errors import DataError, did_you_mean

PART_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class ImageFolder(ImageFiles):
    """Images under root/CLASS/ or root/{train,val,test}/CLASS/, at any depth.

    Args:
        root: The folder.
        bands: Names of the bands to read, or their positions from 1, in this order; None for all.
        band_files: Bands that come as a file each, see `stacks.stack_files`; None where an image is one file.
        on_bad_file: `error`: an image that cannot be used stops here. `skip`: it is left out and listed.
        workers: Threads that check the files.

    Raises:
        DataError: If the folder is missing or holds no classes, a class is empty, or an image cannot be used.
    """

    def __init__(
        self,
        root: Path,
        *,
        bands: Sequence[str | int] | None = None,
        band_files: Sequence[str] | None = None,
        on_bad_file: Literal["error", "skip"] = "error",
        workers: int = 1,
    ) -> None:
        listed = _list_images(root, band_files)
        names = sorted(listed["class"].unique())
        if band_files is None:
            _refuse_bands(root, listed["id"].tolist())
        if len(names) < 2:
            raise DataError(f"{root}: only one class, '{names[0]}'; a classifier needs at least two class folders")
        listed = listed.assign(group=None, lon=np.nan, lat=np.nan)
        super().__init__(str(root), root, listed, bands=bands, on_bad_file=on_bad_file, workers=workers)


def _refuse_bands(root: Path, ids: Sequence[str]) -> None:
    """Refuse files that are the bands of tiles by their names: each would be learned as an image of its own."""
    bands, tiles = bands_in(ids)
    if len(bands) > 1 and tiles * len(bands) == len(ids):
        raise DataError(
            f"{root}: the {len(ids)} files are {len(bands)} bands ({', '.join(bands)}) of {tiles} tiles by name; "
            f'read them together with "data.band_files=[{", ".join(bands)}]", or name them otherwise'
        )


def _list_images(root: Path, band_files: Sequence[str] | None) -> pd.DataFrame:
    """Columns id (path relative to root), class, part (None without part folders)."""
    if not root.is_dir():
        if root.exists():
            raise DataError(f"{root}: is a file; data.root is a folder with one folder per class")
        near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise DataError(f"{root}: no such folder{did_you_mean(root.name, near)}")
    folders = _subfolders(root)
    if not folders:
        raise DataError(f"{root}: has no class folders; expected root/CLASS/image or root/train/CLASS/image")
    names = {folder.name.lower() for folder in folders}
    has_parts = "train" in names and (len(names & set(PART_OF_FOLDER)) > 1 or names == {"train"})
    rows: list[tuple[str, str, str | None]] = []
    for folder in folders:
        if not has_parts:
            rows += [(identity, folder.name, None) for identity in _images_of_class(root, folder, band_files)]
            continue
        part = PART_OF_FOLDER.get(folder.name.lower())
        if part is None:
            raise DataError(f"{folder}: stands beside train; only folders named train, val and test may")
        class_folders = _subfolders(folder)
        if not class_folders:
            raise DataError(f"{folder}: has no class folders; expected {folder.name}/CLASS/image")
        for class_folder in class_folders:
            found = _images_of_class(root, class_folder, band_files)
            rows += [(identity, class_folder.name, part) for identity in found]
    listed = pd.DataFrame(rows, columns=["id", "class", "part"], dtype=object)
    if has_parts:
        trained = set(listed["class"][listed["part"] == "train"])
        for identity, name in zip(listed["id"], listed["class"], strict=True):
            if name not in trained:
                raise DataError(
                    f"{(root / identity).parent}: class '{name}' has no folder in train{did_you_mean(name, trained)}"
                )
    return listed


def _subfolders(folder: Path) -> list[Path]:
    """Folders inside a folder, sorted; hidden ones and those of archive programs (__MACOSX) are not data."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _images_of_class(root: Path, folder: Path, band_files: Sequence[str] | None) -> list[str]:
    """Ids of the images below a class folder."""
    try:
        found = find_images([folder], band_files)
    except DataError as error:
        if band_files is not None:
            raise
        raise DataError(
            f"{folder}: class '{folder.name}' has no image; known suffixes are {', '.join(IMAGE_SUFFIXES)}"
        ) from error
    return [path.relative_to(root).as_posix() for path in found]
