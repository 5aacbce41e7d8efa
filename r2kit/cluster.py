"""Prediction on many machines with Ray Data: the files of the local engine, piece by piece, retried and resumable.

Images are divided into pieces of whole batches, so that the network sees the batches that one machine would give it;
the table of each piece is written whole or not at all beside the final one, and a later try takes up what is there. A
scene is a piece of its own: `maps` writes and resumes it. Run, images and output have to lie where every machine sees
them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from r2kit.console import make_console
from r2kit.data.reader import find_images
from r2kit.errors import DataError, R2kitError, require
from r2kit.finder import refuse_tta
from r2kit.maps import MapSettings, map_files, predict_map, whole_scenes
from r2kit.predict import predict
from r2kit.predict.classification import bad_files, write_table
from r2kit.predict.detection import SUFFIXES, find_objects, write_objects
from r2kit.predict.segmentation import mask_folder, mask_names, predict_masks, refuse_own, write_tables
from r2kit.run import Run
from r2kit.write_boxes import with_paths

_BATCHES = 4  # in a piece
_TRIES = 3
_MASKS = ("segmentation", "saliency")
_BOXES = ("detection", "instance")

Outcome = tuple[int, str]
"""Number of a piece, and why it failed; an empty text where it did not."""


@dataclass(frozen=True)
class Piece:
    """Some work for one machine.

    Attributes:
        number: Its place among all.
        inputs: Files to read.
        output: File to write; it exists when the piece is done, whole or not at all.
        names: Of the masks of the inputs; empty where none are written.
    """

    number: int
    inputs: tuple[str, ...]
    output: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Images:
    """Work on a piece of images: the table that `r2kit predict` would give, and the masks.

    Attributes:
        run: Its folder.
        kind: Of its task.
        batch_size: Images at once.
        device: See `inference.choose_device`.
        tta: Average over the eight orientations.
        masks: Folder of the masks; None where none are written.
    """

    run: str
    kind: str
    batch_size: int
    device: str
    tta: bool
    masks: str | None

    def __call__(self, piece: Piece) -> None:
        """Write the table of a piece, with the images that could not be read."""
        run, files = Run.open(self.run), [Path(name) for name in piece.inputs]
        if self.masks is not None:
            found = predict_masks(
                run,
                files,
                piece.names,
                Path(self.masks),
                batch_size=self.batch_size,
                workers=0,
                device=self.device,
                tta=self.tta,
            )
        elif self.kind in _BOXES:
            found = find_objects(run, files, batch_size=self.batch_size, workers=0, device=self.device)
        else:
            found = predict(
                run, files, batch_size=self.batch_size, device=self.device, tta=self.tta, on_bad_file="skip"
            )
        skipped: dict[Any, Any] = {"r2kit.skipped": found.attrs["skipped"]}
        draft = Path(f"{piece.output}.{os.getpid()}.part")
        found.attrs = skipped  # pandas keeps it inside the Parquet file
        found.to_parquet(draft, index=False)
        os.replace(draft, piece.output)


@dataclass(frozen=True)
class Scene:
    """Work on one scene: its map."""

    run: str
    settings: MapSettings

    def __call__(self, piece: Piece) -> None:
        """Make the map, or go on with it."""
        predict_map(Run.open(self.run), piece.inputs[0], piece.output, self.settings)


def predict_table(
    run: Run,
    paths: Sequence[str | Path],
    out: Path,
    *,
    batch_size: int = 64,
    device: str = "auto",
    tta: bool = False,
    console: Console | None = None,
) -> pd.DataFrame:
    """Predict image files on a Ray cluster; files and table are those of `r2kit.predict.predict`.

    Args:
        run: A finished run.
        paths: Image files and folders.
        out: As for `r2kit.predict.predict`: the name of the tables, or the folder of the masks.
        batch_size: Images at once.
        device: See `inference.choose_device`.
        tta: Average over the eight orientations of each image.
        console: Where progress is printed; None prints nothing.

    Raises:
        MissingExtraError: If Ray is not installed.
        RunError: If `tta` is asked of a detector.
        DataError: If there is no image, a piece failed in every try, or an image could not be read (after the others
            are written).
    """
    require("ray", "ray[data]", "ray", "--engine ray")
    kind = run.recipe.task.kind
    if kind in _BOXES:
        refuse_tta(tta)
    images = find_images(paths, run.recipe.data.band_files)
    files, given = [str(path.resolve()) for path in images], [str(path) for path in images]
    masks: Path | None = None
    names: list[str] = []
    if kind in _MASKS:
        masks, names = mask_folder(out), mask_names(images)
        refuse_own(images, masks, names)
    task = Images(
        str(run.path.resolve()), kind, batch_size, device, tta, None if masks is None else str(masks.resolve())
    )
    facts = [run.info["id"], hashlib.sha256(run.weights_file.read_bytes()).hexdigest(), files, batch_size, tta]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    stem = out.with_suffix("") if out.suffix.lower() in SUFFIXES else out
    folder = stem.with_name(f".{stem.name}.{key}.pieces").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}; give another --out") from None
    size = _BATCHES * batch_size
    pieces = [
        Piece(
            number,
            tuple(files[first : first + size]),
            str(folder / f"{number:06d}.parquet"),
            tuple(names[first : first + size]),
        )
        for number, first in enumerate(range(0, len(files), size))
    ]
    left = [piece for piece in pieces if not Path(piece.output).is_file()]
    console = console or make_console(quiet=True)
    if len(left) < len(pieces):
        console.print(f"{len(pieces) - len(left)} of {len(pieces)} pieces are done already")
    _refuse_failed(finish(left, lambda some: _on_ray(task, some, device), console), len(pieces))
    table, skipped = _together(pieces, dict(zip(files, given, strict=True)))
    read = len(table)
    if kind in _BOXES:
        objects, read = table, int((table["kind"] == "image").sum())
        table = with_paths(objects)
        table.attrs["written"] = write_objects(objects, run.preprocess.classes, out)
    elif masks is not None:
        table["mask"] = [str(masks / Path(name).name) for name in table["mask"]]
        table.attrs["skipped"] = skipped
        write_tables(table, masks)
    else:
        attributes: dict[Any, Any] = {"tta": tta, "skipped": skipped}
        table.attrs = attributes
        table.attrs["written"] = write_table(table, out)
    shutil.rmtree(folder)
    if skipped:
        raise DataError(bad_files([(path, reason) for path, reason in skipped], read, table.attrs["written"]))
    return table


def _together(pieces: Sequence[Piece], given: dict[str, str]) -> tuple[pd.DataFrame, list[list[str]]]:
    """The rows of all pieces under the names that were given, and [path, reason] of what could not be read."""
    tables = [pd.read_parquet(piece.output) for piece in pieces]
    skipped = [[given[path], reason] for table in tables for path, reason in table.attrs["r2kit.skipped"]]
    table = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    table.attrs = {}
    for column in ("id", "path"):
        if column in table:
            table[column] = table[column].map(given)
    return table, skipped


def predict_scenes(
    run: Run, scenes: Sequence[Path], out: Path, settings: MapSettings, *, console: Console | None = None
) -> list[Path]:
    """Make the maps of scenes on a Ray cluster; the files are those of `r2kit.maps.predict_maps`.

    Raises:
        MissingExtraError: If Ray is not installed.
        DataError: If two scenes would write one map, or after all others were made, if one could not be.
    """
    require("ray", "ray[data]", "ray", "--engine ray")
    scenes = whole_scenes(run, scenes)
    targets = map_files(scenes, out)
    pieces = [
        Piece(number, (str(scene.resolve()),), str(target.resolve()))
        for number, (scene, target) in enumerate(zip(scenes, targets, strict=True))
    ]
    task = Scene(str(run.path.resolve()), replace(settings))
    # Scenes that are finished are left to `maps`, which knows with which settings.
    failed = finish(pieces, lambda some: _on_ray(task, some, settings.device), console or make_console(quiet=True))
    _refuse_failed(failed, len(pieces))
    return targets


def finish(
    pieces: Sequence[Piece], work: Callable[[Sequence[Piece]], Sequence[Outcome]], console: Console
) -> list[tuple[Piece, str]]:
    """Do pieces, and those that failed again; return what failed in every try, with the last reason."""
    left, reasons = list(pieces), dict[int, str]()
    for number in range(1, _TRIES + 1):
        if not left:
            break
        reasons = {piece: reason for piece, reason in work(left) if reason}
        left = [piece for piece in left if piece.number in reasons]
        if left:
            console.print(
                f"try {number} of {_TRIES}: {len(left)} pieces failed, the first because {min(reasons.items())[1]}"
            )
    return [(piece, reasons[piece.number]) for piece in left]


def _refuse_failed(failed: Sequence[tuple[Piece, str]], total: int) -> None:
    """Raise where pieces failed in every try."""
    if failed:
        raise DataError(
            f"{len(failed)} of {total} pieces failed {_TRIES} times; what is done is kept, the same command goes on: "
            + "; ".join(reason for _, reason in failed[:3])
        )


def row_of(piece: Piece) -> dict[str, Any]:
    """A piece as Ray sends it."""
    return {**asdict(piece), "inputs": list(piece.inputs), "names": list(piece.names)}


class _Worker:
    """One process of the cluster: does pieces, and tells of those that fail in place of ending the job."""

    def __init__(self, task: Callable[[Piece], None]) -> None:
        self.task = task

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do the piece of a row."""
        inputs, names = (tuple(str(word) for word in row[key]) for key in ("inputs", "names"))
        piece = Piece(int(row["number"]), inputs, str(row["output"]), names)
        try:
            self.task(piece)
        except (R2kitError, OSError, RuntimeError, ValueError) as error:
            return {"number": piece.number, "reason": f"{type(error).__name__}: {error}"}
        return {"number": piece.number, "reason": ""}


def _hush(logger: logging.Logger) -> None:
    """Leave errors alone on the console; the rest stays in the files of Ray's own session."""
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)


def _on_ray(task: Callable[[Piece], None], pieces: Sequence[Piece], device: str) -> list[Outcome]:
    """Do pieces on the cluster that RAY_ADDRESS names, else on this machine; one process for each GPU, or each core."""
    import ray
    import ray.data

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray deprecates parts of itself in every release
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        _hush(logging.getLogger("ray.data"))
        ray.data.DataContext.get_current().enable_progress_bars = False
        has = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(has.get("GPU", 0))
        most = max(1, min(len(pieces), gpus or int(has.get("CPU", 1))))
        rows = [row_of(piece) for piece in pieces]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=(task,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        return [(int(row["number"]), str(row["reason"])) for row in done.iter_rows()]
