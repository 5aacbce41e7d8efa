"""Pages of HTML that need no network, no script and no other file, and the pictures in them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from r2kit import plots
from r2kit.console import counted, duration, sentence
from r2kit.plots import Theme, Tile
from r2kit.run import Run

_THUMBNAIL = 176  # pixels; twice the width of a thumbnail on a phone


@dataclass(frozen=True)
class Chart:
    """A figure in both themes, as data URLs."""

    light: str
    dark: str
    alt: str


@dataclass(frozen=True)
class Thumbnail:
    """A small picture with its caption."""

    url: str
    caption: str
    right: bool | None


def template(name: str) -> jinja2.Template:
    """Return a page; every value is escaped, because class names and paths come from strangers."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r2kit", "templates"),
        autoescape=True,
        finalize=_unbroken,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}".replace(",", "\u2009")  # a thin space
    environment.filters["duration"] = duration
    environment.filters["counted"] = counted
    environment.filters["sentence"] = sentence
    return environment.get_template(name)


def _unbroken(value: Any) -> Any:
    """Keep a number and its percent sign on one line."""
    return value.replace(" %", "\u00a0%") if isinstance(value, str) else value


def chart_of(run: Run, name: str, alt: str, draw: Callable[[Theme], Figure]) -> Chart:
    """Draw a chart in both themes; the light one is kept as plots/NAME.png of the run."""
    light = plots.save(draw(plots.LIGHT), run, name).read_bytes()
    return Chart(data_url(light, "image/png"), data_url(plots.png(draw(plots.DARK)), "image/png"), alt)


def thumbnail_of(tile: Tile, side: int = _THUMBNAIL) -> Thumbnail:
    """Return a tile as a small JPEG, small images enlarged without smoothing so that their pixels show."""
    image = Image.fromarray(tile.image)
    factor = side / max(image.size)
    width, height = (max(1, math.floor(length * factor)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return Thumbnail(data_url(buffer.getvalue(), "image/jpeg"), tile.caption, tile.right)


def data_url(content: bytes, kind: str) -> str:
    """Return content as a URL that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
