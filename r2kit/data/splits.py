"""Which images train the network, which choose the best epoch, and which give the reported result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from r2kit.data.sources import Source
from r2kit.data.stratify import absent, by_units, fold_of_each, level, membership, stratified
from r2kit.data.table import read_table, write_table
from r2kit.errors import DataError, did_you_mean
from r2kit.recipe import DataSpec

PARTS = ("train", "val", "test")
SplitKind = Literal["own", "blocks", "group", "stratified", "file", "all"]
_TAG_SPLIT, _TAG_LIMIT, _TAG_FOLDS = 1, 2, 6  # keep the random numbers of the uses of one seed apart


@dataclass(frozen=True)
class Split:
    """Rows of a manifest for training, validation and test."""

    train: np.ndarray
    """Rows of the manifest, ascending."""
    val: np.ndarray
    """Rows of the manifest, ascending."""
    test: np.ndarray
    """Rows of the manifest, ascending; empty when nothing is held out for a test."""
    kind: SplitKind
    """How it was made: the data's own parts, spatial blocks, whole groups, stratified, read from a file, or everything
    in `test`."""
    buffered: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Rows left out of training because they lie too near to a held-out image."""
    blocks: np.ndarray | None = None
    """Name of the spatial block of every row of the manifest; None without coordinates, or where groups are what was
    held out together."""
    folds: np.ndarray | None = None
    """The fold, from 0, in which each row of the manifest is a test image; None without folds."""
    fold: int | None = None
    """The fold that this split tests."""
    warnings: tuple[str, ...] = ()
    """What a person should know before trusting a result on this split."""

    def rows(self, part: str) -> np.ndarray:
        """Rows of 'train', 'val' or 'test'."""
        return {"train": self.train, "val": self.val, "test": self.test}[part]

    @property
    def described(self) -> str:
        """How it was made, in words."""
        words = {"own": "the data's own parts", "group": "whole groups", "file": "read from a file", "all": "all test"}
        fold = "" if self.folds is None else f", fold {self.fold} of 0 to {self.folds.max()}"
        return f"{words.get(self.kind, self.kind)}{fold}"

    def table(self, manifest: pd.DataFrame) -> pd.DataFrame:
        """Return `to_frame` with what a person wants to see too: path, and fold and group where there are any."""
        frame = self.to_frame(manifest)
        row = pd.Series(np.arange(len(manifest)), index=manifest["id"].to_numpy())[frame["id"]].to_numpy()
        frame.insert(1, "path", manifest["path"].to_numpy()[row])
        if self.folds is not None:
            frame["fold"] = self.folds[row]
        if manifest["group"].notna().any():
            frame["group"] = manifest["group"].to_numpy()[row]
        return frame.dropna(axis=1, how="all")

    def to_frame(self, manifest: pd.DataFrame) -> pd.DataFrame:
        """Return columns id, split ('train', 'val', 'test') and block (None without coordinates) of the used rows."""
        rows = np.concatenate([self.train, self.val, self.test]).astype(np.int64)
        parts = np.repeat(np.array(PARTS, dtype=object), [len(self.train), len(self.val), len(self.test)])
        order = np.argsort(rows, kind="stable")
        blocks = self.blocks[rows[order]] if self.blocks is not None else None
        return pd.DataFrame({"id": manifest["id"].to_numpy()[rows[order]], "split": parts[order], "block": blocks})

    def save(self, path: Path, manifest: pd.DataFrame, contents: pd.DataFrame | None = None) -> None:
        """Write `to_frame` as Parquet, with the hash of each image's pixels by which other data can be compared.

        Args:
            path: File to write.
            manifest: Of the source.
            contents: Of the source, see `r2kit.data.sources.Source`; None where the images are no files.
        """
        frame = self.to_frame(manifest)
        if contents is not None:
            pixels = distinct_pixels(contents)
            frame["pixels"] = pd.Series(pixels, index=manifest["id"].to_numpy())[frame["id"]].to_numpy(object)
        frame.to_parquet(path, index=False)

    @classmethod
    def load(cls, path: Path, manifest: pd.DataFrame) -> Split:
        """Read what `save` wrote, or any table like it, and find its images in a manifest.

        Args:
            path: CSV or Parquet file with columns id, split and, if it has one, block; others are not read.
            manifest: Where the ids are looked up.

        Raises:
            DataError: If the file cannot be read, lacks a column, a split has an unknown name, or an id is not in the
                manifest.
        """
        frame = read_table(path, "a split")
        for name in ("id", "split"):
            if name not in frame:
                have = ", ".join(frame.columns)
                raise DataError(f"{path}: no column '{name}'; it has {have}{did_you_mean(name, frame.columns)}")
        if "block" not in frame:
            frame["block"] = ""
        frame = frame.assign(block=frame["block"].astype(object).where(frame["block"] != "", None))
        unknown = sorted(set(frame["split"]) - set(PARTS))
        if unknown:
            raise DataError(f"{path}: split '{unknown[0]}' is unknown; allowed are train, val and test")
        if frame["id"].duplicated().any():
            raise DataError(f"{path}: id '{frame['id'][frame['id'].duplicated()].iloc[0]}' appears twice")
        row_of_id = pd.Series(np.arange(len(manifest)), index=manifest["id"].to_numpy())
        missing = frame["id"][~frame["id"].isin(row_of_id.index)]
        if len(missing):
            raise DataError(
                f"{path}: {len(missing)} of {len(frame)} images are not in the data, e.g. '{missing.iloc[0]}'; "
                "the data has changed since the split was made"
            )
        rows = row_of_id[frame["id"]].to_numpy()
        train, val, test = (np.sort(rows[(frame["split"] == part).to_numpy()]) for part in PARTS)
        blocks = None
        if frame["block"].notna().any():
            blocks = np.full(len(manifest), None, dtype=object)
            blocks[rows] = frame["block"].to_numpy(dtype=object)
        return cls(train, val, test, kind="file", blocks=blocks)

    @classmethod
    def all_test(cls, manifest: pd.DataFrame) -> Split:
        """Put every image into the test part: for evaluating other data than the run was trained on."""
        nothing = np.empty(0, dtype=np.int64)
        return cls(nothing, nothing, np.arange(len(manifest)), kind="all")


