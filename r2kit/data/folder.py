"""Images in folders, one folder per class, checked to the last pixel before training starts.

Every file is decoded once, in threads, and what was found is remembered in the cache folder by size and modification
time: a truncated image stops the run in the first minute instead of the second hour, and the second run starts fast.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from r2kit.cache import cache_folder
from r2kit.data.reader import IMAGE_SUFFIXES, ImageInfo, find_images, inspect_image, read_image
from r2kit.data.sources import fingerprint_of
from r2kit.errors import DataError, did_you_mean

PART_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_CHECK = 1  # raise when the reader starts to accept, refuse or describe files in another way


class ImageFolder:
    """Images under root/CLASS/ or root/{train,val,test}/CLASS/, at any depth.

    Args:
        root: The folder.
        on_bad_file: `error`: an image that cannot be used stops here. `skip`: it is left out and listed.
        workers: Threads that check the files.

    Raises:
        DataError: If the folder is missing or holds no classes, a class is empty, or an image cannot be used.
    """

    in_memory = False

    def __init__(self, root: Path, *, on_bad_file: Literal["error", "skip"] = "error", workers: int = 1) -> None:
        self.root = root
        self.name = str(root)
        listed = _list_images(root)
        self.classes: tuple[str, ...] = tuple(sorted(listed["class"].unique()))
        if len(self.classes) < 2:
            raise DataError(
                f"{root}: only one class, '{self.classes[0]}'; a classifier needs at least two class folders"
            )
        checks = check_files(root, listed["id"].tolist(), workers)
        listed = listed.merge(checks, on="id", how="left", validate="one_to_one")

        reasons, common = _refused(listed)
        self.skipped = [(str(root / identity), reason) for identity, reason in reasons.items()]
        if self.skipped and on_bad_file == "error":
            raise DataError(_bad_files_message(self.skipped, len(listed)))
        listed = listed[~listed["id"].isin(reasons)].reset_index(drop=True)
        for name in self.classes:
            if not (listed["class"] == name).any():
                raise DataError(f"{root}: class '{name}' has no usable image, e.g. {self.skipped[0][1]}")

        if common is None:
            raise DataError(_bad_files_message(self.skipped, len(self.skipped)))
        self.bands: tuple[str, ...] = common.bands
        self.scale = common.scale
        self.nodata = common.nodata
        self.manifest = pd.DataFrame(
            {
                "id": listed["id"],
                "path": [str(root / identity) for identity in listed["id"]],
                "label": listed["class"].map({name: i for i, name in enumerate(self.classes)}).astype(np.int64),
                "split": listed["part"].astype(object),
                "group": None,
                "lon": listed["lon"].astype(np.float64),
                "lat": listed["lat"].astype(np.float64),
            }
        )
        self.fingerprint = fingerprint_of(zip(listed["id"], self.manifest["label"], listed["sha256"], strict=True))
        self._paths: list[str] = self.manifest["path"].tolist()
        holds_rasters = any(path.lower().endswith((".tif", ".tiff")) for path in self._paths)
        self.start_method = _raster_start_method() if holds_rasters else None

    def read(self, row: int) -> np.ndarray:
        """Return image `row` as (H, W, C).

        Raises:
            DataError: If the file has gone or changed since it was checked.
        """
        return read_image(self._paths[row], bands=self.bands)


def check_files(root: Path, ids: Sequence[str], workers: int) -> pd.DataFrame:
    """Decode every file, unless the cache remembers it unchanged.

    Args:
        root: The folder.
        ids: Paths relative to it.
        workers: Threads.

    Returns:
        One row per id: sha256 (of the file), error (None for a good file), and the fields of `ImageInfo`.
    """
    memory = cache_folder() / "checked" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.parquet"
    stamps = [_stamp(root / identity) for identity in ids]
    known = _recall(memory)
    rows = [known.get((identity, stamp)) for identity, stamp in zip(ids, stamps, strict=True)]
    fresh = [i for i, row in enumerate(rows) if row is None]
    if fresh:
        # Decoders release the interpreter lock, so threads scale; processes would cost seconds to start.
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for i, row in zip(fresh, pool.map(lambda i: _check_file(root, ids[i], stamps[i]), fresh), strict=True):
                rows[i] = row
        _remember(memory, pd.DataFrame(rows))
    return pd.DataFrame(rows).drop(columns=["stamp", "check"])


def _list_images(root: Path) -> pd.DataFrame:
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
            rows += [(identity, folder.name, None) for identity in _images_of_class(root, folder)]
            continue
        part = PART_OF_FOLDER.get(folder.name.lower())
        if part is None:
            raise DataError(f"{folder}: stands beside train; only folders named train, val and test may")
        class_folders = _subfolders(folder)
        if not class_folders:
            raise DataError(f"{folder}: has no class folders; expected {folder.name}/CLASS/image")
        for class_folder in class_folders:
            rows += [(identity, class_folder.name, part) for identity in _images_of_class(root, class_folder)]
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


def _images_of_class(root: Path, folder: Path) -> list[str]:
    """Ids of the images below a class folder."""
    try:
        found = find_images([folder])
    except DataError as error:
        raise DataError(
            f"{folder}: class '{folder.name}' has no image; known suffixes are {', '.join(IMAGE_SUFFIXES)}"
        ) from error
    return [path.relative_to(root).as_posix() for path in found]


def _refused(listed: pd.DataFrame) -> tuple[dict[str, str], ImageInfo | None]:
    """Reason for every image that cannot be used, and what all others have in common."""
    reasons = {i: e for i, e in zip(listed["id"], listed["error"], strict=True) if isinstance(e, str)}
    good = listed[~listed["id"].isin(reasons)]
    kinds = list(zip(good["bands"].map(tuple), good["dtype"], good["scale"], strict=True))
    if not kinds:
        return reasons, None
    (bands, dtype, scale), _ = Counter(kinds).most_common(1)[0]
    nodata = Counter(value for value in good["nodata"].tolist() if value is not None and not np.isnan(value))
    most = nodata.most_common(1)[0][0] if nodata else None
    for identity, kind, value in zip(good["id"], kinds, good["nodata"].tolist(), strict=True):
        if kind != (bands, dtype, scale):
            reasons[identity] = (
                f"has {len(kind[0])} band(s) ({', '.join(kind[0])}) of {kind[1]}, most others have {len(bands)} "
                f"({', '.join(bands)}) of {dtype}"
            )
        elif value is not None and not np.isnan(value) and value != most:
            reasons[identity] = f"declares nodata {value:g}, others {most:g}"
    return reasons, ImageInfo(bands, dtype, scale, most, float("nan"), float("nan"))


def _bad_files_message(bad: list[tuple[str, str]], total: int) -> str:
    """One line for one or many files."""
    shown = "; ".join(f"{path}: {reason}" for path, reason in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"{len(bad)} of {total} images cannot be used: {shown}{more}; mend or remove them, or leave them out with "
        "data.on_bad_file=skip"
    )


def _stamp(path: Path) -> str:
    """Size and modification time, by which an unchanged file is known."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return f"{status.st_size}-{status.st_mtime_ns}"


