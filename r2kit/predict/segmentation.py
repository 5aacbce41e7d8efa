"""Predict every pixel of image files: masks, or maps of what stands out, as PNG or GeoTIFF in the images' own place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import rasterio
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from r2kit.data.given import ReadGiven
from r2kit.data.preprocess import Preprocess, missing_pixels
from r2kit.data.reader import find_images, open_raster
from r2kit.data.stacks import name_of, parts_of
from r2kit.data.targets import CLASS_COLOURS, IGNORE
from r2kit.errors import DataError
from r2kit.inference import PixelClassifier, load_images
from r2kit.predict.classification import bad_files
from r2kit.recipe import SaliencySpec, SegmentationSpec
from r2kit.run import Run

TABLE = "predictions"
"""Name of the table beside the masks."""


def predict(
    run: Run,
    paths: str | Path | Iterable[str | Path],
    *,
    out: str | Path | None,
    batch_size: int,
    workers: int,
    device: str,
    tta: bool,
    on_bad_file: Literal["error", "skip"],
) -> pd.DataFrame:
    """Predict the class of every pixel, see `r2kit.predict.predict`.

    `out` is a folder (a suffix .csv or .parquet is taken off). For every image it gets a mask of the image's own size,
    whose value is the position of the class: NAME.tif with the georeference of a TIFF that has one, else NAME.png with
    the classes' colours as its palette. 255 is where nothing was measured or, with ``resize='crop'``, seen. A run of
    salient objects gives grey pictures instead: 255 times the probability of the object, 0 where nothing is known.
    Beside them lie predictions.csv and predictions.parquet.

    Returns:
        One row an image in the order of the paths: ``path``, ``mask`` (the file written, empty without `out`),
        ``height``, ``width``, and ``share_<class>``, the share of the judged pixels of each class.
    """
    files = find_images([paths] if isinstance(paths, str | Path) else list(paths), run.recipe.data.band_files)
    folder = None if out is None else mask_folder(Path(out))
    names = mask_names(files)
    if folder is not None:
        refuse_own(files, folder, names)
    table = predict_masks(run, files, names, folder, batch_size=batch_size, workers=workers, device=device, tta=tta)
    if folder is not None:
        write_tables(table, folder)
    skipped = table.attrs["skipped"]
    if skipped and on_bad_file == "error":
        raise DataError(bad_files(skipped, len(table), "" if folder is None else str(folder)))
    return table


def predict_masks(
    run: Run,
    files: Sequence[Path],
    names: Sequence[str],
    folder: Path | None,
    *,
    batch_size: int,
    workers: int,
    device: str,
    tta: bool,
) -> pd.DataFrame:
    """Write the mask of each image, without the tables beside them.

    Args:
        run: A finished run of a segmentation or of salient objects.
        files: Images.
        names: The name of each mask, without a suffix.
        folder: Where they are written, which is there; None writes nothing.
        batch_size: Images at once.
        workers: Processes that read images.
        device: See `inference.choose_device`.
        tta: Average over the eight orientations of each image.

    Returns:
        The table of `predict`; ``attrs["skipped"]`` lists [path, reason] of each image that could not be read.
    """
    preprocess, spec = run.preprocess, run.recipe.task
    assert isinstance(spec, SegmentationSpec | SaliencySpec)
    grey = isinstance(spec, SaliencySpec)
    classify = PixelClassifier(
        run.model(),
        preprocess,
        spec.overlap,
        device,
        channels_last=run.recipe.train.channels_last,
        batch_size=batch_size,
        tta=tta,
    )
    rows: list[dict[str, Any]] = []
    skipped: list[tuple[str, str]] = []
    pending: list[tuple[int, Tensor, NDArray[np.bool_]]] = []

    def flush() -> None:
        shapes = [(missing.shape[0], missing.shape[1]) for _, _, missing in pending]
        found = classify([image for _, image, _ in pending], shapes)
        for (position, _, missing), (probs, seen) in zip(pending, found, strict=True):
            mask = np.where(seen & ~missing, probs.argmax(0), IGNORE).astype(np.uint8)
            file, written = files[position], ""
            if folder is not None:
                shown = np.where(mask == IGNORE, 0, np.rint(255 * probs[1])).astype(np.uint8) if grey else mask
                written = str(write_mask(shown, file, folder / names[position], () if grey else preprocess.classes))
            rows.append(_row(file, written, mask, preprocess.classes))
        pending.clear()

    read = ReadGiven(preprocess, whole=True)
    for loaded in load_images(read, files, _Prepare(preprocess), batch_size=1, workers=workers):
        skipped += [(str(files[position]), reason) for position, reason in loaded.failed]
        if loaded.index:
            pending.append((loaded.index[0], loaded.tensors[0][0], loaded.tensors[1][0].numpy()))
        if len(pending) >= batch_size or preprocess.resize == "tile":
            flush()
    flush()
    table = pd.DataFrame(rows, columns=["path", "mask", "height", "width", *_shares(preprocess.classes)])
    table.attrs["skipped"] = [list(item) for item in skipped]
    return table


def write_tables(table: pd.DataFrame, folder: Path) -> None:
    """Write the tables beside the masks; ``attrs["written"]`` then names the folder.

    Raises:
        DataError: If they cannot be written.
    """
    try:
        table.to_csv(folder / f"{TABLE}.csv", index=False)
        table.to_parquet(folder / f"{TABLE}.parquet", index=False)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}; give another --out") from None
    table.attrs["written"] = str(folder)


@dataclass(frozen=True)
class _Prepare:
    """The network's input, and where nothing was measured."""

    preprocess: Preprocess

    def __call__(self, raw: NDArray[Any]) -> tuple[Tensor, ...]:
        missing = missing_pixels(raw, self.preprocess.nodata)
        nothing = np.zeros(raw.shape[:2], dtype=bool) if missing is None else missing.all(axis=2)
        return self.preprocess.apply(raw), torch.from_numpy(np.array(nothing))


