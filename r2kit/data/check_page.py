"""The page of a check: what was found, with pictures to look at."""

from __future__ import annotations

import base64
import io

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from r2kit.data.findings import Finding
from r2kit.data.preprocess import missing_pixels
from r2kit.data.sources import Source
from r2kit.data.splits import PARTS

_SHOWN = 6  # pairs or images of a finding on the page
_OF_CLASS, _CLASSES = 4, 50  # pictures of a class, and classes that have any
_THUMBNAIL = 112  # pixels


def check_page(source: Source, findings: list[Finding], manifest: pd.DataFrame, skipped: list[tuple[str, str]]) -> str:
    """Return the self-contained page; every value is escaped, because class names and paths come from strangers.

    Args:
        source: Where the images are.
        findings: What was found.
        manifest: One row per usable image, with columns id, class and part.
        skipped: (path, reason) of each image that cannot be used.
    """
    counts = pd.crosstab(manifest["class"], manifest["part"].fillna("not used"))
    counts = counts[[name for name in (*PARTS, "not used") if name in counts]]
    examples = [
        [[_example(source, manifest, int(row)) for row in pair] for pair in finding.pairs[:_SHOWN]]
        for finding in findings
    ]
    return page("check.html.j2").render(
        name=source.name,
        findings=findings,
        untrue=any(finding.untrue for finding in findings),
        skipped=skipped,
        images=len(manifest),
        examples=examples,
        columns=list(counts.columns),
        counts=[
            (name, row.tolist(), _of_class(source, manifest, name) if number < _CLASSES else [])
            for number, (name, row) in enumerate(zip(counts.index, counts.to_numpy(), strict=True))
        ],
        bands=source.bands,
    )


def page(name: str) -> jinja2.Template:
    """Return a page of the package that escapes every value."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r2kit", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _of_class(source: Source, manifest: pd.DataFrame, name: str) -> list[dict[str, str]]:
    """A few pictures of a class, evenly spaced."""
    rows = np.flatnonzero(manifest["class"] == name)
    chosen = rows[np.linspace(0, len(rows), min(_OF_CLASS, len(rows)), endpoint=False).astype(int)]
    return [_example(source, manifest, int(row)) for row in chosen]


def _example(source: Source, manifest: pd.DataFrame, row: int) -> dict[str, str]:
    """A small picture with its name, class and part."""
    image = manifest.iloc[row]
    return {
        "url": thumbnail(source.read(row), source),
        "caption": f"{image['id']} · {image['class']} · {image['part'] or 'not used'}",
    }


def thumbnail(raw: np.ndarray, source: Source) -> str:
    """Return a small picture of raw pixels (H, W, C) as a data URL.

    Other values than 8-bit colours are stretched from their 2nd to their 98th percentile.
    """
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
    picture.save(out, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
