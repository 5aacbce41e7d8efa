"""Labelled image files, checked to the last pixel before training starts: what every source of files has in common.

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
from r2kit.data.decoded import DecodedImages, trial
from r2kit.data.perceptual import coefficients
from r2kit.data.reader import ImageInfo, choose_bands, examine_image, read_image
from r2kit.data.sources import Target, fingerprint_of
from r2kit.data.stacks import files_of, parts_of
from r2kit.errors import DataError

_CHECK = 4  # raise when the reader starts to accept, refuse or describe files in another way


AUTO_CACHE_GB = 4.0
"""Size that `data.cache_gb: auto` stays below."""
_TRIED, _PAYS = 8, 2.0  # images tried for it, and how many times as long as reading their decoding must take
SEPARATOR = ";"
"""Stands between the labels of an image with several; nothing at all is an image of none."""


class ImageFiles:
    """Labelled image files; a source of them lists what there is and leaves the rest to this class.

    Args:
        name: What data.root names, for messages.
        root: Folder that the ids are relative to.
        listed: One row per image: id (unique), class (name; with target `classes` any number of them, joined by
            ``;``), part (or None), group (or None), lon and lat in degrees (NaN: taken from the file's own
            georeference).
        bands: Names of the bands to read, or their positions from 1, in this order; None for all.
        on_bad_file: `error`: an image that cannot be used stops here. `skip`: it is left out and listed.
        workers: Threads that check the files.

    Raises:
        DataError: If there is one class only, an image cannot be used, or a class has no usable image.
    """

    target: Target = "class"
    in_memory = False

    def __init__(
        self,
        name: str,
        root: Path,
        listed: pd.DataFrame,
        *,
        bands: Sequence[str | int] | None = None,
        on_bad_file: Literal["error", "skip"],
        workers: int,
    ) -> None:
        self.name = name
        self.network: tuple[int, int] | None = None
        """(H, W) to which images will be resized, by which large JPEGs are decoded smaller, see `read_image`."""
        self.cached = ""
        """Whether decoded images are kept on disk, and why; empty where nobody asked."""
        self._decoded: DecodedImages | None = None
        several = self.target == "classes"
        held = listed["class"].map(lambda cell: labels_of(cell) if several else (cell,))
        self.classes: tuple[str, ...] = tuple(sorted({label for labels in held for label in labels}))
        held_ids = listed["id"]
        checks = check_files(name, root, listed["id"].tolist(), workers)
        listed = listed.merge(checks, on="id", how="left", validate="one_to_one", suffixes=("", "_found"))

        reasons, common = _refused(name, listed, bands)
        self.skipped = [(str(root / identity), reason) for identity, reason in reasons.items()]
        if self.skipped and on_bad_file == "error":
            raise DataError(bad_files_message(self.skipped, len(listed)))
        listed = listed[~listed["id"].isin(reasons)].reset_index(drop=True)
        held = held[~held_ids.isin(reasons)].reset_index(drop=True)
        usable = {label for labels in held for label in labels}
        for label in self.classes:
            if label not in usable:
                raise DataError(f"{name}: class '{label}' has no usable image, e.g. {self.skipped[0][1]}")

        if common is None:
            raise DataError(bad_files_message(self.skipped, len(self.skipped)))
        self.bands: tuple[str, ...] = common.bands
        self.scale = common.scale
        self.nodata = common.nodata
        self._itemsize = np.dtype(common.dtype).itemsize
        place = {axis: listed[axis].fillna(listed[f"{axis}_found"].astype(np.float64)) for axis in ("lon", "lat")}
        self.manifest = pd.DataFrame(
            {
                "id": listed["id"],
                "path": [str(root / identity) for identity in listed["id"]],
                "label": _rarest(held, self.classes),
                "split": listed["part"].astype(object),
                "group": listed["group"].astype(object),
                **place,
            }
        )
        if several:
            self.manifest["labels"] = [tuple(self.classes.index(label) for label in labels) for labels in held]
        self.strata = self.classes
        self.contents: pd.DataFrame | None = listed[
            ["sha256", "pixels", "flat", "low", "height", "width", "crs", "bounds"]
        ]
        carried = self.manifest["labels" if several else "label"]
        self.fingerprint = fingerprint_of(zip(listed["id"], carried, listed["sha256"], strict=True))
        self._paths: list[str] = self.manifest["path"].tolist()
        holds_rasters = any(path.lower().endswith((".tif", ".tiff")) or parts_of(path) for path in self._paths)
        self.start_method = raster_start_method() if holds_rasters else None

    def decode_for(self, network: tuple[int, int] | None, cache_gb: float | Literal["auto"] = 0.0) -> None:
        """Say what the images are for.

        Args:
            network: (H, W) to which they will be resized, by which large JPEGs are decoded smaller, see `read_image`.
            cache_gb: As in the recipe.
        """
        self.network = network
        if cache_gb == 0.0 or self.contents is None:
            return
        pixels = int((self.contents["height"] * self.contents["width"]).sum())
        expected = pixels * len(self.bands) * self._itemsize + 128 * len(self.contents)  # 128: the head of a file
        limit = AUTO_CACHE_GB if cache_gb == "auto" else cache_gb
        cache = DecodedImages(expected, round(limit * 1e9), (self.bands, network))
        size = f"{expected / 1e9:.2g} GB"
        if not cache.active:
            self.cached = f"off: all images decoded are {size}, the limit is {limit:g} GB"
        elif cache_gb == "auto":
            paths = self._paths[:: max(1, len(self._paths) // _TRIED)][:_TRIED]
            decoding, reading = trial(paths, self._decode)
            pays = decoding > _PAYS * reading
            each = f"decoding an image takes {1000 * decoding:.2g} ms, reading a decoded one {1000 * reading:.2g} ms"
            self.cached = f"{'on, ' + size + ' in ' + str(cache.folder) if pays else 'off'}: {each}"
            cache.active = pays
        else:
            self.cached = f"on, {size} in {cache.folder}"
        if cache.active:
            cache.make_room()
            self._decoded = cache

    def _decode(self, path: str) -> np.ndarray:
        return read_image(path, bands=self.bands, network=self.network)

    def read(self, row: int) -> np.ndarray:
        """Return image `row` as (H, W, C).

        Raises:
            DataError: If the file has gone or changed since it was checked.
        """
        path = self._paths[row]
        if self._decoded is None:
            return self._decode(path)
        return self._decoded.read(path, lambda: self._decode(path))


def labels_of(cell: str) -> tuple[str, ...]:
    """Return the labels in a cell of a table, sorted, each once."""
    return tuple(sorted({label.strip() for label in cell.split(SEPARATOR)} - {""}))


def _rarest(held: pd.Series, classes: tuple[str, ...]) -> np.ndarray:
    """Position of the rarest label of each image, (N,); of the most frequent one for an image without any."""
    counts = pd.Series([label for labels in held for label in labels]).value_counts()
    count = [int(counts[label]) for label in classes]
    positions = {label: i for i, label in enumerate(classes)}
    common = int(np.argmax(count))
    return np.array(
        [min((positions[label] for label in labels), key=lambda i: count[i], default=common) for labels in held],
        dtype=np.int64,
    )


def check_files(name: str, root: Path, ids: Sequence[str], workers: int) -> pd.DataFrame:
    """Decode every file, unless the cache remembers it unchanged.

    Args:
        name: Of the source; one source has one memory.
        root: The folder.
        ids: Paths relative to it.
        workers: Threads.

    Returns:
        One row per id: sha256 (of the file), pixels (hash of shape, type and pixels), flat (of one colour), low (64
        float16 as bytes: the low frequencies by which near copies are known, None without texture), height, width,
        error (None for a good file), and the fields of `ImageInfo`.
    """
    memory = memory_of(name)
    stamps = [stamp_of(root / identity) for identity in ids]
    known = recall(memory, _CHECK)
    rows = [known.get((identity, stamp)) for identity, stamp in zip(ids, stamps, strict=True)]
    fresh = [i for i, row in enumerate(rows) if row is None]
    if fresh:
        # Decoders release the interpreter lock, so threads scale; processes would cost seconds to start.
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for i, row in zip(fresh, pool.map(lambda i: _check_file(root, ids[i], stamps[i]), fresh), strict=True):
                rows[i] = row
        remember(memory, pd.DataFrame(rows))
    return pd.DataFrame(rows).drop(columns=["stamp", "check"])


def memory_of(name: str) -> Path:
    """Return the file in which the checks of a source are remembered."""
    return cache_folder() / "checked" / f"{hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()[:16]}.parquet"


def _refused(
    name: str, listed: pd.DataFrame, wanted: Sequence[str | int] | None
) -> tuple[dict[str, str], ImageInfo | None]:
    """Reason for every image that cannot be used, and what all others have in common, with the bands asked for."""
    reasons = {i: e for i, e in zip(listed["id"], listed["error"], strict=True) if isinstance(e, str)}
    good = listed[~listed["id"].isin(reasons)]
    if good.empty:
        return reasons, None
    own = good["bands"].map(tuple)
    if wanted is not None:  # what the files hold beside the chosen bands does not matter
        usual = Counter(own).most_common(1)[0][0]
        choose_bands(wanted, usual, f"{name}: data.bands")
        own = own.map(lambda bands: _chosen(wanted, bands) or bands)
    kinds = list(zip(own, good["dtype"], good["scale"], strict=True))
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
    reasons |= _contradictory(good)
    return reasons, ImageInfo(bands, dtype, scale, most, float("nan"), float("nan"))


def _chosen(wanted: Sequence[str | int], bands: tuple[str, ...]) -> tuple[str, ...] | None:
    """The wanted bands of one file, None where it lacks one."""
    try:
        return choose_bands(wanted, bands, "")
    except DataError:
        return None


def _contradictory(good: pd.DataFrame) -> dict[str, str]:
    """Reason for every image whose very pixels also come under another class: nobody can tell which one is right."""
    classes = good.groupby("pixels")["class"].transform("nunique")
    reasons = {}
    for _, same in good[classes > 1].groupby("pixels", sort=False):
        for identity, name in zip(same["id"], same["class"], strict=True):
            other = same[same["class"] != name].iloc[0]
            reasons[identity] = f"is of class '{name}', and {other['id']} with the same pixels of '{other['class']}'"
    return reasons


def bad_files_message(bad: list[tuple[str, str]], total: int) -> str:
    """One line for one or many files."""
    shown = "; ".join(f"{path}: {reason}" for path, reason in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"{len(bad)} of {total} images cannot be used: {shown}{more}; mend or remove them, or leave them out with "
        "data.on_bad_file=skip"
    )


def stamp_of(path: Path) -> str:
    """Size and modification time, by which an unchanged file is known."""
    stamps = []
    for file in files_of(path):
        try:
            status = file.stat()
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
        stamps.append(f"{status.st_size}-{status.st_mtime_ns}")
    return "+".join(stamps)


def _check_file(root: Path, identity: str, stamp: str) -> dict[str, object]:
    """Decode one file and describe it."""
    path = root / identity
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(ImageInfo)), None)
    row: dict[str, object] = {"id": identity, "stamp": stamp, "check": _CHECK, "sha256": "", "error": None, **nothing}
    row |= {"pixels": None, "flat": None, "low": None, "height": None, "width": None}
    try:
        info, pixels = examine_image(path)
        row["sha256"] = _digest(path)
    except DataError as error:
        row["error"] = str(error).removeprefix(f"{path}: ")
    else:
        row |= dataclasses.asdict(info)
        low = coefficients(pixels, info.nodata)
        row |= {"pixels": pixel_hash(pixels), "flat": is_flat(pixels)}
        row |= {"low": None if low is None else low.astype(np.float16).tobytes()}
        row |= {"height": pixels.shape[0], "width": pixels.shape[1]}
    return row


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a stack, that of the digests of its files."""
    digests = []
    for part in files_of(path):
        with part.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def is_flat(pixels: np.ndarray) -> bool:
    """Whether an image (H, W, C) is of one colour: such images are equal by nature, without being copies."""
    return bool((pixels == pixels[:1, :1]).all())