def make_split(
    manifest: pd.DataFrame,
    classes: tuple[str, ...],
    spec: DataSpec,
    seed: int,
    contents: pd.DataFrame | None = None,
) -> Split:
    """Divide the images as the recipe asks; a pure function of the arguments.

    Args:
        manifest: Columns id, label, split, group, lon, lat, and for several labels per image labels (see
            `r2kit.data.sources.Source`).
        classes: Class names; the labels are positions in it.
        spec: The `data` part of a recipe.
        seed: The recipe's seed.
        contents: Column pixels, if known: images with the same pixels stay together in a stratified split.

    Raises:
        DataError: If a class cannot be in both training and validation, or the images lack what the split needs.
    """
    held = membership(manifest, len(classes))
    kind = _kind(manifest, spec)
    located = bool(len(manifest)) and bool(manifest[["lon", "lat"]].notna().all(axis=None))
    blocks = block_names(manifest, spec.block_degrees) if located and kind != "group" else None
    folds: np.ndarray | None = None
    notes: list[str] = []
    if kind == "file":
        read = Split.load(Path(spec.split_file or ""), manifest)
        part = np.full(len(manifest), None, dtype=object)
        for name in PARTS:
            part[read.rows(name)] = name
        blocks = read.blocks
        if unused := int(pd.isna(part).sum()):
            notes.append(f"{unused} of {len(manifest)} images are not in {spec.split_file} and are not used")
        if not len(read.test):
            notes.append(f"{spec.split_file} has no test part; results are on the validation images")
    elif kind == "own":
        part = manifest["split"].to_numpy(dtype=object).copy()
        if not (part == "val").any():
            inside = np.flatnonzero(part == "train")
            units = group_names(manifest) if manifest["group"].notna().any() else blocks
            part[inside] = _divide(manifest, classes, spec, {"val": spec.val_fraction}, seed, units, contents, inside)
            notes.append("the data has no val part of its own; validation images were taken from its train part")
        if not (part == "test").any():
            notes.append("the data has no test part of its own; results are on the validation images")
    else:
        units = {"blocks": blocks, "group": group_names(manifest), "stratified": None}[kind]
        if kind == "blocks" and blocks is not None and manifest["group"].notna().any():
            units = _joined(blocks, group_names(manifest))
            if (joined := len(np.unique(blocks)) - len(np.unique(units))) > 0:
                notes.append(f"groups reach over the borders of blocks: {joined} blocks were joined to others")
        everything = np.arange(len(manifest))
        if spec.folds is None:
            fractions = {"val": spec.val_fraction, "test": spec.test_fraction}
            part = _divide(manifest, classes, spec, fractions, seed, units, contents, everything)
            if spec.test_fraction == 0:
                notes.append(
                    "data.test_fraction is 0: results are on the validation images, which also chose the epoch"
                )
        else:
            state = int(np.random.SeedSequence([seed, _TAG_FOLDS]).generate_state(1)[0])
            first, same = _distinct(contents, everything)
            folds = fold_of_each(held, classes, units, spec.folds, state, first, same)
            part = np.full(len(manifest), "test", dtype=object)
            rest = everything[folds != spec.fold]
            of_rest = {"val": spec.val_fraction * len(manifest) / max(len(rest), 1)}
            part[rest] = _divide(manifest, classes, spec, of_rest, seed, units, contents, rest)
    _check_classes(part, held, classes, kind, notes)

    buffered = np.empty(0, dtype=np.int64)
    if kind == "blocks" and spec.buffer_degrees > 0:
        buffered = _too_near(manifest, part, spec.buffer_degrees)
        part[buffered] = None
        if lost := absent(held[part == "train"]):
            raise DataError(
                f"data.buffer_degrees={spec.buffer_degrees:g} leaves no training image of "
                f"'{classes[lost[0]]}'; use a smaller buffer"
            )
    if spec.limit is not None:
        part = _limited(part, manifest["label"].to_numpy(), len(classes), spec.limit, seed)
    train, val, test = (np.flatnonzero(part == name) for name in PARTS)
    fold = None if folds is None else spec.fold
    return Split(train, val, test, kind, buffered, blocks, folds, fold, tuple(notes))


