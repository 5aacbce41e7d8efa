"""A verdict on data before training: what would make a result untrue, what is worth knowing, and how to mend it."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from r2kit.data.boxes.checks import BAD_BOXES
from r2kit.data.check_page import check_page
from r2kit.data.files import SEPARATOR, is_flat, labels_of, pixel_hash
from r2kit.data.findings import CLEAN_FILE, SPLIT_FILE, STATS_OF_PARTS, TARGET_CHECKS, Finding
from r2kit.data.leaks import find_leaks
from r2kit.data.mends import FEW, KINDS_OF_SPLIT, Mender, in_folds, other_split, split_with
from r2kit.data.perceptual import coefficients, near_copies
from r2kit.data.preprocess import missing_pixels
from r2kit.data.sources import Source, open_source
from r2kit.data.splits import PARTS, Split, make_split
from r2kit.data.table import write_table
from r2kit.errors import DataError
from r2kit.recipe import Recipe, SaliencySpec, SegmentationSpec

IMBALANCE = 20.0
"""Largest class over smallest class above which a warning is given."""
DRIFT = 1.0
"""Difference between the means of two parts, in standard deviations between images, above which a warning is given."""
NODATA_DRIFT = 0.2
"""Difference between the shares of pixels without measurement of two parts above which a warning is given."""
_EMPTY = 0.9  # share of pixels without measurement from which a tile can be left out


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    findings: list[Finding]
    """Those that make a result untrue first."""
    manifest: pd.DataFrame
    """One row per usable image: the source's manifest with class, part and what was measured."""
    skipped: list[tuple[str, str]]
    """(path, reason) of each image that cannot be used."""

    @property
    def untrue(self) -> bool:
        """Whether something would make a result untrue."""
        return any(finding.untrue for finding in self.findings)