def _check_file(root: Path, identity: str, stamp: str) -> dict[str, object]:
    """Decode one file and describe it."""
    path = root / identity
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(ImageInfo)), None)
    row: dict[str, object] = {"id": identity, "stamp": stamp, "check": _CHECK, "sha256": "", "error": None, **nothing}
    try:
        info = inspect_image(path, decode=True)
        with path.open("rb") as file:
            row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    except DataError as error:
        row["error"] = str(error).removeprefix(f"{path}: ")
    else:
        row |= dataclasses.asdict(info)
    return row


def _recall(memory: Path) -> dict[tuple[str, str], dict[str, object]]:
    """Rows of earlier checks by (id, stamp); a memory that cannot be read is forgotten."""
    try:
        frame = pd.read_parquet(memory)
        frame = frame[frame["check"] == _CHECK].astype(object).where(lambda f: f.notna(), None)
        return {(str(row["id"]), str(row["stamp"])): row for row in frame.to_dict("records")}  # type: ignore[misc]
    except Exception:  # missing, damaged or of another version: the files are simply checked again
        return {}


def _remember(memory: Path, rows: pd.DataFrame) -> None:
    """Write the checks for the next run; a full or read-only disk costs only time."""
    draft = memory.with_name(f"{memory.name}.{os.getpid()}.part")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(draft, index=False)
        os.replace(draft, memory)
    except OSError:
        draft.unlink(missing_ok=True)


def _raster_start_method() -> str:
    """Loader processes that read rasters must not be forked: GDAL's locks may be held at that moment."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
