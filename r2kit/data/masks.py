"""Images with a mask each: where the masks are, what their values mean, and a clear refusal of those that do not fit.

Every mask is decoded once before training, as the images are, and remembered by size and modification time: a mask of
another size than its image, or with a value that no class has, stops the run in the first minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image, PngImagePlugin

from r2kit.data.files import ImageFiles, bad_files_message, memory_of, pixel_hash, recall, remember, stamp_of
from r2kit.data.folder import PART_OF_FOLDER
from r2kit.data.reader import MAX_IMAGE_BYTES, find_images, open_raster, read_image
from r2kit.data.sources import DenseSource, Target, fingerprint_of, loader_workers
from r2kit.data.stacks import name_of
from r2kit.data.table import list_table
from r2kit.data.targets import IGNORE, MaskTarget
from r2kit.errors import DataError, did_you_mean, naming
from r2kit.recipe import DataSpec, MaskSpec

_CHECK = 1  # raise when masks are read in another way
_MOST_VALUES = 32  # a mask with more values than this is no mask of classes that its owner forgot to name


def open_masks(spec: DataSpec) -> DenseSource:
    """Open the images and masks that a recipe names.

    Raises:
        DataError: If they cannot be used.
        MissingExtraError: If the source needs packages of an extra that is not installed.
    """
    if spec.resolved_source == "bluemarble":
        from r2kit.data.surfaces import BlueMarbleMasks

        return BlueMarbleMasks(spec.bluemarble)
    if spec.root is None or spec.resolved_source not in ("folder", "table"):
        raise DataError(
            f"data.source: '{spec.resolved_source}' has no masks, and this task learns from masks: name a folder with "
            "images/ and masks/, or a table with the columns path and mask, with data.root"
        )
    root = Path(spec.root)
    if spec.resolved_source == "table":
        name, folder, listed = (
            str(root),
            root.parent,
            list_table(root, spec.allow_outside, "mask", band_files=spec.band_files),
        )
    else:
        name, folder, listed = (
            str(root),
            root,
            _list_pairs(root, spec.band_files).assign(group=None, lon=np.nan, lat=np.nan),
        )
    images = MaskedImages(
        name,
        folder,
        listed,
        spec.masks,
        bands=spec.bands,
        on_bad_file=spec.on_bad_file,
        workers=loader_workers(spec.workers),
    )
    images.decode_for(None, spec.cache_gb)  # pixels lie where those of the mask do: never decoded smaller
    return images


@dataclass(frozen=True)
class Meaning:
    """What the values of masks mean.

    Attributes:
        classes: Names of the classes.
        values: (V,) ascending values, or colours as ``red * 65536 + green * 256 + blue``.
        positions: (V,) uint8, the class of each value, `IGNORE` for those without.
        threshold: Instead of `values`: up to it is class 0, above it class 1.
        colours: Whether masks are read as colours.
    """

    classes: tuple[str, ...]
    values: np.ndarray
    positions: np.ndarray
    threshold: float | None = None
    colours: bool = False

    @classmethod
    def of(cls, spec: MaskSpec, found: Sequence[int], name: str) -> Meaning:
        """Settle it from a recipe, or from the values that the masks hold where the recipe leaves it open.

        Args:
            spec: The `data.masks` part of a recipe.
            found: Every value that occurs.
            name: Of the source, for messages.

        Raises:
            DataError: If the values cannot be classes.
        """
        if spec.threshold is not None:
            names = spec.names or ("background", "object")
            ignored = np.array(sorted(_code(value) for value in spec.ignore), dtype=np.int64)
            return cls(names, ignored, np.full(len(ignored), IGNORE, np.uint8), spec.threshold)
        if spec.classes is not None:
            classes, codes = tuple(spec.classes), [_code(value) for value in spec.classes.values()]
        else:
            codes = sorted(set(found) - {_code(value) for value in spec.ignore})
            classes = tuple(str(value) for value in codes)
            if len(codes) > _MOST_VALUES:
                raise DataError(
                    f"{name}: the masks hold {len(codes)} values, too many to be classes; set data.masks.threshold=127 "
                    "for grey masks of one object, or name the classes with data.masks.classes"
                )
            if len(codes) < 2:
                only = f"only the value {codes[0]}" if codes else "no value"
                raise DataError(f"{name}: the masks hold {only}; at least two classes are needed")
            if IGNORE in codes and len(codes) > 2:
                raise DataError(
                    f"{name}: the masks hold 255 beside {len(codes) - 1} other values: is it a class, or a pixel "
                    "whose class is not known? Set data.masks.ignore=[255], or name the classes with "
                    "data.masks.classes"
                )
        table = {code: position for position, code in enumerate(codes)}
        table |= {_code(value): IGNORE for value in spec.ignore}
        values = np.array(sorted(table), dtype=np.int64)
        positions = np.array([table[int(value)] for value in values], dtype=np.uint8)
        return cls(classes, values, positions, None, spec.colours)

    def unknown(self, found: np.ndarray) -> np.ndarray:
        """Return those of the found values that have no meaning."""
        return found[:0] if self.threshold is not None else np.setdiff1d(found, self.values)

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Turn values (...) into uint8 positions in `classes` and `IGNORE`.

        Raises:
            DataError: If a value has no meaning.
        """
        at = np.minimum(np.searchsorted(self.values, raw), max(len(self.values) - 1, 0))
        known = self.values[at] == raw if len(self.values) else np.zeros(raw.shape, dtype=bool)
        if self.threshold is not None:
            mask = (raw > self.threshold).astype(np.uint8)
            mask[known] = IGNORE
            return mask
        if not known.all():
            raise DataError(f"holds {self.say(np.unique(raw[~known]))}, which no class has")
        return self.positions[at]

    def say(self, values: Sequence[int] | np.ndarray) -> str:
        """Return values in words, the first five."""
        shown = [str(_colour(int(value))) if self.colours else str(int(value)) for value in values[:5]]
        return f"value{'s' if len(values) > 1 else ''} {', '.join(shown)}" + (", ..." if len(values) > 5 else "")