def check_data(recipe: Recipe, out: Path, command: str = "r2kit finetune RECIPE", data: str = "DATA") -> Verdict:
    """Read every image once, look for what would make a result untrue, and write it down.

    Args:
        recipe: Its `data` part and seed say what is read and how it is divided.
        out: Folder for ``manifest.parquet``, ``check.html``, and what the commands name, as far as it is needed:
            ``split.csv`` and ``clean.csv`` without images that should give way, ``kept.csv`` without classes of next to
            no image, ``grouped.csv`` with what is alike in one group; made if need be, files of these names are
            replaced.
        command: What trains on this data; the changes that mend a finding are added to it.
        data: What stands for this data, with its overrides, on the command lines of `r2kit data`.

    Raises:
        DataError: If there is nothing to check at all, or `out` cannot be written.
    """
    lenient = recipe.data.boxes.model_copy(update={"on_bad_box": "mend"})
    source = open_source(recipe.data.model_copy(update={"on_bad_file": "skip", "boxes": lenient}), recipe.target)
    findings = _unusable(source, skip=recipe.data.on_bad_file == "skip")
    manifest = source.manifest.assign(**{"class": _class_words(source)}, part=None)
    split: Split | None = None
    try:
        split = make_split(source.manifest, source.strata, recipe.data, recipe.seed, source.contents)
    except DataError as error:
        mend = "change what the message names, add images, or divide the data in another way"
        findings.append(Finding("split", True, str(error), mend, change=other_split(source, recipe, True)))
    measured, lows = _measure(source)
    if split is not None:
        for name in PARTS:
            manifest.loc[split.rows(name), "part"] = name
        leaks = find_leaks(source, split, measured["pixels"].where(~measured["flat"]).to_numpy(dtype=object))
        if recipe.data.on_leak == "drop":  # training leaves these out by itself
            words = "data.on_leak=drop leaves them out"
            leaks = [dataclasses.replace(leak, untrue=False, mend=words) for leak in leaks]
        findings += leaks
        other = other_split(source, recipe, False) if split.warnings else ""
        mend = "nothing, if it is meant so; else divide the data in another way"
        findings += [Finding("split", False, note, mend, change=other) for note in split.warnings]
    for check in TARGET_CHECKS[source.target]:
        findings += check(source, np.flatnonzero(_used(manifest)))
    if recipe.data.boxes.on_bad_box == "mend":
        words = "data.boxes.on_bad_box=mend cuts them or leaves them out"
        findings = [dataclasses.replace(f, untrue=False, mend=words) if f.kind == BAD_BOXES else f for f in findings]
    findings = [dataclasses.replace(f, change=_of_overlap(recipe, f.change)) for f in findings]
    findings += _copies(manifest, measured, lows)
    findings += _balance(manifest, source, recipe)
    findings += _drift(manifest, measured, source, recipe)
    findings.sort(key=lambda finding: not finding.untrue)

    manifest = pd.concat([manifest, measured], axis=1)
    if source.contents is not None:
        manifest = pd.concat([manifest, source.contents.drop(columns=["pixels", "flat", "low"])], axis=1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_table(manifest, out / "manifest.parquet")
        mender = Mender(source, recipe, split, out, command, data)
        mender.write_splits(findings)
        findings = [mender.mended(finding) for finding in findings]
        verdict = Verdict(findings, manifest, source.skipped)
        (out / "check.html").write_text(
            check_page(source, verdict.findings, manifest, source.skipped), encoding="utf-8"
        )
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
    return Verdict(findings, manifest, source.skipped)


def _of_overlap(recipe: Recipe, change: str) -> str:
    """The change, or, where it is to the loss, one that gives overlap a weight in this task's, if it has none."""
    if change.startswith("task.loss.") and isinstance(recipe.task, SaliencySpec):
        return f"task.loss.iou={recipe.task.loss.iou or 1:g}"
    if change.startswith("task.loss.") and isinstance(recipe.task, SegmentationSpec):
        return f"task.loss.dice={recipe.task.loss.dice or 1:g}"
    return change


def _class_words(source: Source) -> list[str]:
    """The class of each image, or its labels in one word as a table has them."""
    if source.target != "classes":
        return [source.strata[label] for label in source.manifest["label"]]
    return [SEPARATOR.join(source.classes[i] for i in labels) for labels in source.manifest["labels"]]


def _unusable(source: Source, skip: bool) -> list[Finding]:
    """Files that cannot be read or do not fit the others."""
    if not source.skipped:
        return []
    path, reason = source.skipped[0]
    text = f"{len(source.skipped)} image(s) cannot be used, e.g. {path}: {reason}"
    mend = "data.on_bad_file=skip leaves them out" if skip else "mend or remove them, or leave them out"
    return [Finding("files", not skip, text, mend, change="data.on_bad_file=skip")]


def _measure(source: Source) -> tuple[pd.DataFrame, list[np.ndarray | None]]:
    """Per image what is compared between parts, and the perceptual coefficients.

    Columns pixels (their hash), flat, nodata_share, and for each band mean, low and high (2nd and 98th percentile).
    """
    rows: list[dict[str, Any]] = []
    lows: list[np.ndarray | None] = []
    for row in range(len(source.manifest)):
        raw = source.read(row)
        missing = missing_pixels(raw, source.nodata)
        pixels = raw.astype(np.float64)
        if missing is not None and missing.any():
            pixels[missing] = np.nan
        measured = np.isfinite(pixels)
        count = measured.sum(axis=(0, 1))
        total = np.where(measured, pixels, 0.0).sum(axis=(0, 1))
        mean = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
        few = pixels[:: max(1, pixels.shape[0] // 64), :: max(1, pixels.shape[1] // 64)].reshape(-1, pixels.shape[2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a band without a measured pixel has no percentile
            low, high = np.nanpercentile(few, [2, 98], axis=0)
        row_of = {"pixels": pixel_hash(raw), "flat": is_flat(raw), "nodata_share": 1.0 - measured.mean()}
        for name, values in (("mean", mean), ("low", low), ("high", high)):
            row_of |= {f"{name}_{band}": value for band, value in zip(source.bands, values, strict=True)}
        rows.append(row_of)
        lows.append(coefficients(raw, source.nodata))
    return pd.DataFrame(rows), lows


def _copies(manifest: pd.DataFrame, measured: pd.DataFrame, lows: list[np.ndarray | None]) -> list[Finding]:
    """Equal pixels within a part, and near copies within and across parts and classes."""
    findings = []
    part, label = manifest["part"].to_numpy(dtype=object), manifest["class"].to_numpy(dtype=object)
    path = manifest["path"].to_numpy(dtype=object)
    used = _used(manifest)
    pixels = measured["pixels"].where(used)
    again = (pixels.duplicated() & pixels.notna()).to_numpy()
    holder = {key: row for row, key in reversed(list(enumerate(pixels)))}
    first = pixels.map(holder).fillna(-1).to_numpy(dtype=np.int64)
    flat = measured["flat"].to_numpy(dtype=bool) & used
    if flat.any():
        rows = np.flatnonzero(flat)
        text = f"{len(rows)} image(s) are of one colour all over, e.g. {path[rows[0]]}"
        mend = "look at them; leave out those that show nothing"
        findings.append(Finding("flat images", False, text, mend, rows[:, None], CLEAN_FILE))
    within = np.flatnonzero(again & ~flat & (part == part[first]))
    if len(within):
        text = f"{len(within)} image(s) are copies of another in their own part, e.g. {path[within[0]]}"
        pairs = np.stack([within, first[within]], axis=1)
        findings.append(
            Finding("duplicates", False, text, "use each once; copies count more than others", pairs, SPLIT_FILE)
        )

    hashed = np.array([row for row, low in enumerate(lows) if low is not None and used[row]], dtype=np.int64)
    if len(hashed) < 2:
        return findings
    pairs = hashed[near_copies(np.stack([low for row, low in enumerate(lows) if low is not None and used[row]]))]
    hashes = pixels.to_numpy(dtype=object)
    pairs = pairs.reshape(-1, 2)[hashes[pairs[:, 0]] != hashes[pairs[:, 1]]]
    known = pd.notna(part[pairs]).all(axis=1)
    across = known & (part[pairs[:, 0]] != part[pairs[:, 1]])
    order = pd.Series(part).map({name: rank for rank, name in enumerate(PARTS)}).to_numpy(dtype=float)
    swap = order[pairs[:, 0]] > order[pairs[:, 1]]  # the one of the lower part gives way
    pairs[swap] = pairs[swap][:, ::-1]
    table = "leave out those that give held-out images away, or put copies into one group (column group of a table)"
    both = "look at them, or leave both out: one of the two is in the wrong class"
    one = "look at them, or leave one of each out"
    for chosen, change, what, mend in (
        (across, SPLIT_FILE, "near copies of each other (turned, resized, compressed) in two parts", table),
        (label[pairs[:, 0]] != label[pairs[:, 1]], CLEAN_FILE, "near copies of each other in two classes", both),
        (known & ~across, CLEAN_FILE, "near copies of each other in one part", one),
    ):
        if chosen.any():
            a, b = pairs[chosen][0]
            text = f"{int(chosen.sum())} pair(s) of images are {what}, e.g. {path[a]} and {path[b]}"
            shown = np.concatenate([pairs[chosen], pairs[chosen][:, ::-1]]) if mend == both else pairs[chosen]
            findings.append(Finding("near copies", change == SPLIT_FILE, text, mend, shown, change))
    return findings


def _used(manifest: pd.DataFrame) -> np.ndarray:
    """(N,) which images take part: those with a part, or all where the data could not be divided."""
    known = manifest["part"].notna().to_numpy()
    return known if known.any() else ~known


def _balance(manifest: pd.DataFrame, source: Source, recipe: Recipe) -> list[Finding]:
    """Classes of very different size, and classes with next to nothing held out."""
    findings = []
    each = manifest[["class", "part"]].assign(row=np.arange(len(manifest)))
    if source.target == "classes":
        each = each.assign(**{"class": each["class"].map(labels_of)}).explode("class").dropna(subset="class")
    counts = each["class"].value_counts()
    if counts.iloc[0] > IMBALANCE * counts.iloc[-1]:
        text = f"class '{counts.index[0]}' has {counts.iloc[0]} images, '{counts.index[-1]}' only {counts.iloc[-1]}"
        mend = "trust balanced accuracy and macro F1, not accuracy; add images"
        change = "data.sampler=square_root"
        if recipe.data.sampler != "shuffle":
            change = f"data.sampler={recipe.data.sampler}"
        elif getattr(recipe.task, "class_weights", "none") != "none":  # they exclude a sampler
            change = f"task.class_weights={getattr(recipe.task, 'class_weights', 'none')}"
        given = change != "data.sampler=square_root"
        mend += f"; {change} makes up for it already" if given else ", or draw rare classes more often"
        findings.append(Finding("imbalance", False, text, mend, change=change))
    part = "test" if (manifest["part"] == "test").any() else "val"  # the one that the result is measured on
    held = each[each["part"] == part].groupby("class").size()
    few = held[held < FEW].sort_values()
    if len(few):
        if len(counts) > 1:
            text = f"{len(few)} class(es) have fewer than {FEW} images in {part}, e.g. '{few.index[0]}' {few.iloc[0]}: "
            text += "the figures of such a class are all but chance"
        else:  # images with masks or objects have no class of their own
            text = f"{part} has {few.iloc[0]} image(s), fewer than {FEW}: figures on so few are all but chance"
        rows = each["row"][each["class"].isin(few.index) & (each["part"] == part)].unique()
        mend = "add images, or let every image be tested once, in folds"
        findings.append(Finding("small classes", False, text, mend, rows[:, None], in_folds(source, recipe)))
    return findings


def _drift(manifest: pd.DataFrame, measured: pd.DataFrame, source: Source, recipe: Recipe) -> list[Finding]:
    """Bands whose values, or share without measurement, differ between training and a held-out part."""
    findings = _drifting(manifest["part"].to_numpy(dtype=object), measured, source.bands)
    if not findings:
        return []
    change = _without_drift(manifest, measured, source, recipe)
    # Without one, the difference is in the images themselves: its figures are where the mending begins.
    return [dataclasses.replace(found, change=change or found.change) for found in findings]


def _drifting(part: np.ndarray, measured: pd.DataFrame, bands: tuple[str, ...]) -> list[Finding]:
    """The findings for some parts, (N,) names."""
    findings = []
    train = measured[part == "train"]
    units = "check units and sensors of the files, or divide the data anew"
    for name in ("val", "test"):
        held = measured[part == name]
        if len(held) < 10 or len(train) < 10:  # means of fewer images differ by chance
            continue
        for band in bands:
            apart = {what: _apart(train[f"{what}_{band}"], held[f"{what}_{band}"]) for what in ("mean", "low", "high")}
            what = max(apart, key=lambda key: apart[key])
            if apart["mean"] > DRIFT:
                what = "mean"
            if apart[what] > DRIFT:
                a, b = train[f"{what}_{band}"].mean(), held[f"{what}_{band}"].mean()
                words = {"mean": "is", "low": "goes down to", "high": "goes up to"}[what]
                text = f"band '{band}' {words} {b:.4g} on average in {name} and {a:.4g} in train"
                findings.append(Finding("drift", False, text, units, change=STATS_OF_PARTS))
        gap = held["nodata_share"].mean() - train["nodata_share"].mean()
        if abs(gap) > NODATA_DRIFT:
            text = f"{100 * held['nodata_share'].mean():.0f} % of the pixels in {name} have no measurement, and "
            text += f"{100 * train['nodata_share'].mean():.0f} % in train"
            mend = "leave out empty tiles, or divide the data anew"
            empty = np.flatnonzero(pd.notna(part) & (measured["nodata_share"].to_numpy() > _EMPTY))[:, None]
            change = CLEAN_FILE if len(empty) else STATS_OF_PARTS
            findings.append(Finding("drift", False, text, mend, empty, change=change))
    return findings


def _without_drift(manifest: pd.DataFrame, measured: pd.DataFrame, source: Source, recipe: Recipe) -> str:
    """The change that divides the data anew, as honestly as it allows, into parts that are alike; empty without one.

    Only where the parts are a person's own: blocks and groups differ by nature, and a split at random would hide it.
    """
    if recipe.data.split_file is None and (recipe.data.split != "auto" or manifest["split"].isna().all()):
        return ""
    now = "" if recipe.data.split_file is None else "data.split_file=null "
    for kind in KINDS_OF_SPLIT:
        split = split_with(source, recipe, change := f"{now}data.split={kind}")
        if split is None:
            continue
        part = np.full(len(manifest), None, dtype=object)
        for name in PARTS:
            part[split.rows(name)] = name
        return "" if _drifting(part, measured, source.bands) else change
    return ""


def _apart(a: pd.Series, b: pd.Series) -> float:
    """Difference of the means of two samples in standard deviations within them; 0 without anything to compare."""
    spread = float(np.sqrt((a.var() + b.var()) / 2))
    difference = abs(a.mean() - b.mean()) / max(spread, 1e-12)
    return float(difference) if np.isfinite(difference) else 0.0
