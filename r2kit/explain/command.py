"""Explain images with a run: panels beside those of another run, and how much of the evidence lies in the objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from r2kit import metrics, plots
from r2kit.data.dense import known_mask
from r2kit.data.given import ReadGiven
from r2kit.data.masks import read_mask
from r2kit.data.preprocess import Preprocess
from r2kit.data.reader import IMAGE_SUFFIXES, find_images
from r2kit.data.sources import DenseSource
from r2kit.data.stacks import name_of, parts_of
from r2kit.errors import DataError, ModelError, RunError, did_you_mean
from r2kit.explain.look import Explainer, Look, energy_inside, pointed_inside
from r2kit.explain.methods import METHODS, Method
from r2kit.page import template, thumbnail_of
from r2kit.plots import Tile
from r2kit.run import Run, write_atomic

PAGE, TABLE, _PANEL = "index.html", "explain.csv", "panel_"
_SIDE = 320  # pixels of the longer side of a picture on the page
_OUTLINE = (77, 195, 255)  # of the object, over its picture


@dataclass(frozen=True)
class Explanation:
    """What was found out.

    Attributes:
        table: One row an image: ``path``, ``class``, ``answer``, ``score``, ``inside`` (share of the evidence inside
            the object), ``pointed`` (whether its brightest point does), ``covered`` (share of the image that the object
            covers); with another run also ``against_answer``, ``against_score``, ``against_inside``,
            ``against_pointed``; ``note`` says why a cell is empty.
        sentences: How much of the evidence lies inside the objects.
        folder: Where the page, the panels and the table are; None where nothing was written.
    """

    table: pd.DataFrame
    sentences: list[str]
    folder: Path | None


@dataclass(frozen=True)
class _Subject:
    """An image to explain.

    Attributes:
        name: What it is called.
        read: From a run's preprocessing to raw pixels of its bands.
        mask: From the explained class to the object (H, W), where that is known.
    """

    name: str
    read: Callable[[Preprocess], NDArray[Any]]
    mask: Callable[[str], NDArray[np.bool_] | None]


def explain(
    run: Run,
    paths: str | Path | Iterable[str | Path] = (),
    *,
    method: str | None = None,
    target: str | None = None,
    against: Run | None = None,
    masks: str | Path | None = None,
    bands: Sequence[str | int] | None = None,
    limit: int = 12,
    out: str | Path | None = None,
    device: str = "auto",
) -> Explanation:
    """Show where in images the evidence for a class lies.

    Args:
        run: A finished run of any task.
        paths: Image files and folders; without any, `limit` held-out images of the run, drawn by its seed.
        method: One of `METHODS`, see `methods.evidence`; by default Grad-CAM, and HiResCAM for a detection.
        target: The class; by default what the run answers for each image.
        against: Another run of the same kind of task, whose evidence for the same class stands beside.
        masks: Folder with a mask for each image, of the same name but for its suffix: all that is not 0 is the object.
            Without it, the run's own masks are taken for its held-out images, and in a detection the explained box.
        bands: One or three bands to show, by name or position from 1.
        limit: Held-out images at most.
        out: Folder to write into, by default ``explain`` in the run's folder.
        device: See `inference.choose_device`.

    Raises:
        DataError: If an image or a mask cannot be read, or there is no such band.
        ModelError: If the method or the class is unknown, or the method does not apply to the task.
        RunError: If the other run does not know the class, or is of another kind of task.
    """
    if method is not None and method not in METHODS:
        raise ModelError(f"--method: '{method}' is none; use {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    if against is not None:
        _check_against(run, against, target)
    first = Explainer(run, method=method, bands=bands, device=device)
    second = None
    if against is not None:
        second = Explainer(against, method=method, bands=bands, device=device)
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    subjects = _files(run, listed, masks) if listed else _held_out(run, limit, masks)
    folder = run.path / "explain" if out is None else Path(out)
    rows, panels = [], []
    for subject in subjects:
        row, tiles = _explain_one(first, second, subject, target)
        rows.append(row)
        panels.append(tiles)
    table = pd.DataFrame(rows)
    sentences = _sentences(table, run, against, first.method)
    _write(folder, table, panels, sentences, run, against, first.method)
    return Explanation(table, sentences, folder)


def _check_against(run: Run, against: Run, target: str | None) -> None:
    """Refuse a run that cannot be put beside another."""
    ours, theirs = run.recipe.task.kind, against.recipe.task.kind
    if ours != theirs:
        raise RunError(f"--against: {against.path} is of task {theirs}, and {run.path} of {ours}")
    classes = run.preprocess.classes if target is None else (target,)
    for name in classes:
        if name not in against.preprocess.classes:
            raise RunError(f"--against: {against.path} knows no class '{name}'")


# --------------------------------------------------------------------------------------------------- the images


def _files(run: Run, paths: Sequence[str | Path], masks: str | Path | None) -> list[_Subject]:
    """The image files, each with its mask where there is a folder of them."""
    subjects = []
    for path in find_images(paths, run.recipe.data.band_files):
        file = None if masks is None else _mask_of(name_of(path).name, Path(masks))
        subjects.append(_Subject(str(path), _read_file(path), _file_mask(file)))
    return subjects


def _read_file(path: Path) -> Callable[[Preprocess], NDArray[Any]]:
    return lambda preprocess: ReadGiven(preprocess, whole=True)(path)


def _mask_of(name: str, folder: Path) -> Path:
    """The mask of an image."""
    if not folder.is_dir():
        raise DataError(f"--masks: {folder} is no folder")
    for suffix in IMAGE_SUFFIXES:
        file = folder / f"{name}{suffix}"
        if file.is_file():
            return file
    near = did_you_mean(name, [entry.stem for entry in folder.iterdir()])
    raise DataError(f"--masks: {folder} has no mask for {name}: a file named {name}.png or the like{near}")


def _file_mask(file: Path | None) -> Callable[[str], NDArray[np.bool_] | None]:
    return lambda name: None if file is None else read_mask(file) != 0


def _held_out(run: Run, limit: int, masks: str | Path | None) -> list[_Subject]:
    """Held-out images of the run's own data."""
    module = run.datamodule()
    module.setup()
    rows = np.asarray(module.split.test if len(module.split.test) else module.split.val, dtype=np.int64)
    drawn = np.sort(np.random.default_rng(run.recipe.seed).permutation(rows)[:limit])
    source = module.source

    def subject(row: int) -> _Subject:
        def read(preprocess: Preprocess) -> NDArray[Any]:
            if preprocess.bands != tuple(source.bands):
                raise RunError(
                    f"--against: its bands are {', '.join(preprocess.bands)}, and the data has "
                    f"{', '.join(source.bands)}"
                )
            if preprocess.scale != source.scale:
                raise RunError(
                    f"--against: its pixels are divided by {preprocess.scale:g}, and those of the data by "
                    f"{source.scale:g}"
                )
            return source.read(row)

        def mask(name: str) -> NDArray[np.bool_] | None:
            if source.target != "mask":
                return None
            given = cast(DenseSource, source).read_target(row).mask
            known = known_mask(given, source.read(row), module.preprocess.nodata, module.remapped)
            return known == module.classes.index(name)

        name = str(source.manifest["id"].iloc[row])
        file = None if masks is None else _mask_of(name_of(Path(name)).name, Path(masks))
        return _Subject(name, read, mask if file is None else _file_mask(file))

    return [subject(int(row)) for row in drawn]


