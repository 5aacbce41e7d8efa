"""A verdict on data before training: what would make a result untrue, what is worth knowing, and how to mend it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from r2kit.data.files import is_flat, pixel_hash
from r2kit.data.findings import TARGET_CHECKS, Finding
from r2kit.data.leaks import find_leaks
from r2kit.data.perceptual import coefficients, near_copies
from r2kit.data.preprocess import missing_pixels
from r2kit.data.sources import Source, open_source
from r2kit.data.splits import PARTS, Split, make_split
from r2kit.data.table import write_table
from r2kit.errors import DataError
from r2kit.recipe import Recipe

IMBALANCE = 20.0
"""Largest class over smallest class above which a warning is given."""
DRIFT = 1.0
"""Difference between the means of two parts, in standard deviations between images, above which a warning is given."""
NODATA_DRIFT = 0.2
"""Difference between the shares of pixels without measurement of two parts above which a warning is given."""
_SHOWN = 6  # pairs or images of a finding on the page
_THUMBNAIL = 112  # pixels


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


def check_data(recipe: Recipe, out: Path) -> Verdict:
    """Read every image once, look for what would make a result untrue, and write it down.

    Args:
        recipe: Its `data` part and seed say what is read and how it is divided.
        out: Folder for ``manifest.parquet`` and ``check.html``; made if need be, files of these names are replaced.

    Raises:
        DataError: If there is nothing to check at all, or `out` cannot be written.
    """
    source = open_source(recipe.data.model_copy(update={"on_bad_file": "skip"}), recipe.target)
    findings = _unusable(source, skip=recipe.data.on_bad_file == "skip")
    manifest = source.manifest.assign(
        **{"class": [source.strata[label] for label in source.manifest["label"]]}, part=None
    )
    split: Split | None = None
    try:
        split = make_split(source.manifest, source.strata, recipe.data, recipe.seed, source.contents)
    except DataError as error:
        findings.append(Finding("split", True, str(error), "change what the message names, or add images"))
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
        findings += [
            Finding("split", False, note, "see r2kit data split, or data.split in the recipe")
            for note in split.warnings
        ]
    for check in TARGET_CHECKS[source.target]:
        findings += check(source)
    findings += _copies(manifest, measured, lows)
    findings += _balance(manifest)
    findings += _drift(manifest, measured, source.bands)
    findings.sort(key=lambda finding: not finding.untrue)

    manifest = pd.concat([manifest, measured], axis=1)
    if source.contents is not None:
        manifest = pd.concat([manifest, source.contents.drop(columns=["pixels", "flat"])], axis=1)
    verdict = Verdict(findings, manifest, source.skipped)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_table(manifest, out / "manifest.parquet")
        (out / "check.html").write_text(_page(source, verdict), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
    return verdict


def _unusable(source: Source, skip: bool) -> list[Finding]:
    """Files that cannot be read or do not fit the others."""
    if not source.skipped:
        return []
    path, reason = source.skipped[0]
    text = f"{len(source.skipped)} image(s) cannot be used, e.g. {path}: {reason}"
    mend = "data.on_bad_file=skip leaves them out" if skip else "mend or remove them, or data.on_bad_file=skip"
    return [Finding("files", not skip, text, mend)]


def _measure(source: Source) -> tuple[pd.DataFrame, list[np.ndarray | None]]:
    """Per image: hash of the pixels, mean of each band, share without measurement; and the perceptual coefficients."""
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
        row_of = {f"mean_{band}": value for band, value in zip(source.bands, mean, strict=True)}
        rows.append({"pixels": pixel_hash(raw), "flat": is_flat(raw), "nodata_share": 1.0 - measured.mean(), **row_of})
        lows.append(coefficients(raw, source.nodata))
    return pd.DataFrame(rows), lows


def _copies(manifest: pd.DataFrame, measured: pd.DataFrame, lows: list[np.ndarray | None]) -> list[Finding]:
    """Equal pixels within a part, and near copies within and across parts and classes."""
    findings = []
    part, label = manifest["part"].to_numpy(dtype=object), manifest["class"].to_numpy(dtype=object)
    path = manifest["path"].to_numpy(dtype=object)
    again = measured["pixels"].duplicated().to_numpy()
    first = measured["pixels"].map({key: row for row, key in reversed(list(enumerate(measured["pixels"])))}).to_numpy()
    flat = measured["flat"].to_numpy(dtype=bool)
    if flat.any():
        text = f"{int(flat.sum())} image(s) are of one colour all over, e.g. {path[np.flatnonzero(flat)[0]]}"
        findings.append(Finding("flat images", False, text, "look at them; remove those that show nothing"))
    within = np.flatnonzero(again & ~flat & (part == part[first]))
    if len(within):
        text = f"{len(within)} image(s) are copies of another in their own part, e.g. {path[within[0]]}"
        pairs = np.stack([within, first[within]], axis=1)
        findings.append(
            Finding("duplicates", False, text, "remove the copies; they count more than other images", pairs)
        )

    hashed = [row for row, low in enumerate(lows) if low is not None]
    if len(hashed) < 2:
        return findings
    pairs = np.array(hashed)[near_copies(np.stack([low for low in lows if low is not None]))].reshape(-1, 2)
    pixels = measured["pixels"].to_numpy(dtype=object)
    pairs = pairs[pixels[pairs[:, 0]] != pixels[pairs[:, 1]]]
    known = pd.notna(part[pairs]).all(axis=1)
    across = known & (part[pairs[:, 0]] != part[pairs[:, 1]])
    table = "put copies into one group: a table with a column group, and data.split=group"
    for chosen, untrue, what, mend in (
        (across, True, "near copies of each other (turned, resized, compressed) in two parts", table),
        (label[pairs[:, 0]] != label[pairs[:, 1]], False, "near copies of each other in two classes", "look at them"),
        (known & ~across, False, "near copies of each other in one part", "look at them; remove needless copies"),
    ):
        if chosen.any():
            a, b = pairs[chosen][0]
            text = f"{int(chosen.sum())} pair(s) of images are {what}, e.g. {path[a]} and {path[b]}"
            findings.append(Finding("near copies", untrue, text, mend, pairs[chosen]))
    return findings


def _balance(manifest: pd.DataFrame) -> list[Finding]:
    """Classes of very different size."""
    counts = manifest["class"].value_counts()
    if counts.iloc[0] <= IMBALANCE * counts.iloc[-1]:
        return []
    text = f"class '{counts.index[0]}' has {counts.iloc[0]} images, '{counts.index[-1]}' only {counts.iloc[-1]}"
    return [Finding("imbalance", False, text, "trust balanced accuracy and macro F1, not accuracy; add images")]


def _drift(manifest: pd.DataFrame, measured: pd.DataFrame, bands: tuple[str, ...]) -> list[Finding]:
    """Bands whose values, or share without measurement, differ between training and a held-out part."""
    findings = []
    part = manifest["part"].to_numpy(dtype=object)
    train = measured[part == "train"]
    for name in ("val", "test"):
        held = measured[part == name]
        if len(held) < 10 or len(train) < 10:  # means of fewer images differ by chance
            continue
        for band in bands:
            a, b = train[f"mean_{band}"], held[f"mean_{band}"]
            spread = float(np.sqrt((a.var() + b.var()) / 2))
            if abs(a.mean() - b.mean()) > DRIFT * max(spread, 1e-12):
                text = f"band '{band}' is {b.mean():.4g} on average in {name} and {a.mean():.4g} in train"
                findings.append(
                    Finding("drift", False, text, "check units and sensors of the files, or how they divide")
                )
        gap = held["nodata_share"].mean() - train["nodata_share"].mean()
        if abs(gap) > NODATA_DRIFT:
            text = f"{100 * held['nodata_share'].mean():.0f} % of the pixels in {name} have no measurement, and "
            text += f"{100 * train['nodata_share'].mean():.0f} % in train"
            findings.append(Finding("drift", False, text, "remove empty tiles, or divide the data anew"))
    return findings


# -------------------------------------------------------------------------------------------------------- the page


def _page(source: Source, verdict: Verdict) -> str:
    """The self-contained page; every value is escaped, because class names and paths come from strangers."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r2kit", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    manifest = verdict.manifest
    counts = pd.crosstab(manifest["class"], manifest["part"].fillna("not used"))
    examples = [
        [[_example(source, manifest, int(row)) for row in pair] for pair in finding.pairs[:_SHOWN]]
        for finding in verdict.findings
    ]
    return environment.get_template("check.html.j2").render(
        name=source.name,
        verdict=verdict,
        images=len(manifest),
        examples=examples,
        columns=list(counts.columns),
        counts=[(name, row.tolist()) for name, row in zip(counts.index, counts.to_numpy(), strict=True)],
        bands=source.bands,
    )


def _example(source: Source, manifest: pd.DataFrame, row: int) -> dict[str, str]:
    """A small picture with its name, class and part."""
    image = manifest.iloc[row]
    return {
        "url": _thumbnail(source.read(row), source),
        "caption": f"{image['id']} · {image['class']} · {image['part'] or 'not used'}",
    }


def _thumbnail(raw: np.ndarray, source: Source) -> str:
    """A data URL; other values than 8-bit colours are stretched from their 2nd to their 98th percentile."""
    shown = raw[..., :3] if raw.shape[2] >= 3 else np.repeat(raw[..., :1], 3, axis=2)
    pixels = shown.astype(np.float64)
    missing = missing_pixels(shown, source.nodata)
    if missing is not None:
        pixels[missing] = np.nan
    if raw.dtype != np.uint8 and np.isfinite(pixels).any():
        low, high = np.nanpercentile(np.where(np.isfinite(pixels), pixels, np.nan), [2, 98])
        pixels = (pixels - low) / max(high - low, 1e-12) * 255.0
    picture = Image.fromarray(np.clip(np.nan_to_num(pixels), 0, 255).astype(np.uint8))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
