"""Which images train the network, which choose the best epoch, and which give the reported result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from r2kit.errors import DataError
from r2kit.recipe import DataSpec

PARTS = ("train", "val", "test")
SplitKind = Literal["folder", "blocks", "stratified", "file", "all"]
_TAG_SPLIT, _TAG_LIMIT = 1, 2  # keep the random numbers of the two uses of one seed apart


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
    """How it was made: the folder's own, spatial blocks, stratified, read from a file, or everything in `test`."""
    buffered: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Rows left out of training because they lie too near to a held-out image."""
    blocks: np.ndarray | None = None
    """Name of the spatial block of every row of the manifest; None without coordinates."""
    warnings: tuple[str, ...] = ()
    """What a person should know before trusting a result on this split."""

    def rows(self, part: str) -> np.ndarray:
        """Rows of 'train', 'val' or 'test'."""
        return {"train": self.train, "val": self.val, "test": self.test}[part]

    def to_frame(self, manifest: pd.DataFrame) -> pd.DataFrame:
        """Return columns id, split ('train', 'val', 'test') and block (None without coordinates) of the used rows."""
        rows = np.concatenate([self.train, self.val, self.test]).astype(np.int64)
        parts = np.repeat(np.array(PARTS, dtype=object), [len(self.train), len(self.val), len(self.test)])
        order = np.argsort(rows, kind="stable")
        blocks = self.blocks[rows[order]] if self.blocks is not None else None
        return pd.DataFrame({"id": manifest["id"].to_numpy()[rows[order]], "split": parts[order], "block": blocks})

    def save(self, path: Path, manifest: pd.DataFrame) -> None:
        """Write `to_frame` as Parquet."""
        self.to_frame(manifest).to_parquet(path, index=False)

    @classmethod
    def load(cls, path: Path, manifest: pd.DataFrame) -> Split:
        """Read what `save` wrote and find its images in a manifest.

        Args:
            path: Parquet file with columns id, split and block.
            manifest: Where the ids are looked up.

        Raises:
            DataError: If the file cannot be read, a split has an unknown name, or an id is not in the manifest.
        """
        try:
            frame = pd.read_parquet(path, columns=["id", "split", "block"])
        except Exception as error:  # pyarrow raises several unrelated classes
            raise DataError(f"{path}: cannot be read as a split: {str(error).splitlines()[0]}") from error
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


def make_split(manifest: pd.DataFrame, classes: tuple[str, ...], spec: DataSpec, seed: int) -> Split:
    """Divide the images as the recipe asks; a pure function of the arguments.

    Args:
        manifest: Columns id, label, split, lon, lat (see `r2kit.data.sources.Source`).
        classes: Class names; the labels are positions in it.
        spec: The `data` part of a recipe.
        seed: The recipe's seed.

    Raises:
        DataError: If a class cannot be in both training and validation, or the images lack what the split needs.
    """
    own_parts = manifest["split"].notna().any()
    located = manifest[["lon", "lat"]].notna().all(axis=1)
    kind: SplitKind
    if spec.split == "auto":
        kind = "folder" if own_parts else ("blocks" if len(manifest) and located.all() else "stratified")
    else:
        kind = spec.split
    if kind == "blocks" and not located.all():
        raise DataError(
            f"data.split=blocks needs coordinates, and {(~located).sum()} of {len(manifest)} images have none, e.g. "
            f"{manifest['path'][~located].iloc[0]}; use georeferenced files or data.split=stratified"
        )

    blocks = block_names(manifest, spec.block_degrees) if located.all() else None
    part = np.full(len(manifest), None, dtype=object)
    notes: list[str] = []
    if kind == "folder":
        part[:] = manifest["split"].to_numpy(dtype=object)
        if not (part == "val").any():
            inside = np.flatnonzero(part == "train")
            part[inside] = _divide(manifest.iloc[inside], classes, spec, seed, blocks, inside, val_only=True)
            notes.append("the folder has no val part; validation images were taken from its train part")
        if not (part == "test").any():
            notes.append("the folder has no test part; results are on the validation images")
    else:
        part[:] = _divide(
            manifest,
            classes,
            spec,
            seed,
            blocks if kind == "blocks" else None,
            np.arange(len(manifest)),
            val_only=False,
        )
        if spec.test_fraction == 0:
            notes.append("data.test_fraction is 0: results are on the validation images, which also chose the epoch")
    label = manifest["label"].to_numpy()
    absent = {p: [classes[c] for c in _absent(label[part == p], len(classes))] for p in ("train", "val")}
    for name in ("train", "val"):
        if absent[name] and kind != "blocks":
            raise DataError(
                f"class '{absent[name][0]}' has no {'training' if name == 'train' else 'validation'} image; every "
                "class needs at least one for training and one for validation"
            )
    if kind == "blocks":
        for name, title in (("train", "training"), ("val", "validation"), ("test", "test")):
            missing = _absent(label[part == name], len(classes)) if (part == name).any() else []
            if missing:
                names = ", ".join(classes[c] for c in missing)
                notes.append(f"no {title} image of {names}: too few spatial blocks of it; try a smaller block_degrees")

    buffered = np.empty(0, dtype=np.int64)
    if kind == "blocks" and spec.buffer_degrees > 0:
        buffered = _too_near(manifest, part, spec.buffer_degrees)
        part[buffered] = None
        if lost := _absent(label[part == "train"], len(classes)):
            raise DataError(
                f"data.buffer_degrees={spec.buffer_degrees:g} leaves no training image of "
                f"'{classes[lost[0]]}'; use a smaller buffer"
            )
    if spec.limit is not None:
        part = _limited(part, label, len(classes), spec.limit, seed)
    train, val, test = (np.flatnonzero(part == name) for name in PARTS)
    return Split(train, val, test, kind, buffered, blocks, tuple(notes))


def block_names(manifest: pd.DataFrame, degrees: float) -> np.ndarray:
    """Name each image's spatial block after the block's south-west corner, e.g. ``lat-30_lon+120``.

    Args:
        manifest: Columns lon, lat in degrees.
        degrees: Side of a block.
    """
    lat = np.floor((manifest["lat"].to_numpy(float) + 90.0) / degrees) * degrees - 90.0
    lon = np.floor((manifest["lon"].to_numpy(float) + 180.0) / degrees) * degrees - 180.0
    return np.array([f"lat{a:+.6g}_lon{o:+.6g}" for a, o in zip(lat, lon, strict=True)], dtype=object)


def _divide(
    manifest: pd.DataFrame,
    classes: tuple[str, ...],
    spec: DataSpec,
    seed: int,
    blocks: np.ndarray | None,
    rows: np.ndarray,
    val_only: bool,
) -> np.ndarray:
    """Give each row of `manifest` (rows `rows` of the whole) a part: by blocks if given, else within each class."""
    rng = np.random.default_rng([seed, _TAG_SPLIT])
    fractions = {"val": spec.val_fraction, "test": 0.0 if val_only else spec.test_fraction}
    fractions = {"train": 1.0 - sum(fractions.values()), **{k: v for k, v in fractions.items() if v > 0}}
    label = manifest["label"].to_numpy()
    if blocks is None:
        return _stratified(label, classes, fractions, rng)
    names, block = np.unique(blocks[rows].astype(str), return_inverse=True)
    if len(names) < len(fractions):
        extent = max(np.ptp(manifest["lon"]), np.ptp(manifest["lat"]))
        mend = f"data.block_degrees={extent / 8:.2g} or " if extent > 0 else ""
        raise DataError(
            f"the images lie in {len(names)} spatial block(s) of {spec.block_degrees:g} degrees, and "
            f"{len(fractions)} parts need at least one each; set {mend}data.split=stratified"
        )
    return np.array(list(fractions), dtype=object)[
        _by_blocks(label, len(classes), block, list(fractions.values()), rng)[block]
    ]


def _stratified(
    label: np.ndarray, classes: tuple[str, ...], fractions: dict[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Divide each class at random, at least one image of it in every part."""
    part = np.full(len(label), "train", dtype=object)
    for value, name in enumerate(classes):
        rows = rng.permutation(np.flatnonzero(label == value))
        if len(rows) < len(fractions):
            raise DataError(
                f"class '{name}' has {len(rows)} image(s), and {len(fractions)} parts ({', '.join(fractions)}) need at "
                "least one each; add images or remove the class"
            )
        held_out = [p for p in fractions if p != "train"]
        counts = [max(1, round(fractions[p] * len(rows))) for p in held_out]
        while sum(counts) >= len(rows):  # tiny classes: leave one for training
            counts[int(np.argmax(counts))] -= 1
        start = 0
        for p, count in zip(held_out, counts, strict=True):
            part[rows[start : start + count]] = p
            start += count
    return part