def _kind(manifest: pd.DataFrame, spec: DataSpec) -> SplitKind:
    """Decide `auto`, and refuse a split for which the images lack something."""
    if spec.split_file is not None:
        return "file"
    located = manifest[["lon", "lat"]].notna().all(axis=1)
    grouped = bool(manifest["group"].notna().any())
    kind: SplitKind
    if spec.split != "auto":
        kind = spec.split
    elif manifest["split"].notna().any():
        kind = "own"
        if spec.folds is not None:
            raise DataError(
                "data.folds: the data has its own train, val and test; to divide it anew, set data.split to group, "
                "blocks or stratified"
            )
    elif grouped:
        kind = "group"
    else:
        kind = "blocks" if len(manifest) and located.all() else "stratified"
    if kind == "blocks" and not located.all():
        raise DataError(
            f"data.split=blocks needs coordinates, and {(~located).sum()} of {len(manifest)} images have none, e.g. "
            f"{manifest['path'][~located].iloc[0]}; use georeferenced files or data.split=stratified"
        )
    if kind == "group" and not grouped:
        raise DataError(
            "data.split=group needs a table with a column group, and no image has a group; add the column, or use "
            "data.split=stratified"
        )
    return kind


def _check_classes(
    part: np.ndarray, held: np.ndarray, classes: tuple[str, ...], kind: SplitKind, notes: list[str]
) -> None:
    """Refuse parts that lack a class; where whole blocks or groups are held out that may happen, and is noted."""
    titles = {"train": "training", "val": "validation", "test": "test"}
    for name, title in titles.items():
        lost = absent(held[part == name])
        if not lost or (name == "test" and not (part == "test").any()):
            continue
        if kind not in ("blocks", "group"):
            if name == "test":
                continue  # a test on some of the classes is a person's own choice
            raise DataError(
                f"class '{classes[lost[0]]}' has no {title} image; every class needs at least one for training and "
                "one for validation"
            )
        names = ", ".join(classes[c] for c in lost)
        few = "spatial blocks of it; try a smaller block_degrees" if kind == "blocks" else "groups of it"
        notes.append(f"no {title} image of {names}: too few {few}")


def distinct_pixels(contents: pd.DataFrame) -> np.ndarray:
    """Return the hash of each image's pixels (N,), None for images of one colour: these are equal by nature."""
    pixels = contents["pixels"]
    return pixels.where(~contents["flat"].astype(bool)).astype(object).where(lambda p: p.notna(), None).to_numpy()


def write_splits(source: Source, spec: DataSpec, seed: int, out: Path) -> list[tuple[Path, Split]]:
    """Write the split that a recipe's `data` part asks for; with folds, one file for each of them.

    Args:
        source: The images.
        spec: The `data` part; `spec.fold` is not read.
        seed: The recipe's seed.
        out: CSV or Parquet file; fold i goes into NAME-i.

    Returns:
        Each file that was written, and its split.

    Raises:
        DataError: If the images cannot be divided this way, or a file cannot be written.
    """
    written = []
    for fold in range(spec.folds or 1):
        split = make_split(
            source.manifest, source.strata, spec.model_copy(update={"fold": fold}), seed, source.contents
        )
        path = out if spec.folds is None else out.with_name(f"{out.stem}-{fold}{out.suffix}")
        write_table(split.table(source.manifest), path)
        written.append((path, split))
    return written


def block_names(manifest: pd.DataFrame, degrees: float) -> np.ndarray:
    """Name each image's spatial block after the block's south-west corner, e.g. ``lat-30_lon+120``.

    Args:
        manifest: Columns lon, lat in degrees.
        degrees: Side of a block.
    """
    lat = np.floor((manifest["lat"].to_numpy(float) + 90.0) / degrees) * degrees - 90.0
    lon = np.floor((manifest["lon"].to_numpy(float) + 180.0) / degrees) * degrees - 180.0
    return np.array([f"lat{a:+.6g}_lon{o:+.6g}" for a, o in zip(lat, lon, strict=True)], dtype=object)