# -------------------------------------------------------------------------------------------------- the answers


def _explain_one(
    first: Explainer, second: Explainer | None, subject: _Subject, target: str | None
) -> tuple[dict[str, Any], list[Tile]]:
    """The row and the pictures of one image."""
    raw = subject.read(first.preprocess)
    look = first.look(raw, target)
    row: dict[str, Any] = {"path": subject.name, "class": target, "answer": None, "score": None}
    if look is None:
        return {**row, "note": _nothing(first.run, target)}, []
    row |= {"class": look.question.name, "answer": look.question.words, "score": look.question.score}
    mask, object_tile = subject.mask(look.question.name), []
    if mask is not None:
        if mask.shape != raw.shape[:2]:
            sizes = [f"{height} x {width}" for height, width in (mask.shape, raw.shape[:2])]
            raise DataError(f"{subject.name}: its mask has {sizes[0]} pixels, the image {sizes[1]}")
        object_tile = [Tile(_outlined(look.picture, first.mask(mask, look.window)), "the object")]
    row |= _inside(first, look, mask)
    shown = Path(subject.name) if parts_of(subject.name) is None else name_of(Path(subject.name))
    tiles = [Tile(look.picture, shown.name), Tile(look.overlay, f"evidence for {look.question.words}")]
    if second is not None:
        alike = all(getattr(first.preprocess, key) == getattr(second.preprocess, key) for key in ("bands", "scale"))
        piece = raw if alike else subject.read(second.preprocess)
        other = second.look(piece[look.window], look.question.name, look.share_of_sides)
        if other is None:
            row |= {"against_answer": None, "against_score": None, "note": _nothing(second.run, look.question.name)}
            nothing = np.full_like(look.picture, 128)
            tiles.append(Tile(nothing, "the other run finds nothing here"))
        else:
            row |= {"against_answer": other.question.words, "against_score": other.question.score}
            part = None if mask is None else mask[look.window]
            theirs = _inside(second, other, part)
            row |= {"against_inside": theirs["inside"], "against_pointed": theirs["pointed"]}
            tiles.append(Tile(other.overlay, f"other run: {other.question.words}"))
    return row, tiles + object_tile