def pixel_hash(pixels: np.ndarray) -> str:
    """Hash of an image's shape, type and pixels: equal for equal pictures in whatever file format."""
    digest = hashlib.blake2b(f"{pixels.shape} {pixels.dtype.name}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def recall(memory: Path, check: int) -> dict[tuple[str, str], dict[str, object]]:
    """Return the rows of earlier checks by (id, stamp); a memory that cannot be read is forgotten.

    Args:
        memory: File that `remember` wrote.
        check: Number of the check that the rows must come from.
    """
    try:
        frame = pd.read_parquet(memory)
        frame = frame[frame["check"] == check].astype(object).where(lambda f: f.notna(), None)
        return {(str(row["id"]), str(row["stamp"])): row for row in frame.to_dict("records")}  # type: ignore[misc]
    except Exception:  # missing, damaged or of another version: the files are simply checked again
        return {}


def remember(memory: Path, rows: pd.DataFrame) -> None:
    """Write the checks for the next run; a full or read-only disk costs only time."""
    draft = memory.with_name(f"{memory.name}.{os.getpid()}.part")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(draft, index=False)
        os.replace(draft, memory)
    except OSError:
        draft.unlink(missing_ok=True)


def raster_start_method() -> str:
    """Return how loader processes that read rasters start: not by a fork, GDAL's locks may be held at that moment."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
