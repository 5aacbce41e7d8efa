"""A verdict on data before training: what would make a result untrue, what is worth knowing, and how to mend it."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from r2kit.data.boxes.checks import BAD_BOXES
from r2kit.data.check_page import check_page
from r2kit.data.files import SEPARATOR, is_flat, labels_of, pixel_hash
from r2kit.data.findings import CLEAN_FILE, SPLIT_FILE, STATS, TARGET_CHECKS, Finding
from r2kit.data.leaks import find_leaks, without_leaks
from r2kit.data.perceptual import coefficients, near_copies
from r2kit.data.preprocess import missing_pixels
from r2kit.data.sources import Source, open_source
from r2kit.data.splits import PARTS, Split, make_split
from r2kit.data.table import write_table
from r2kit.errors import DataError, RecipeError
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe

IMBALANCE = 20.0
"""Largest class over smallest class above which a warning is given."""
DRIFT = 1.0
"""Difference between the means of two parts, in standard deviations between images, above which a warning is given."""
FEW = 5
"""Images of a class in the part that is reported on below which a warning is given."""
NODATA_DRIFT = 0.2
"""Difference between the shares of pixels without measurement of two parts above which a warning is given."""


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
        out: Folder for ``manifest.parquet``, ``check.html``, and, where images should give way, ``split.csv`` and
            ``clean.csv``; made if need be, files of these names are replaced.
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
        change = _other_split(source, recipe, True) or _without_single(source, recipe)
        findings.append(Finding("split", True, str(error), mend, change=change))
    measured, lows = _measure(source)
    if split is not None:
        for name in PARTS:
            manifest.loc[split.rows(name), "part"] = name
        leaks = find_leaks(source, split, measured["pixels"].where(~measured["flat"]).to_numpy(dtype=object))
        if recipe.data.on_leak == "drop":  # training leaves these out by itself
            leaks = [
                Finding(leak.kind, False, leak.text, "data.on_leak=drop leaves them out", leak.pairs) for leak in leaks
            ]
        findings += leaks
        other = "" if recipe.data.split_file or not split.warnings else _other_split(source, recipe, False)
        mend = "nothing, if it is meant so; else divide the data in another way"
        findings += [Finding("split", False, note, mend, change=other) for note in split.warnings]
    for check in TARGET_CHECKS[source.target]:
        findings += check(source, np.flatnonzero(_used(manifest)))
    if recipe.data.boxes.on_bad_box == "mend":
        words = "data.boxes.on_bad_box=mend cuts them or leaves them out"
        findings = [Finding(f.kind, False, f.text, words, f.pairs) if f.kind == BAD_BOXES else f for f in findings]
    if recipe.task.kind == "saliency":  # its loss is another, and made for objects of any size
        findings = [dataclasses.replace(f, change="") if f.change.startswith("task.") else f for f in findings]
    findings += _copies(manifest, measured, lows)
    findings += _balance(manifest, source, recipe)
    findings += _drift(manifest, measured, source.bands)
    findings.sort(key=lambda finding: not finding.untrue)

    manifest = pd.concat([manifest, measured], axis=1)
    if source.contents is not None:
        manifest = pd.concat([manifest, source.contents.drop(columns=["pixels", "flat", "low"])], axis=1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_table(manifest, out / "manifest.parquet")
        files = {"data": data} if split is None else {"data": data, **_write_splits(split, findings, source, out)}
        findings = [_with_command(finding, command, files) for finding in findings]
        verdict = Verdict(findings, manifest, source.skipped)
        (out / "check.html").write_text(
            check_page(source, verdict.findings, manifest, source.skipped), encoding="utf-8"
        )
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
    return Verdict(findings, manifest, source.skipped)


def _class_words(source: Source) -> list[str]:
    """The class of each image, or its labels in one word as a table has them."""
    if source.target != "classes":
        return [source.strata[label] for label in source.manifest["label"]]
    return [SEPARATOR.join(source.classes[i] for i in labels) for labels in source.manifest["labels"]]


def _write_splits(split: Split, findings: list[Finding], source: Source, out: Path) -> dict[str, str]:
    """Write the split without what should give way; return split and clean with their files, as far as needed.

    There is none where a class would be lost.
    """
    leaks = ("data.on_leak=drop", SPLIT_FILE)
    files = {}
    for name, needed, leaving in (("split", leaks, leaks), ("clean", (CLEAN_FILE,), (*leaks, CLEAN_FILE))):
        if not any(finding.change in needed for finding in findings):
            continue
        giving_way = [finding for finding in findings if finding.change in leaving]
        with contextlib.suppress(DataError):
            table = without_leaks(split, giving_way, source.manifest, source.strata).table(source.manifest)
            write_table(table, out / f"{name}.csv")
            files[name] = str(out / f"{name}.csv")
    return files


def _other_split(source: Source, recipe: Recipe, possible: bool) -> str:
    """The first change of the recipe that divides the data without a word; if `possible`, that divides it at all."""
    now = "" if recipe.data.split_file is None else "data.split_file=null "
    kinds = [f"{now}data.split={kind}" for kind in ("group", "blocks", "stratified")]
    folded = [f"{kind} data.folds=5" for kind in kinds]
    fewer = [f"{change} data.test_fraction=0" for change in kinds] if possible else []
    for change in (*kinds, "data.test_fraction=0.15", *folded, *fewer):
        split = _split_with(source, recipe, change)
        if split is not None and (possible or not split.warnings):
            return change
    return ""


def _split_with(source: Source, recipe: Recipe, change: str) -> Split | None:
    """The split with a change of the recipe; None where the recipe or the data does not allow it."""
    try:
        other = load_recipe(recipe.model_dump(), change.split())
        return make_split(source.manifest, source.strata, other.data, other.seed, source.contents)
    except (DataError, RecipeError):
        return None


def _in_folds(source: Source, recipe: Recipe) -> str:
    """The change that lets every image be tested once, with the most folds up to five; the next fold if there are."""
    if recipe.data.folds is not None:
        return f"data.fold={(recipe.data.fold + 1) % recipe.data.folds}"
    now = "" if recipe.data.split_file is None else "data.split_file=null "
    for folds in (5, 4, 3, 2):
        for kind in ("", "data.split=group ", "data.split=blocks ", "data.split=stratified "):
            change = f"{now}{kind}data.folds={folds}"
            if _split_with(source, recipe, change) is not None:
                return change
    return ""


def _without_single(source: Source, recipe: Recipe) -> str:
    """The command that takes the one class with a single image out of a folder of classes: hidden folders are none."""
    counts = source.manifest["label"].value_counts()
    single = counts.index[counts == 1]
    if len(single) != 1 or len(counts) < 3 or recipe.data.resolved_source != "folder" or source.target != "class":
        return ""
    name = source.classes[int(single[0])]
    folder = Path(str(recipe.data.root)) / name
    return shlex.join(["mv", str(folder), str(folder.with_name(f".{name}"))]) if folder.is_dir() else ""


def _with_command(finding: Finding, command: str, files: dict[str, str]) -> Finding:
    """The finding with the whole command that mends it in place of the change of the recipe; none if there is none.

    Args:
        finding: The finding.
        command: What trains.
        files: What stands for ``{data}``, ``{split}`` and ``{clean}``, as far as there is something.
    """
    if finding.change.startswith("mv "):
        return finding
    if finding.change.startswith("r2kit "):
        return dataclasses.replace(finding, change=finding.change.format(**files))
    if finding.change in (SPLIT_FILE, CLEAN_FILE):
        name = {SPLIT_FILE: "split", CLEAN_FILE: "clean"}[finding.change]
        items = [finding.change.format(**files)] if name in files else []
    else:
        items = shlex.split(finding.change)
    return dataclasses.replace(finding, change=f"{command} {shlex.join(items)}" if items else "")


def _unusable(source: Source, skip: bool) -> list[Finding]:
    """Files that cannot be read or do not fit the others."""
    if not source.skipped:
        return []
    path, reason = source.skipped[0]
    text = f"{len(source.skipped)} image(s) cannot be used, e.g. {path}: {reason}"
    mend = "data.on_bad_file=skip leaves them out" if skip else "mend or remove them, or leave them out"
    return [Finding("files", not skip, text, mend, change="" if skip else "data.on_bad_file=skip")]


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
        mend = "trust balanced accuracy and macro F1, not accuracy; add images, or draw rare classes more often"
        change = "data.sampler=square_root"  # unless something makes up for it already, or the task does not allow it
        if recipe.data.sampler != "shuffle" or _split_with(source, recipe, change) is None:
            change = ""
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
        findings.append(Finding("small classes", False, text, mend, rows[:, None], _in_folds(source, recipe)))
    return findings


def _drift(manifest: pd.DataFrame, measured: pd.DataFrame, bands: tuple[str, ...]) -> list[Finding]:
    """Bands whose values, or share without measurement, differ between training and a held-out part."""
    findings = []
    part = manifest["part"].to_numpy(dtype=object)
    train = measured[part == "train"]
    units = "check units and sensors of the files (r2kit data stats), or how they divide (r2kit data split)"
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
                findings.append(Finding("drift", False, text, units, change=STATS))
        gap = held["nodata_share"].mean() - train["nodata_share"].mean()
        if abs(gap) > NODATA_DRIFT:
            text = f"{100 * held['nodata_share'].mean():.0f} % of the pixels in {name} have no measurement, and "
            text += f"{100 * train['nodata_share'].mean():.0f} % in train"
            mend = "leave out empty tiles, or divide the data anew"
            findings.append(Finding("drift", False, text, mend, change="r2kit data split {data}"))
    return findings


def _apart(a: pd.Series, b: pd.Series) -> float:
    """Difference of the means of two samples in standard deviations within them; 0 without anything to compare."""
    spread = float(np.sqrt((a.var() + b.var()) / 2))
    difference = abs(a.mean() - b.mean()) / max(spread, 1e-12)
    return float(difference) if np.isfinite(difference) else 0.0