def _inside(explainer: Explainer, look: Look, mask: NDArray[np.bool_] | None) -> dict[str, float | bool | None]:
    """How much of the evidence lies inside the object, whether its peak does, and how much of the image that covers."""
    if look.question.box is not None and mask is None:
        x0, y0, x1, y1 = np.rint(look.question.box).astype(int)
        fitted = np.zeros(look.heat.shape, dtype=bool)
        fitted[max(y0, 0) : y1, max(x0, 0) : x1] = True
    elif mask is not None:
        fitted = explainer.mask(mask, look.window)
    else:
        return {"inside": None, "pointed": None, "covered": None}
    return {
        "inside": energy_inside(look.heat, fitted),
        "pointed": pointed_inside(look.heat, fitted),
        "covered": float(fitted.mean()),
    }


def _nothing(run: Run, target: str | None) -> str:
    """Why there is nothing to explain."""
    what = f"'{target}'" if target is not None else "anything"
    if run.recipe.task.kind in ("detection", "instance"):
        return f"no box of {what} is found"
    return f"no pixel is predicted as {what}"


def _outlined(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A picture with all but the object darkened."""
    shown = np.where(mask[..., None], picture, picture // 3).astype(np.uint8)
    edge = np.zeros_like(mask)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    shown[edge] = _OUTLINE
    return shown


def _sentences(table: pd.DataFrame, run: Run, against: Run | None, method: Method) -> list[str]:
    """What the shares come to, each with its interval, and the paired difference of two runs."""
    if "inside" not in table or not table["inside"].notna().any():
        return []
    what = "box" if run.recipe.task.kind in ("detection", "instance") else "object"
    known = table[table["inside"].notna()]
    own = metrics.bootstrap_interval(known["inside"].to_numpy(np.float64))
    covered = 100 * float(known["covered"].mean())
    said = [
        f"{run.path.name} ({run.recipe.model.name}): {100 * own.value:.1f} % of the evidence ({method}) lies inside "
        f"the {what}, {_range(own)}, over {_images(len(known))}; a map that is even everywhere has {covered:.1f} %. "
        f"The brightest point lies inside in {_pointed(known['pointed'])}"
    ]
    if against is not None and "against_inside" in table:
        both = known[known["against_inside"].notna()]
        if len(both):
            other = metrics.bootstrap_interval(both["against_inside"].to_numpy(np.float64))
            said.append(
                f"{against.path.name} ({against.recipe.model.name}): {100 * other.value:.1f} %, {_range(other)}, over "
                f"{_images(len(both))}; the brightest point in {_pointed(both['against_pointed'])}"
            )
            said.append(_difference(both, run, against))
    return said


def _difference(both: pd.DataFrame, run: Run, against: Run) -> str:
    """The paired difference in words."""
    pairs = (both["inside"] - both["against_inside"]).to_numpy(np.float64)
    found = metrics.bootstrap_interval(pairs, bounds=(-1.0, 1.0))
    low, high = 100 * found.low, 100 * found.high
    verdict = "shown on these images" if low > 0 or high < 0 else "not shown"
    if len(both) < 2:
        verdict = "one image shows nothing"
    points = 100 * found.value
    return (
        f"{run.path.name} has {abs(points):.1f} points {'more' if points >= 0 else 'less'} inside than "
        f"{against.path.name} on the same images, 95 % {low:+.1f} to {high:+.1f}: {verdict}"
    )


def _range(interval: metrics.Interval) -> str:
    """An interval in words."""
    return f"95 % {100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _pointed(column: pd.Series) -> str:
    """In how many images the brightest point lies inside."""
    return f"{int(column.astype(bool).sum())} of {len(column)}"


def _images(count: int) -> str:
    """A number of images in words."""
    return "1 image" if count == 1 else f"{count} images"


# -------------------------------------------------------------------------------------------------- the files


def _write(
    folder: Path,
    table: pd.DataFrame,
    panels: Sequence[list[Tile]],
    sentences: Sequence[str],
    run: Run,
    against: Run | None,
    method: Method,
) -> None:
    """Write the page, a picture for each image, and the table; those of before are replaced."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / PAGE).is_file():
            for stale in folder.glob(f"{_PANEL}*.png"):
                stale.unlink()
        for number, tiles in enumerate(panels, 1):
            if tiles:
                name = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(tiles[0].caption).stem)[:60]
                figure = plots.mosaic(tiles, columns=len(tiles), cell=2.6)
                (folder / f"{_PANEL}{number:03d}_{name}.png").write_bytes(plots.png(figure))
        table.to_csv(folder / TABLE, index=False)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}; give another --out") from None
    page = template("explain.html.j2").render(
        run=run,
        against=against,
        method=method,
        sentences=sentences,
        panels=[
            (row, [thumbnail_of(tile, _SIDE) for tile in tiles])
            for row, tiles in zip(table.to_dict("records"), panels, strict=True)
        ],
        files=len(table),
    )
    write_atomic(folder / PAGE, page)