def _by_blocks(
    label: np.ndarray, num_classes: int, block: np.ndarray, fractions: list[float], rng: np.random.Generator
) -> np.ndarray:
    """Choose a part for each block so that every class comes near to its fraction in every part.

    Greedy, in the manner of scikit-learn's StratifiedGroupKFold but for parts of unequal size: blocks that hold much
    of a class first; each goes where the sum over classes of (share - fraction)^2 / fraction falls most. Then a class
    that a later part lacks gets the smallest block that the first part can spare.

    Args:
        label: (N,) class of each image.
        num_classes: K.
        block: (N,) number of each image's block.
        fractions: Wanted share of each part; training first.
        rng: Source of the order among similar blocks.

    Returns:
        (blocks,) number of the part.
    """
    counts = np.zeros((block.max() + 1, num_classes))
    np.add.at(counts, (block, label), 1.0)
    shares = counts / np.maximum(counts.sum(axis=0), 1.0)  # (blocks, K): of all images of the class
    size_order = np.floor(-np.log2(shares.max(axis=1)))
    shuffled = rng.permutation(len(counts))
    wanted = np.asarray(fractions)[:, None]  # (parts, 1)
    filled = np.zeros((len(fractions), num_classes))
    part = np.empty(len(counts), dtype=np.int64)
    for b in shuffled[np.argsort(size_order[shuffled], kind="stable")]:
        change = (shares[b] * (shares[b] + 2.0 * (filled - wanted)) / wanted).sum(axis=1)
        part[b] = change.argmin()
        filled[part[b]] += shares[b]
    for lacking in range(1, len(fractions)):
        for value in range(num_classes):
            if counts[part == lacking, value].sum() > 0:
                continue
            donors = np.flatnonzero((part == 0) & (counts[:, value] > 0))
            # Not a block whose loss would take another class out of training.
            spare = [b for b in donors if (counts[part == 0].sum(axis=0) - counts[b])[counts[b] > 0].min() > 0]
            if spare:
                part[min(spare, key=lambda b: counts[b].sum())] = lacking
    return part


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
        take = _level([len(queue) for queue in queues], budget[name])
        for queue, count in zip(queues, take, strict=True):
            kept[queue[:count]] = name
    return kept


def _level(available: list[int], total: int) -> list[int]:
    """Share `total` over piles as evenly as their sizes allow; what does not divide goes to the first ones."""
    take = [0] * len(available)
    while total > 0 and (open_piles := [i for i, n in enumerate(available) if take[i] < n]):
        each = max(1, total // len(open_piles))
        for i in open_piles:
            step = min(each, available[i] - take[i], total)
            take[i] += step
            total -= step
    return take


def _absent(label: np.ndarray, num_classes: int) -> list[int]:
    """Classes without an image."""
    return sorted(set(range(num_classes)) - set(label.tolist()))