class MaskedImages(ImageFiles):
    """Image files with a mask file each.

    Args:
        name: What data.root names, for messages.
        root: Folder that ids and masks are relative to.
        listed: As for `ImageFiles`, and `mask`: the path of the mask.
        masks: What the values of the masks mean.
        bands: As for `ImageFiles`.
        on_bad_file: `error`: an image or a mask that cannot be used stops here. `skip`: both are left out and listed.
        workers: Threads that check the files.

    Raises:
        DataError: If an image or a mask cannot be used, or the values of the masks cannot be classes.
    """

    target: Target = "mask"

    def __init__(
        self,
        name: str,
        root: Path,
        listed: pd.DataFrame,
        masks: MaskSpec,
        *,
        bands: Sequence[str | int] | None = None,
        on_bad_file: Literal["error", "skip"] = "error",
        workers: int = 1,
    ) -> None:
        mask_of = dict(zip(listed["id"], listed["mask"], strict=True))
        listed = listed.assign(**{"class": "image"})
        super().__init__(name, root, listed, bands=bands, on_bad_file=on_bad_file, workers=workers)
        assert self.contents is not None
        paths = [root / mask_of[identity] for identity in self.manifest["id"]]
        found = _check_masks(name, paths, masks.colours, workers)

        reasons: dict[int, str] = {i: e for i, e in enumerate(found["error"]) if isinstance(e, str)}
        for i, (height, width) in enumerate(zip(found["height"], found["width"], strict=True)):
            image = (int(self.contents["height"].iloc[i]), int(self.contents["width"].iloc[i]))
            if i not in reasons and (height, width) != image:
                reasons[i] = f"is {height} x {width} pixels, its image {image[0]} x {image[1]}"
        usable = [np.asarray(values) for i, values in enumerate(found["values"]) if i not in reasons]
        every = np.unique(np.concatenate(usable)) if usable else np.empty(0, dtype=np.int64)
        if usable:
            self.meaning = Meaning.of(masks, every.tolist(), name)
            for i, values in enumerate(found["values"]):
                if i in reasons:
                    continue
                unknown = self.meaning.unknown(np.asarray(values))
                if len(unknown):
                    said = self.meaning.say(unknown)
                    reasons[i] = f"holds {said}, which no class has; see data.masks.classes and data.masks.ignore"
        bad = [(str(paths[i]), reason) for i, reason in sorted(reasons.items())]
        if bad and (on_bad_file == "error" or len(bad) == len(paths)):
            raise DataError(bad_files_message(bad, len(paths)))
        self.skipped += bad

        keep = np.array([i for i in range(len(paths)) if i not in reasons], dtype=np.int64)
        self.classes = self.meaning.classes
        self.manifest = self.manifest.iloc[keep].reset_index(drop=True)
        self.manifest["mask"] = [str(paths[i]) for i in keep]
        self.contents = self.contents.iloc[keep].reset_index(drop=True)
        self._paths = self.manifest["path"].tolist()
        self._masks: list[str] = self.manifest["mask"].tolist()
        found = found.iloc[keep]
        self.values = _total(found)
        """Pixels of each value that the masks hold."""
        self.pixels = np.stack([self._count(v, n) for v, n in zip(found["values"], found["counts"], strict=True)])
        content = [f"{a}{b}" for a, b in zip(self.contents["sha256"], found["hash"], strict=True)]
        self.fingerprint = fingerprint_of(zip(self.manifest["id"], self.manifest["label"], content, strict=True))

    def _count(self, values: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Pixels of each class (K,) int64."""
        position = self.meaning.encode(np.asarray(values, dtype=np.int64))
        return np.bincount(position, weights=np.asarray(counts), minlength=256)[: len(self.classes)].astype(np.int64)

    def read_target(self, row: int) -> MaskTarget:
        """Return the mask of image `row`.

        Raises:
            DataError: If the file has gone or changed since it was checked.
        """
        try:
            return MaskTarget(self.meaning.encode(read_mask(self._masks[row], colours=self.meaning.colours)))
        except DataError as error:
            message = str(error)
            raise DataError(
                message if message.startswith(self._masks[row]) else f"{self._masks[row]}: {message}"
            ) from error


def read_mask(path: str | Path, *, colours: bool = False) -> np.ndarray:
    """Read the values of a mask file.

    Args:
        path: PNG or TIFF (or another picture). The values of a palette are its positions, those of a black-and-white
            picture 0 and 1; a TIFF has one band and whole numbers.
        colours: Read colours instead, as ``red * 65536 + green * 256 + blue``.

    Returns:
        (H, W) int64.

    Raises:
        DataError: If the file is missing, broken, too large, or no mask.
    """
    path = Path(path)
    if colours:
        rgb = read_image(path)
        if rgb.dtype != np.uint8 or rgb.shape[2] != 3:
            raise DataError(f"{path}: has {rgb.shape[2]} band(s) of {rgb.dtype}, and colours were asked for")
        codes: np.ndarray = rgb.astype(np.int64) @ np.array([65536, 256, 1])
        return codes
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(8)
    if head == b"\x89PNG\r\n\x1a\n":
        return _png_values(path)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff_values(path)
    return _grey(path, read_image(path))


def _png_values(path: Path) -> np.ndarray:
    """Values of a PNG: positions of a palette, 0 and 1, or grey."""
    with naming(path, "cannot be decoded"), path.open("rb") as file:
        picture: Image.Image = PngImagePlugin.PngImageFile(file)
        if picture.height * picture.width * 8 > MAX_IMAGE_BYTES:
            raise DataError(f"{path}: {picture.height} x {picture.width} pixels are too many; cut it into tiles")
        if picture.mode in ("P", "1", "L", "I;16", "I"):
            return np.asarray(picture).astype(np.int64)
    return _grey(path, read_image(path))


def _tiff_values(path: Path) -> np.ndarray:
    """Values of a single-band TIFF, also of one with a palette."""
    read_image(path)  # its checks and messages
    with naming(path, "cannot be decoded"), open_raster(path) as dataset:
        if dataset.count == 1:
            values = dataset.read(1)
            if values.dtype.kind == "f":
                whole = np.isfinite(values) & (values == np.rint(values))
                if not whole.all():
                    raise DataError(f"{path}: holds {values[~whole][0]:g}; the values of a mask are whole numbers")
            return np.asarray(values, dtype=np.int64)
    return _grey(path, read_image(path))


def _grey(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Values of a picture whose colours are all grey."""
    if pixels.dtype.kind != "u" or (pixels != pixels[..., :1]).any():
        raise DataError(
            f"{path}: holds colours, not values; name the classes by their colours, e.g. "
            "data.masks.classes={water: [0, 0, 255], land: [0, 0, 0]}"
        )
    return pixels[..., 0].astype(np.int64)


def _check_masks(name: str, paths: Sequence[Path], colours: bool, workers: int) -> pd.DataFrame:
    """One row per mask, from the cache if that remembers the file: what `_check_mask` says."""
    memory = memory_of(f"{name}#masks{'#colours' if colours else ''}")
    stamps = [stamp_of(path) for path in paths]
    known = recall(memory, _CHECK)
    rows = [known.get((str(path), stamp)) for path, stamp in zip(paths, stamps, strict=True)]
    fresh = [i for i, row in enumerate(rows) if row is None]
    if fresh:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            checked = pool.map(lambda i: _check_mask(paths[i], stamps[i], colours), fresh)
            for i, row in zip(fresh, checked, strict=True):
                rows[i] = row
        remember(memory, pd.DataFrame(rows))
    return pd.DataFrame(rows)


def _total(found: pd.DataFrame) -> dict[int, int]:
    """Pixels of each value over some masks, ascending."""
    total: dict[int, int] = {}
    for values, counts in zip(found["values"], found["counts"], strict=True):
        for value, count in zip(values, counts, strict=True):
            total[int(value)] = total.get(int(value), 0) + int(count)
    return dict(sorted(total.items()))


def _check_mask(path: Path, stamp: str, colours: bool) -> dict[str, Any]:
    """Decode one mask: its values, their counts, hash, height, width, and error (None for a good file)."""
    row: dict[str, Any] = {"id": str(path), "stamp": stamp, "check": _CHECK, "error": None, "hash": ""}
    row |= {"values": [], "counts": [], "height": 0, "width": 0}
    try:
        raw = read_mask(path, colours=colours)
    except DataError as error:
        return {**row, "error": str(error).removeprefix(f"{path}: ")}
    values, counts = np.unique(raw, return_counts=True)
    row |= {"values": values.tolist(), "counts": counts.tolist(), "hash": pixel_hash(raw)}
    return {**row, "height": raw.shape[0], "width": raw.shape[1]}


def _code(value: int | tuple[int, ...]) -> int:
    """A value, or a colour as one number."""
    return value if isinstance(value, int) else value[0] * 65536 + value[1] * 256 + value[2]


def _colour(code: int) -> list[int]:
    """A colour from its number."""
    return [code >> 16, code >> 8 & 255, code & 255]


# ---------------------------------------------------------------------------------------------------- folders


def _list_pairs(root: Path, band_files: Sequence[str] | None) -> pd.DataFrame:
    """Columns id and mask (paths relative to root) and part (None without part folders)."""
    if not root.is_dir():
        if root.exists():
            raise DataError(f"{root}: is a file; data.root is a folder with images/ and masks/, or a table")
        near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise DataError(f"{root}: no such folder{did_you_mean(root.name, near)}")
    folders = {p.name.lower(): p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    rows: list[tuple[str, str, str | None]] = []
    if "train" in folders and "images" not in folders:
        for name, folder in sorted(folders.items()):
            if name not in PART_OF_FOLDER:
                raise DataError(f"{folder}: stands beside train; only folders named train, val and test may")
            rows += [(*pair, PART_OF_FOLDER[name]) for pair in _pairs(root, folder, band_files)]
    else:
        pairs = _pairs(root, root, band_files)
        tops = {Path(image).parts[1].lower() if len(Path(image).parts) > 2 else "" for image, _ in pairs}
        if "train" in tops and tops <= set(PART_OF_FOLDER):  # images/train/..., masks/train/...
            rows += [(image, mask, PART_OF_FOLDER[Path(image).parts[1].lower()]) for image, mask in pairs]
        else:
            rows += [(image, mask, None) for image, mask in pairs]
    return pd.DataFrame(rows, columns=["id", "mask", "part"], dtype=object)


def _pairs(root: Path, folder: Path, band_files: Sequence[str] | None) -> list[tuple[str, str]]:
    """(image, mask), relative to root, of the files of the same name below folder/images and folder/masks."""
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            near = did_you_mean(name, [p.name for p in folder.iterdir() if p.is_dir()])
            raise DataError(f"{folder}: has no folder '{name}'{near}; expected images/ and masks/ with the same names")
    files = find_images([folder / "images"], band_files)
    images = {name_of(p.relative_to(folder / "images")).as_posix(): p for p in files}
    found = find_images([folder / "masks"])
    masks = {p.relative_to(folder / "masks").with_suffix("").as_posix(): p for p in found}
    if len(masks) < len(found):
        raise DataError(f"{folder / 'masks'}: two masks have the same name but for their suffix")
    alone = sorted(set(images) - set(masks))
    if alone:
        raise DataError(
            f"{images[alone[0]]}: has no mask ({len(alone)} of {len(images)} images have none); expected "
            f"{folder / 'masks' / alone[0]} with any image suffix"
        )
    surplus = sorted(set(masks) - set(images))
    if surplus:
        raise DataError(
            f"{masks[surplus[0]]}: has no image ({len(surplus)} of {len(masks)} masks have none)"
            f"{did_you_mean(surplus[0], images)}"
        )
    return [(p.relative_to(root).as_posix(), masks[stem].relative_to(root).as_posix()) for stem, p in images.items()]
