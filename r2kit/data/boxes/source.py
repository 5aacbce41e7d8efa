"""Images with boxes, as a source of training data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from r2kit.data.boxes.coco import read_coco
from r2kit.data.boxes.listing import BoxListing
from r2kit.data.boxes.settle import BadBox, Boxes, rasterize, settle
from r2kit.data.boxes.voc import read_voc
from r2kit.data.boxes.yolo import read_yolo
from r2kit.data.files import ImageFiles, bad_files_message
from r2kit.data.sources import Target, fingerprint_of, loader_workers
from r2kit.data.targets import BoxTarget
from r2kit.errors import DataError, did_you_mean
from r2kit.recipe import DataSpec

_READERS = {"coco": read_coco, "yolo": read_yolo, "voc": read_voc}


def open_boxes(spec: DataSpec, *, outlines: bool) -> BoxedImages:
    """Open the images and boxes that a recipe names.

    Args:
        spec: The `data` part of a recipe.
        outlines: Whether every object must have an outline.

    Raises:
        DataError: If they cannot be used.
    """
    if spec.root is None:
        raise DataError(
            "data.root: this task learns from boxes: name a COCO .json file, a YOLO folder with images/ and labels/, "
            "or a VOC folder with JPEGImages/ and Annotations/"
        )
    root = Path(spec.root)
    kind = _format(root) if spec.boxes.format == "auto" else spec.boxes.format
    listing = _READERS[kind](root, spec.boxes.classes)
    images = BoxedImages(
        listing,
        outlines=outlines,
        bands=spec.bands,
        on_bad_box=spec.boxes.on_bad_box,
        on_bad_file=spec.on_bad_file,
        workers=loader_workers(spec.workers),
    )
    images.decode_for(None, spec.cache_gb)  # boxes are in pixels of the whole image: never decoded smaller
    return images


def _format(root: Path) -> Literal["coco", "yolo", "voc"]:
    """Tell the format by what is there.

    Raises:
        DataError: If it could be none of the three.
    """
    if not root.exists():
        near = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(f"{root}: no such file or folder{did_you_mean(root.name, near)}")
    if root.is_file():
        if root.suffix.lower() == ".json":
            return "coco"
        raise DataError(f"{root}: no file of boxes; a COCO file ends in .json")
    if (root / "Annotations").is_dir():
        return "voc"
    if (root / "labels").is_dir() or any(root.glob("*/labels")):
        return "yolo"
    if any(root.glob("*.json")) or any(root.glob("*/*.json")):
        return "coco"
    if any(root.glob("*.xml")):
        return "voc"
    raise DataError(
        f"{root}: holds no boxes that are known; expected a COCO .json file, images/ and labels/ (YOLO), or "
        "JPEGImages/ and Annotations/ (VOC)"
    )


class BoxedImages(ImageFiles):
    """Image files with the objects in each.

    Args:
        listing: As a reader gave it.
        outlines: Whether every object must have an outline, and `read_target` gives masks.
        bands: As for `ImageFiles`.
        on_bad_box: What to do with boxes that do not fit, see `settle`.
        on_bad_file: `error`: an image that is missing or cannot be used stops here. `skip`: it is left out and listed.
        workers: Threads that check the files.

    Raises:
        DataError: If an image or a box cannot be used, or there is no box at all.
    """

    def __init__(
        self,
        listing: BoxListing,
        *,
        outlines: bool = False,
        bands: Sequence[str | int] | None = None,
        on_bad_box: Literal["error", "mend"] = "error",
        on_bad_file: Literal["error", "skip"] = "error",
        workers: int = 1,
    ) -> None:
        if listing.missing and (on_bad_file == "error" or not listing.images):
            raise DataError(bad_files_message(listing.missing, len(listing.missing) + len(listing.images)))
        if not listing.images:
            raise DataError(f"{listing.name}: names no image")
        ids = [_identity(image.path, listing.root) for image in listing.images]
        listed = pd.DataFrame(
            {"id": ids, "class": "image", "part": [image.part for image in listing.images]}, dtype=object
        ).assign(group=None, lon=np.nan, lat=np.nan)
        super().__init__(listing.name, listing.root, listed, bands=bands, on_bad_file=on_bad_file, workers=workers)
        assert self.contents is not None
        self.skipped += listing.missing
        shapes = zip(self.contents["height"], self.contents["width"], strict=True)
        size_of = dict(zip(self.manifest["id"], shapes, strict=True))
        listing = _without_unread(listing, [identity in size_of for identity in ids])
        ids = [identity for identity in ids if identity in size_of]
        assert ids == self.manifest["id"].tolist()
        self.sizes: list[tuple[int, int]] = [(int(size_of[i][0]), int(size_of[i][1])) for i in ids]
        self.boxes: Boxes = settle(listing, self.sizes, on_bad_box)
        self.classes = listing.classes
        self.numbered = listing.relative
        """Whether the files name classes by their position, as YOLO's do."""
        self.outlines = outlines
        self.target: Target = "outlines" if outlines else "boxes"
        if not len(self.boxes.corners):
            raise DataError(f"{listing.name}: no object in {len(ids)} images")
        if outlines and not self.boxes.outlined:
            bare = sum(mask is None for mask in self.boxes.masks)
            raise DataError(
                f"{listing.name}: {bare} of {len(self.boxes.masks)} objects have no outline, which task.kind=instance "
                "learns from; use task.kind=detection for boxes alone"
            )
        content = [f"{sha}{self._digest(row)}" for row, sha in enumerate(self.contents["sha256"])]
        self.fingerprint = fingerprint_of(zip(ids, self.manifest["label"], content, strict=True))

    @property
    def bad_boxes(self) -> list[BadBox]:
        """Boxes that were cut or left out."""
        return self.boxes.bad

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Objects of each class (K,) in rows of the manifest."""
        chosen = np.isin(self.boxes.image, rows)
        return np.bincount(self.boxes.label[chosen] - 1, minlength=len(self.classes))

    def read_target(self, row: int) -> BoxTarget:
        """Return the objects of image `row`."""
        at = self.boxes.of(row)
        masks = None
        if self.outlines:
            size = self.sizes[row]
            try:
                found = [rasterize(mask, size) for mask in self.boxes.masks[at]]
            except DataError as error:
                raise DataError(f"{self.manifest['path'].iloc[row]}: {error}") from error
            masks = np.stack(found) if found else np.zeros((0, *size), dtype=bool)
        return BoxTarget(self.boxes.corners[at], self.boxes.label[at], self.boxes.crowd[at], masks)

    def _digest(self, row: int) -> str:
        """Hash of the objects of an image."""
        at = self.boxes.of(row)
        names = [self.classes[label - 1] for label in self.boxes.label[at]]
        text = f"{self.boxes.corners[at].tolist()} {names} {self.boxes.crowd[at].tolist()} {self.boxes.masks[at]}"
        return hashlib.sha256(text.encode()).hexdigest()


def _identity(path: Path, root: Path) -> str:
    """The path relative to the data's folder, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


def _without_unread(listing: BoxListing, readable: Sequence[bool]) -> BoxListing:
    """The listing without the images that could not be read, and without their boxes."""
    position = np.cumsum(readable) - 1
    return BoxListing(
        listing.name,
        listing.root,
        [image for image, good in zip(listing.images, readable, strict=True) if good],
        [
            type(box)(int(position[box.image]), box.corners, box.name, box.where, box.crowd, box.mask)
            for box in listing.boxes
            if readable[box.image]
        ],
        listing.classes,
        listing.relative,
        listing.missing,
    )