def mask_folder(out: Path) -> Path:
    """The folder of the masks, made if need be."""
    folder = out.with_suffix("") if out.suffix.lower() in (".csv", ".parquet") else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror or error}; give another --out") from None
    return folder


def refuse_own(files: Sequence[Path], folder: Path, names: Sequence[str]) -> None:
    """Raise where a mask would replace one of the images."""
    written = {(folder / f"{name}{suffix}").resolve() for name in names for suffix in (".png", ".tif")}
    own = next((file for file in files if file.resolve() in written), None)
    if own is not None:
        raise DataError(f"{own}: a mask written into {folder} could replace this image; give another --out")


def mask_names(files: Sequence[Path]) -> list[str]:
    """Return a name for the mask of each file, without a suffix: its own, numbered where two files share it."""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        stem = name_of(file).name
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        names.append(name)
    return names


def write_mask(mask: NDArray[np.uint8], image: Path, stem: Path, classes: Sequence[str]) -> Path:
    """Write a mask beside nothing but its name: GeoTIFF where its image is georeferenced, else PNG with a palette.

    Args:
        mask: (H, W), positions in the classes, 255 for none.
        image: The image that it is of.
        stem: Where to write, without a suffix.
        classes: Their names; none for a grey picture.

    Raises:
        DataError: If it cannot be written.
    """
    palette = {i: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(len(classes))}
    try:
        if image.suffix.lower() in (".tif", ".tiff") or parts_of(image) is not None:
            with open_raster(image) as dataset:
                place = {"crs": dataset.crs, "transform": dataset.transform} if dataset.crs is not None else None
            if place is not None:
                path = stem.with_name(f"{stem.name}.tif")
                options: dict[str, Any] = {
                    "height": mask.shape[0],
                    "width": mask.shape[1],
                    "count": 1,
                    "dtype": "uint8",
                }
                options |= {} if not classes else {"nodata": IGNORE}
                with rasterio.open(path, "w", driver="GTiff", compress="deflate", **options, **place) as written:
                    written.write(mask, 1)
                    if classes:
                        written.write_colormap(1, {**palette, IGNORE: (0, 0, 0)})
                        written.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(classes)})
                return path
        path = stem.with_name(f"{stem.name}.png")
        picture = Image.fromarray(mask)
        if classes:
            colours = np.zeros((256, 3), dtype=np.uint8)
            for value, colour in palette.items():
                colours[value] = colour
            picture.putpalette(colours.ravel().tolist())
        picture.save(path)
        return path
    except (OSError, rasterio.errors.RasterioError) as error:
        raise DataError(f"{stem}: the mask cannot be written: {error}") from None


def _shares(classes: Sequence[str]) -> list[str]:
    """Names of the columns of shares."""
    return [f"share_{name}" for name in classes]


def _row(file: Path, written: str, mask: NDArray[np.uint8], classes: Sequence[str]) -> dict[str, Any]:
    """What the table says of an image."""
    count = np.bincount(mask.ravel(), minlength=256)[: len(classes)]
    shares = count / max(int(count.sum()), 1)
    row = {"path": str(file), "mask": written, "height": mask.shape[0], "width": mask.shape[1]}
    return {**row, **dict(zip(_shares(classes), shares.tolist(), strict=True))}