def group_names(manifest: pd.DataFrame) -> np.ndarray:
    """Name what must stay together: the group of an image, or the image itself where it has none.

    Args:
        manifest: Columns id, group.
    """
    # The letter keeps a group apart from an image whose id is the group's name.
    alone = "i" + manifest["id"].astype(str)
    return alone.where(manifest["group"].isna(), "g" + manifest["group"].astype(str)).to_numpy(dtype=object)


def _joined(blocks: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Name, for each image, what holds its whole block, the whole groups in it, their other blocks, and so on."""
    block, names = pd.factorize(blocks)
    group, _ = pd.factorize(groups)
    touching = coo_array((np.ones(len(block)), (block, group)), shape=(len(names), int(group.max()) + 1)).tocsr()
    _, part = connected_components(touching @ touching.T, directed=False)
    first = np.unique(part, return_index=True)[1]
    return np.asarray(names, dtype=object)[first[part[block]]]


def _distinct(contents: pd.DataFrame | None, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First of the images with the same pixels, ascending, and which of these each image equals; as positions."""
    if contents is None:
        return np.arange(len(rows)), np.arange(len(rows))
    same, _ = pd.factorize(contents["pixels"].iloc[rows])
    return np.unique(same, return_index=True)[1], same


def _divide(
    manifest: pd.DataFrame,
    classes: tuple[str, ...],
    spec: DataSpec,
    held_out: dict[str, float],
    seed: int,
    units: np.ndarray | None,
    contents: pd.DataFrame | None,
    rows: np.ndarray,
) -> np.ndarray:
    """Give each of `rows` of the manifest a part: whole units (blocks or groups) if given, else within each class."""
    rng = np.random.default_rng([seed, _TAG_SPLIT])
    fractions = {"train": 1.0 - sum(held_out.values()), **{k: v for k, v in held_out.items() if v > 0}}
    held = membership(manifest, len(classes))[rows]
    if units is None:
        first, same = _distinct(contents, rows)
        return stratified(held[first], classes, fractions, rng)[same]
    names, unit = np.unique(units[rows].astype(str), return_inverse=True)
    if len(names) < len(fractions):
        where = manifest.iloc[rows]
        if manifest["group"].notna().any():
            came, mend = f"are of {len(names)} group(s)", "name more groups"
        else:
            came = f"lie in {len(names)} spatial block(s) of {spec.block_degrees:g} degrees"
            extent = max(np.ptp(where["lon"]), np.ptp(where["lat"]))
            mend = (f"set data.block_degrees={extent / 8:.2g} or " if extent > 0 else "set ") + "data.split=stratified"
        raise DataError(f"the images {came}, and {len(fractions)} parts need at least one each; {mend}")
    return np.array(list(fractions), dtype=object)[by_units(held, unit, list(fractions.values()), rng)[unit]]


def _too_near(manifest: pd.DataFrame, part: np.ndarray, degrees: float) -> np.ndarray:
    """Rows of training images within `degrees` of longitude and latitude of a held-out image."""
    place = manifest[["lon", "lat"]].to_numpy(float)
    held_out = place[(part == "val") | (part == "test")]
    around = np.concatenate(
        [held_out + np.array([turn, 0.0]) for turn in (-360.0, 0.0, 360.0)]
    )  # across the antimeridian
    train = np.flatnonzero(part == "train")
    distance, _ = cKDTree(around).query(place[train], p=np.inf)
    return train[distance <= degrees]


def _limited(part: np.ndarray, label: np.ndarray, num_classes: int, limit: int, seed: int) -> np.ndarray:
    """Keep at most `limit` images: each part in proportion, the classes of a part as equal as they can be."""
    used = [name for name in PARTS if (part == name).any()]
    sizes = {name: int((part == name).sum()) for name in used}
    total = sum(sizes.values())
    if limit >= total:
        return part
    present = {name: len(np.unique(label[part == name])) for name in used}
    if limit < sum(present.values()):
        raise DataError(
            f"data.limit={limit} is too small for {num_classes} classes in {len(used)} parts ({', '.join(used)}); "
            f"it must be at least {sum(present.values())}"
        )
    # One image per class and part first, the rest in proportion to the parts; training takes the rounding.
    spare = limit - sum(present.values())
    budget = {name: present[name] + int(spare * sizes[name] / total) for name in used}
    budget["train"] += limit - sum(budget.values())
    rng = np.random.default_rng([seed, _TAG_LIMIT])
    kept = np.full(len(part), None, dtype=object)
    for name in used:
        queues = [rng.permutation(np.flatnonzero((part == name) & (label == c))) for c in range(num_classes)]
        take = level([len(queue) for queue in queues], budget[name])
        for queue, count in zip(queues, take, strict=True):
            kept[queue[:count]] = name
    return kept
