"""Images listed in a CSV or Parquet table, one row each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from r2kit.data.files import SEPARATOR, ImageFiles, labels_of
from r2kit.data.folder import PART_OF_FOLDER
from r2kit.data.reader import find_images
from r2kit.data.stacks import files_of, parts_of, stack_path
from r2kit.errors import DataError, did_you_mean, naming

COLUMNS = ("path", "label", "mask", "split", "group", "lon", "lat")
_SHOWN = 200  # characters of a cell in a message
_LONGEST = 4096  # characters of a path, on every system
_MEANT = {  # what people write for a column: overlooking it could let a group leak, so it is asked about
    "path": ("file", "filename", "filepath", "file_path", "image", "image_path", "img"),
    "label": ("class", "class_name", "category", "target"),
    "mask": ("masks", "mask_path", "segmentation", "annotation"),
    "split": ("subset", "part"),
    "group": ("groups", "group_id"),
    "lon": ("longitude", "long", "lng"),
    "lat": ("latitude",),
}


class ImageTable(ImageFiles):
    """Images of a table with columns path and label, and, where known, split, group, lon and lat; others are not read.

    Args:
        table: CSV (comma, UTF-8, with a header) or Parquet file. Paths in it are relative to its folder.
        several: Whether a cell of the column label holds any number of labels, separated by ``;``.
        allow_outside: Accept absolute paths and paths with ``..`` that leave the table's folder, as the text of the
            path says; links inside the folder are followed in any case.
        bands: Names of the bands to read, or their positions from 1, in this order; None for all.
        band_files: Bands that come as a file each, see `list_table`; None where an image is one file.
        on_bad_file: `error`: an image that cannot be used stops here. `skip`: it is left out and listed.
        workers: Threads that check the files.

    Raises:
        DataError: If the table cannot be read, lacks a column, or a cell or an image cannot be used.
    """

    def __init__(
        self,
        table: Path,
        *,
        several: bool = False,
        allow_outside: bool = False,
        bands: Sequence[str | int] | None = None,
        band_files: Sequence[str] | None = None,
        on_bad_file: Literal["error", "skip"] = "error",
        workers: int = 1,
    ) -> None:
        listed = list_table(table, allow_outside, several=several, band_files=band_files)
        if several:
            self.target = "classes"
        names = sorted(listed["class"].unique() if not several else {n for c in listed["class"] for n in labels_of(c)})
        if len(names) < 2:
            if not names:
                raise DataError(f"{table}: every cell of the column label is empty")
            raise DataError(f"{table}: only one label, '{names[0]}'; a classifier needs at least two")
        super().__init__(str(table), table.parent, listed, bands=bands, on_bad_file=on_bad_file, workers=workers)


def read_table(path: Path, what: str) -> pd.DataFrame:
    """Read a CSV or Parquet file, every cell as text, an empty or null one as the empty string.

    Args:
        path: File whose name ends in .csv or .parquet.
        what: What it should be, for messages.

    Raises:
        DataError: If it is missing, of another format, broken, or holds no row.
    """
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{did_you_mean(path.name, near)}")
    with naming(path, f"cannot be read as {what}"):
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
            frame = pd.DataFrame({str(name): [_text(cell) for cell in frame[name]] for name in frame.columns})
        elif path.suffix.lower() == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
        else:
            raise DataError(f"{path}: a table is a .csv or .parquet file")
    if isinstance(frame.index, pd.MultiIndex) or not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"{path}: has more cells in a row than columns in its header")
    if frame.empty:
        raise DataError(f"{path}: holds no row")
    frame.columns = [str(name).strip() for name in frame.columns]
    return frame


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV or Parquet, by the file's suffix, without its index.

    Raises:
        DataError: If the suffix is another one or the file cannot be written.
    """
    try:
        if path.suffix.lower() == ".csv":
            frame.to_csv(path, index=False)
        elif path.suffix.lower() == ".parquet":
            frame.to_parquet(path, index=False)
        else:
            raise DataError(f"{path}: a table is written as .csv or .parquet")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def _text(cell: object) -> str:
    """A cell as a CSV would hold it: whole floats without a fraction, nothing for null."""
    if cell is None or (isinstance(cell, float) and np.isnan(cell)) or cell is pd.NA or cell is pd.NaT:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def list_table(
    table: Path,
    allow_outside: bool,
    carried: Literal["label", "mask"] = "label",
    *,
    several: bool = False,
    band_files: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Read what a table says of its images.

    Args:
        table: CSV or Parquet file.
        allow_outside: Accept paths that leave the table's folder.
        carried: The column that must stand beside path: the class of an image, or the path of its mask.
        several: Whether a cell of label holds any number of labels; the class is then all of them, sorted.
        band_files: Bands that come as a file each: path is then a tile's folder or the beginning of its files' names,
            or there is no column path but one for each band, of paths.

    Returns:
        Columns id (path relative to the table's folder, or absolute), class (`image` for masks), part, group, lon, lat,
        and mask (relative like id) for masks.

    Raises:
        DataError: If the table cannot be read, lacks a column, or a cell cannot be used.
    """
    frame = read_table(table, "a table of images")
    if band_files is not None and set(band_files) & set(frame.columns):
        frame = _with_stacks(table, frame, band_files)
    used = tuple(name for name in COLUMNS if name == carried or name not in ("label", "mask"))
    _check_columns(table, list(frame.columns), used)
    frame = frame[[name for name in used if name in frame.columns]].apply(lambda column: column.str.strip())
    for name in ("path", carried)[: 1 if several else 2]:
        _refuse(table, frame, frame[name] == "", f"have no {name}")
    if several:
        frame["label"] = [SEPARATOR.join(labels_of(cell)) for cell in frame["label"]]
    for name in ("path", "mask")[: 2 if carried == "mask" else 1]:
        no_path = frame[name].str.contains("\0", regex=False) | (frame[name].str.len() > _LONGEST)
        _refuse(table, frame, no_path, f"have a {name} that no file can have", cell=name)
        try:
            frame[name] = [_tidy(path) for path in frame[name]]
        except DataError as error:  # of a stack of bands
            raise DataError(f"{table}: {error}") from error
        outside = frame[name].map(_leaves)
        if not allow_outside:
            what = f"have a {name} outside the table's folder"
            _refuse(table, frame, outside, what, "; allow it with data.allow_outside=true", cell=name)
    twice = frame["path"].duplicated(keep=False)
    if twice.any():
        first = frame[frame["path"] == frame["path"][twice].iloc[0]]
        if carried == "label" and first["label"].nunique() > 1:
            labels = " and ".join(first["label"].unique())
            raise DataError(
                f"{table}: '{first['path'].iloc[0]}' is listed with the labels {labels}; an image has one label here, "
                "or, with task.kind=multilabel, several in one cell, separated by ';'"
            )
        raise DataError(f"{table}: '{first['path'].iloc[0]}' is listed {len(first)} times; list every image once")
    if band_files is not None:
        frame["path"] = [_stack_of(table, path, band_files) for path in frame["path"]]
    listed = pd.DataFrame({"id": frame["path"], "class": frame["label"] if carried == "label" else "image"})
    listed = listed.astype(object)
    if carried == "mask":
        listed["mask"] = frame["mask"].astype(object)
    listed["part"] = _parts(table, frame, several)
    listed["group"] = _optional(frame, "group")
    for axis, limit in (("lon", 180.0), ("lat", 90.0)):
        listed[axis] = _degrees(table, frame, axis, limit)
    one_only = listed["lon"].isna() != listed["lat"].isna()
    _refuse(table, frame, one_only, "have only one of lon and lat")
    return listed


def _with_stacks(table: Path, frame: pd.DataFrame, bands: Sequence[str]) -> pd.DataFrame:
    """The table with one column path in place of one for each band."""
    lost = [band for band in bands if band not in frame]
    if lost:
        raise DataError(f"{table}: has columns of paths for some bands of data.band_files, and none for {lost[0]}")
    if "path" in frame:
        raise DataError(f"{table}: has a column path beside one for each band; keep one of the two")
    files = frame[list(bands)].apply(lambda column: column.str.strip().str.replace("\\", "/"))
    for band in bands:
        _refuse(table, frame, files[band] == "", f"have no path of band {band}", cell=band)
    tidy = [
        {band: os.path.normpath(row[band]).replace(os.sep, "/") for band in bands} for row in files.to_dict("records")
    ]
    return frame.drop(columns=list(bands)).assign(path=[stack_path(row) for row in tidy])


def _stack_of(table: Path, path: str, bands: Sequence[str]) -> str:
    """The stack of a tile, relative to the table like its path; a path that is a file or a stack stays."""
    tile = table.parent / path
    if parts_of(tile) is not None or tile.is_file():
        return path
    found = find_images([tile], bands)
    if len(found) != 1:
        raise DataError(f"{tile}: holds {len(found)} tiles; a row of {table} is one tile")
    return str(found[0]) if os.path.isabs(path) else os.path.relpath(found[0], table.parent).replace(os.sep, "/")


def _tidy(path: str) -> str:
    """A path without what is written twice, with slashes; stacks stay as they are."""
    path = path.replace("\\", "/")
    return path if parts_of(path) else os.path.normpath(path).replace(os.sep, "/")


def _leaves(path: str) -> bool:
    """Whether a path, or one of a stack, leaves the folder that it is relative to."""
    files = [os.path.normpath(file).replace(os.sep, "/") for file in files_of(path)]
    return any(os.path.isabs(file) or file == ".." or file.startswith("../") for file in files)


def _check_columns(table: Path, columns: list[str], used: tuple[str, ...]) -> None:
    """Refuse a table without path, label or mask, with a column twice, or with a column that is likely misnamed."""
    have = ", ".join(columns)
    meant = {other: name for name, others in _MEANT.items() for other in (*others, name)}
    for name in used:
        if name in columns:
            continue
        alias = next((column for column in columns if meant.get(column.lower()) == name), None)
        if alias is not None:
            raise DataError(f"{table}: column '{alias}': rename it to '{name}' if it holds that, else to another name")
        if name in ("path", "label", "mask"):
            mend = "; separate the columns by commas" if len(columns) == 1 and set(have) & set(";\t|") else ""
            raise DataError(f"{table}: no column '{name}'; it has {have}{did_you_mean(name, columns)}{mend}")
    if ("lon" in columns) != ("lat" in columns):
        raise DataError(f"{table}: has only one of the columns lon and lat; both or none are needed")


def _parts(table: Path, frame: pd.DataFrame, several: bool) -> pd.Series:
    """The split of every row as train, val or test, None where the table has none."""
    if "split" not in frame or (frame["split"] == "").all():
        return pd.Series([None] * len(frame), index=frame.index, dtype=object)
    _refuse(table, frame, frame["split"] == "", "have no split while others have one")
    found = frame["split"].str.lower().map(PART_OF_FOLDER)
    if found.isna().any():
        wrong = frame["split"][found.isna()].iloc[0]
        raise DataError(
            f"{table}: split '{wrong}' is unknown ({found.isna().sum()} row(s)); allowed are train, val and test"
            f"{did_you_mean(wrong, PART_OF_FOLDER)}"
        )
    if not (found == "train").any():
        raise DataError(f"{table}: no row has the split train; leave the column out to have the images divided")
    if "label" not in frame:
        return found.astype(object)
    label = frame["label"].map(labels_of) if several else frame["label"].map(lambda cell: (cell,))
    trained = {name for names in label[found == "train"] for name in names}
    untrained = ~label.map(trained.issuperset)
    _refuse(table, frame, untrained, "are of a label without a train row")
    return found.astype(object)


def _optional(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column of text with None for empty cells; all None without the column."""
    if name not in frame:
        return pd.Series([None] * len(frame), index=frame.index, dtype=object)
    return pd.Series([cell or None for cell in frame[name]], index=frame.index, dtype=object)


def _degrees(table: Path, frame: pd.DataFrame, axis: str, limit: float) -> pd.Series:
    """A column of degrees; NaN for empty cells or without the column."""
    if axis not in frame:
        return pd.Series(np.nan, index=frame.index)
    numbers = pd.to_numeric(frame[axis].where(frame[axis] != ""), errors="coerce").astype(np.float64)
    wrong = (frame[axis] != "") & ~(numbers.abs() <= limit)
    _refuse(table, frame, wrong, f"have a {axis} that is no number of degrees within {limit:g}", cell=axis)
    return numbers


def _refuse(
    table: Path, frame: pd.DataFrame, wrong: pd.Series, what: str, mend: str = "", *, cell: str = "path"
) -> None:
    """Raise with the number of wrong rows and the first one (counted without the header), if there are any."""
    if wrong.any():
        at = int(np.flatnonzero(wrong.to_numpy())[0])
        came = frame[cell].iloc[at]
        came = repr(came if len(came) <= _SHOWN else f"{came[:_SHOWN]}...")  # one line, whatever it holds
        raise DataError(f"{table}: {int(wrong.sum())} of {len(frame)} rows {what}, first row {at + 1}: {came}{mend}")
