"""Figures of a run, as matplotlib `Figure` objects: no pyplot, no global state, no window.

Every figure is drawn in one of two themes, with colours that colour-blind readers tell apart (Okabe and Ito), and is
narrow enough to be read on a phone. Text comes from strangers (class names are folder names): none of it is taken as
mathematics.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from r2kit.data.targets import CLASS_COLOURS, IGNORE
from r2kit.draw import GIVEN, draw_boxes
from r2kit.metrics import Reliability

if TYPE_CHECKING:
    from r2kit.data.datamodule import DataModule
    from r2kit.data.loader import Batch
    from r2kit.run import Run

WIDTH = 4.8
"""Width of a chart in inches; at this width 9 point text is as large as a phone's own small print."""


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    surface: str
    ink: str
    muted: str
    grid: str
    low: str
    """Colour of zero on a scale of shares; the other end is `main`."""
    main: str
    second: str
    good: str
    bad: str


LIGHT = Theme("#ffffff", "#1b2330", "#5c6675", "#e2e6ec", "#f3f6fa", "#0b63a5", "#d98200", "#0a8f6c", "#c8501e")
DARK = Theme("#161b22", "#e8ecf2", "#9ba6b5", "#2c3440", "#1d242e", "#5ab4f0", "#f0ab36", "#3cc9a2", "#f28a57")


@dataclass(frozen=True)
class Tile:
    """One picture of a mosaic.

    Attributes:
        image: (H, W, 3) uint8.
        caption: A line below it.
        right: Whether the prediction it shows is right; None where that is no question.
    """

    image: NDArray[np.uint8]
    caption: str
    right: bool | None = None


def to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Bring an image (3, H, W) in [0, 1] to (H, W, 3) uint8."""
    return np.rint(np.clip(np.moveaxis(image, 0, -1), 0.0, 1.0) * 255.0).astype(np.uint8)


def label_words(label: Any, classes: Sequence[str]) -> str:
    """Return a label in words: the class, or the parts of a mixed label, as ``arid 70 % + ocean 30 %``.

    Args:
        label: A class number, an array of shape (), or weights (K,) of the classes.
        classes: K names.
    """
    label = np.asarray(label)
    if label.ndim == 0:
        return classes[int(label)]
    if np.isin(label, (0.0, 1.0)).all():  # any number of labels, not mixed
        return ", ".join(name for name, weight in zip(classes, label, strict=True) if weight) or "no label"
    order = [i for i in np.argsort(-label, kind="stable")[:2] if label[i] >= 0.005]
    if len(order) == 1:
        return classes[order[0]]
    return " + ".join(f"{classes[i]} {100 * label[i]:.0f} %" for i in order)


def batch_tiles(batch: Batch, data: DataModule, *, epoch: int, batch_index: int = 0, most: int = 16) -> list[Tile]:
    """Return images of a training batch as the network sees them: augmented, mixed, with their mixed labels.

    Args:
        batch: A batch of the training loader, not mixed yet.
        data: The module it came from, which mixes it.
        epoch: Pass over the training images, from 0.
        batch_index: Position of the batch in the epoch, from 0.
        most: Images at most.
    """
    if "boxes" in batch:
        return _box_tiles(batch, data, most)
    mixed = data.mix(batch, epoch, batch_index)
    shown = data.preprocess.denormalize(mixed["image"][:most]).cpu().numpy()
    if "mask" in mixed:
        masks = mixed["mask"][:most].cpu().numpy()
        return [Tile(paint(to_uint8(i), m), mask_words(m, data.classes)) for i, m in zip(shown, masks, strict=True)]
    labels = mixed["label"][:most].cpu().numpy()
    return [Tile(to_uint8(i), label_words(k, data.classes)) for i, k in zip(shown, labels, strict=True)]


def paint(
    image: NDArray[np.uint8], mask: NDArray[Any], *, strength: float = 0.45, border: bool = True
) -> NDArray[np.uint8]:
    """Lay the colours of classes over an image, with a line where they meet; pixels without a class are dark grey.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) positions in the classes, or `IGNORE`.
        strength: Weight of the colours, in [0, 1].
        border: Whether to draw the line.
    """
    known = mask != IGNORE
    colours = np.array(CLASS_COLOURS, dtype=np.float64)[np.where(known, mask, 0) % len(CLASS_COLOURS)]
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.5
    painted = np.where(known[..., None], image * (1.0 - strength) + strength * colours, grey)
    if border:
        edge = np.zeros(mask.shape, dtype=bool)
        edge[1:] |= mask[1:] != mask[:-1]
        edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        painted[edge] = 255.0
    return np.rint(painted).clip(0, 255).astype(np.uint8)


def mask_words(mask: NDArray[Any], classes: Sequence[str], most: int = 2) -> str:
    """Return the largest classes of a mask in words, as ``land 80 %, road 20 %``."""
    count = np.bincount(mask[mask != IGNORE].astype(np.int64), minlength=len(classes))
    if count.sum() == 0:
        return "nothing labelled"
    order = [i for i in np.argsort(-count, kind="stable")[:most] if count[i]]
    return ", ".join(f"{classes[i]} {100 * count[i] / count.sum():.0f} %" for i in order)


def iou_figure(per_class: Sequence[dict[str, Any]], *, theme: Theme = LIGHT, most: int = 40) -> Figure:
    """Return the IoU of each class with its interval, the weakest on top.

    Args:
        per_class: The entries of `per_class` in the metrics.json of a segmentation.
        theme: Colours.
        most: With more classes than this, only the weakest are shown.
    """
    known = [row for row in per_class if row["iou"]["low"] is not None]
    rows = [{"class": row["class"], "recall": row["iou"], "support": row["pixels"]} for row in known]
    return _interval_figure(rows, "IoU, with 95 % interval (labelled pixels of the class)", theme, most)


def _box_tiles(batch: Batch, data: DataModule, most: int) -> list[Tile]:
    """Images of a training batch with their boxes."""
    shown = data.preprocess.denormalize(batch["image"][:most]).cpu().numpy()
    tiles = []
    for image, boxes, labels in zip(shown, batch["boxes"], batch["labels"], strict=False):
        names = [data.classes[int(label) - 1] for label in labels.tolist()]
        said = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "no object"
        tiles.append(Tile(draw_boxes(to_uint8(image), boxes.cpu().numpy(), [GIVEN] * len(boxes)), said))
    return tiles


def batch_mosaic(batch: Batch, data: DataModule, *, epoch: int, theme: Theme = LIGHT) -> Figure:
    """Return a training batch as the network sees it; see `batch_tiles`."""
    return mosaic(batch_tiles(batch, data, epoch=epoch), title="A training batch, as the network sees it", theme=theme)


def overlay(image: NDArray[np.uint8], heat: NDArray[Any], strength: float = 0.55) -> NDArray[np.uint8]:
    """Lay a map of evidence over an image: dark and cold where there is none, bright and warm where it is strong.

    Args:
        image: (H, W, 3) uint8.
        heat: (H, W) in [0, 1].
        strength: Weight of the colours, in [0, 1].
    """
    colours = LinearSegmentedColormap.from_list("evidence", ["#140b34", "#84206b", "#e55c30", "#f6d746"])(heat)[..., :3]
    return np.rint(image * (1.0 - strength) + 255.0 * strength * colours).clip(0, 255).astype(np.uint8)


def mosaic(
    tiles: Sequence[Tile], *, title: str = "", columns: int = 6, cell: float = 1.5, theme: Theme = LIGHT
) -> Figure:
    """Return pictures in rows, each with its caption; right and wrong ones framed in different colours and marked.

    Args:
        tiles: The pictures.
        title: Above them.
        columns: Pictures in a row at most.
        cell: Side of a picture in inches.
        theme: Colours.
    """
    columns = max(1, min(columns, len(tiles)))
    rows = max(1, -(-len(tiles) // columns))
    above, caption = 0.36 if title else 0.02, 0.36
    width, height = max(3, columns) * cell, above + rows * (cell + caption) + 0.08
    figure = Figure(figsize=(width, height), facecolor=theme.surface)
    axes = figure.add_axes((0, 0, 1, 1))  # one for all, in inches from the upper left: each costs as much as a chart
    axes.set_axis_off()
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        tall, wide = (side * 0.94 * cell / max(tile.image.shape[:2]) for side in tile.image.shape[:2])
        left = (column + 0.5) * width / columns - wide / 2
        top = above + row * (cell + caption) + caption + (cell - tall) / 2
        smooth = "nearest" if max(tile.image.shape[:2]) < 100 else "antialiased"
        axes.imshow(tile.image, extent=(left, left + wide, top + tall, top), interpolation=smooth, aspect="auto")
        mark, colour = _mark(tile.right, theme)
        kept = re.sub(r"(?<=\d) (?=[a-z%])", "\u00a0", mark + tile.caption)  # a number and what it counts, on one line
        lines = textwrap.wrap(kept, int(16 * cell), max_lines=2, placeholder="…")
        words = _plain("\n".join(lines), keep="\n")
        axes.text(left + wide / 2, top - 0.04, words, fontsize=7.5, color=colour, ha="center", va="bottom")
        if tile.right is not None:
            axes.add_patch(Rectangle((left, top), wide, tall, fill=False, edgecolor=colour, linewidth=1.6))
    axes.set(xlim=(0, width), ylim=(height, 0))
    if title:
        axes.text(0.01 * width, 0.08, _plain(title), color=theme.ink, fontsize=11, va="top")
    return figure


def confusion_figure(confusion: NDArray[Any], classes: Sequence[str], *, theme: Theme = LIGHT) -> Figure:
    """Return the confusion matrix: shares of each true class as colour, shares and counts as text.

    Args:
        confusion: (K, K) counts, true classes in rows.
        classes: K names. Beyond 16 classes the text is left out, beyond 60 the names too.
        theme: Colours.
    """
    count = len(classes)
    total = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    figure = _figure(theme, WIDTH * 0.92)
    axes = _axes(figure.add_subplot(), theme, grid=None)
    axes.imshow(share, cmap=_scale(theme), vmin=0.0, vmax=1.0, aspect="equal")
    axes.set_xlabel("predicted class", color=theme.muted)
    axes.set_ylabel("true class", color=theme.muted)
    names = [_short(name, 16) for name in classes]
    size = float(np.clip(64 / count, 4.0, 8.5))
    if count <= 60:
        axes.set_xticks(range(count), labels=names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
        axes.set_yticks(range(count), labels=names, fontsize=size)
    else:
        axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if count <= 16:
        for row, column in np.ndindex(count, count):
            if confusion[row, column]:
                strong = share[row, column] > 0.5
                axes.text(
                    column,
                    row,
                    f"{100 * share[row, column]:.0f} %\n{confusion[row, column]}",
                    ha="center",
                    va="center",
                    fontsize=float(np.clip(52 / count, 4.0, 8.0)),
                    color=theme.surface if strong else theme.ink,
                )
    return figure


def labels_figure(rows: Sequence[dict[str, Any]], *, theme: Theme = LIGHT) -> Figure:
    """Return the average precision of each label, with what answering at random gives.

    Args:
        rows: ``class``, ``support``, ``average_precision`` (share, None without an image) and ``chance`` of each.
        theme: Colours.
    """
    known = sorted((r for r in rows if r["average_precision"] is not None), key=lambda r: r["average_precision"])
    figure = _figure(theme, 1.0 + 0.24 * max(len(known), 2))
    axes = figure.subplots()
    _axes(axes, theme, grid="x")
    place = np.arange(len(known))
    axes.barh(place, [row["average_precision"] for row in known], color=theme.main, height=0.62)
    axes.plot([row["chance"] for row in known], place, "|", color=theme.ink, markersize=11, label="at random")
    axes.set_yticks(place, labels=[f"{_short(row['class'], 20)} ({row['support']})" for row in known])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_xlabel("average precision (images with the label)", color=theme.muted)
    _legend(axes, theme)
    return figure


def learning_curves(history: pd.DataFrame, *, best_epoch: int | None = None, theme: Theme = LIGHT) -> Figure:
    """Return loss and, where the task has one, accuracy by epoch, training and validation.

    Args:
        history: The rows of metrics.csv: ``epoch`` from 0, and any of ``train_loss``, ``val_loss``, ``train_acc``
            (or ``train_acc_dominant`` where images are mixed), ``val_acc``, ``val_map``, ``val_max_f``.
        best_epoch: Epoch, from 0, whose weights were kept.
        theme: Colours.
    """
    shares = {"acc": "accuracy", "map": "mean average precision", "max_f": "largest F-measure"}
    second = next((name for name in shares if f"val_{name}" in history), None)
    figure = _figure(theme, 4.4 if second else 2.4)
    parts = figure.subplots(2 if second else 1, 1, sharex=True, squeeze=False)[:, 0]
    loss = parts[0]
    epoch = history["epoch"].to_numpy() + 1
    marker = "o" if len(history) < 25 else ""
    drawn = [("loss", "loss (nats)"), *([(second, shares[second])] if second else [])]
    for axes, (what, words) in zip(parts, drawn, strict=True):
        _axes(axes, theme, grid="y")
        for stage, colour, style in (("train", theme.second, "--"), ("val", theme.main, "-")):
            for column, more in ((f"{stage}_{what}", ""), (f"{stage}_{what}_dominant", "; dominant label")):
                if column not in history:
                    continue
                name = {"train": f"training (as augmented{more})", "val": "validation"}[stage]
                axes.plot(epoch, history[column], style, color=colour, marker=marker, markersize=3, lw=1.6, label=name)
        axes.set_ylabel(words, color=theme.muted)
        if best_epoch is not None:
            axes.axvline(best_epoch + 1, color=theme.good, lw=1.2, ls=":")
    if best_epoch is not None:
        loss.annotate(
            "kept",
            (best_epoch + 1, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=theme.good,
            fontsize=8,
        )
    if second:
        parts[-1].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))  # as many decimals as it takes
        parts[-1].set_ylim(top=min(parts[-1].get_ylim()[1], 1.005))
    parts[-1].set_xlabel("epoch", color=theme.muted)
    parts[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    _legend(loss, theme)
    if "train_acc_dominant" in history:
        _legend(parts[-1], theme)
    return figure


def recall_figure(per_class: Sequence[dict[str, Any]], *, theme: Theme = LIGHT, most: int = 40) -> Figure:
    """Return the recall of each class with its interval, the weakest on top.

    Args:
        per_class: The entries of `per_class` in metrics.json.
        theme: Colours.
        most: With more classes than this, only the weakest are shown.
    """
    return _interval_figure(per_class, "recall, with 95 % interval (images of the class)", theme, most)


def _interval_figure(per_class: Sequence[dict[str, Any]], title: str, theme: Theme, most: int) -> Figure:
    """A share of each class with its interval, the weakest on top."""
    rows = sorted((row for row in per_class if row["support"]), key=lambda row: row["recall"]["value"])[:most]
    figure = _figure(theme, 0.75 + 0.25 * max(len(rows), 2))
    axes = _axes(figure.add_subplot(), theme, grid="x")
    value = np.array([row["recall"]["value"] for row in rows])
    low, high = (np.array([row["recall"][end] for row in rows]) for end in ("low", "high"))
    place = np.arange(len(rows))
    axes.hlines(place, low, high, color=theme.main, lw=5, alpha=0.35)
    axes.plot(value, place, "o", color=theme.main, markersize=5)
    axes.set_yticks(place, labels=[f"{_short(row['class'], 20)} ({row['support']})" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_xlabel(title, color=theme.muted)
    axes.tick_params(axis="y", length=0)
    return figure


def reliability_figure(table: Reliability, *, theme: Theme = LIGHT) -> Figure:
    """Return stated confidence against accuracy, and how many images were given each confidence."""
    figure = _figure(theme, 4.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    _axes(upper, theme, grid="both")
    _axes(lower, theme, grid=None)
    filled = table.count > 0
    upper.plot([0, 1], [0, 1], color=theme.muted, lw=1, ls="--", label="as confident as right")
    area = 14 + 120 * table.count[filled] / max(1, int(table.count.max()))
    upper.vlines(table.confidence[filled], table.confidence[filled], table.accuracy[filled], color=theme.bad, lw=1.6)
    upper.scatter(
        table.confidence[filled],
        table.accuracy[filled],
        s=area,
        color=theme.main,
        zorder=3,
        clip_on=False,
        label="bins",
    )
    upper.set_ylabel("accuracy", color=theme.muted)
    upper.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    _legend(upper, theme)
    width = table.edges[1] - table.edges[0]
    lower.bar(table.edges[:-1] + width / 2, table.count, width=0.86 * width, color=theme.main, alpha=0.55)
    lower.set_ylabel("images", color=theme.muted)
    lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=2))
    lower.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    lower.set_xlabel("confidence of the prediction", color=theme.muted)
    return figure


def split_map(places: pd.DataFrame, *, theme: Theme = LIGHT) -> Figure:
    """Return where the images of each split lie.

    Args:
        places: One row an image: ``lon``, ``lat`` in degrees, ``split``.
        theme: Colours.
    """
    known = places[places["lon"].notna() & places["lat"].notna()]
    figure, axes = _map(known, theme)
    size = float(np.clip(5000 / max(1, len(known)), 1.5, 30))
    colours = {"train": (theme.muted, 0.45), "val": (theme.second, 1.0), "test": (theme.main, 1.0)}
    for name, (colour, alpha) in colours.items():
        rows = known[known["split"] == name]
        if len(rows):
            axes.scatter(
                rows["lon"],
                rows["lat"],
                s=size,
                color=colour,
                alpha=alpha,
                marker="s",
                lw=0,
                label=f"{name} {len(rows)}",
            )
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
        handletextpad=0.2,
        columnspacing=1.0,
        borderpad=0.1,
        markerscale=max(1.0, (24 / size) ** 0.5),
    )
    return figure


def block_map(
    places: pd.DataFrame,
    shares: pd.Series,
    figure_name: str,
    *,
    degrees: float | None = None,
    others: pd.DataFrame | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Return a figure of each held-out block, where it lies; a block that has none is empty.

    Args:
        places: One row a held-out image: ``group``, ``lon`` and ``lat``.
        shares: The figure by group, in [0, 1] or NaN.
        figure_name: What it is, in words.
        degrees: Side of the blocks, whose corners lie at multiples of it; None draws each group's own extent.
        others: ``lon`` and ``lat`` of all images, drawn faintly behind.
        theme: Colours.
    """
    known = places[places["lon"].notna() & places["lat"].notna() & places["group"].notna()]
    table = known.groupby("group").agg(
        west=("lon", "min"), east=("lon", "max"), south=("lat", "min"), north=("lat", "max")
    )
    west, east, south, north = (table[side].to_numpy(np.float64) for side in ("west", "east", "south", "north"))
    if degrees is None:
        margin = _half_spacing(known)
        west, east, south, north = west - margin, east + margin, south - margin, north + margin
    else:
        margin = degrees / 2
        west, south = np.floor(west / degrees) * degrees, np.floor(south / degrees) * degrees
        east, north = west + degrees, south + degrees
    corners = [np.stack(xy, axis=-1) for xy in ((west, south), (east, south), (east, north), (west, north))]
    figure, axes = _map(known if others is None else pd.concat([known, others]), theme, margin=margin)
    if others is not None:
        size = float(np.clip(3000 / max(1, len(others)), 0.8, 8))
        axes.scatter(others["lon"], others["lat"], s=size, color=theme.muted, alpha=0.3, marker="s", lw=0)
    colours = PolyCollection(
        list(np.stack(corners, axis=1)),  # (4, 2) a block
        array=np.ma.masked_invalid(shares.reindex(table.index).to_numpy(np.float64)),
        cmap="cividis",
        norm=Normalize(0.0, 1.0),
        edgecolors=theme.muted,
        linewidths=0.8,
    )
    axes.add_collection(colours)
    scale = ScalarMappable(Normalize(0.0, 1.0), "cividis")
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", shrink=0.6, aspect=30, pad=0.02)
    bar.set_label(f"{figure_name} in the block", color=theme.muted, fontsize=8)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    bar.ax.tick_params(colors=theme.muted, labelsize=8)
    bar.outline.set_visible(False)
    return figure


def png(figure: Figure, dpi: int = 160) -> bytes:
    """Return a figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; the page has it in words.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, run: Run, name: str) -> Path:
    """Write a figure as plots/NAME.png of a run; return the file."""
    run.plots.mkdir(parents=True, exist_ok=True)
    file = run.plots / f"{name}.png"
    file.write_bytes(png(figure))
    return file


def _figure(theme: Theme, height: float, width: float = WIDTH) -> Figure:
    """An empty figure of a size in inches, that makes room for its own text."""
    return Figure(figsize=(width, height), facecolor=theme.surface, layout="constrained")


def _axes(axes: Axes, theme: Theme, *, grid: str | None) -> Axes:
    """Give axes the common look: no box, quiet ticks, grid lines only where they help."""
    axes.set_facecolor(theme.surface)
    axes.tick_params(colors=theme.muted, labelsize=8, length=3, width=0.6)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_color(theme.ink)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set(color=theme.grid, linewidth=0.8)
    if grid is not None:
        axes.grid(axis=grid, color=theme.grid, linewidth=0.8)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
    return axes


def _legend(axes: Axes, theme: Theme) -> None:
    """A legend without a frame, where it covers least."""
    axes.legend(loc="best", frameon=False, fontsize=8, labelcolor=theme.ink)


def _map(places: pd.DataFrame, theme: Theme, margin: float | None = None) -> tuple[Figure, Axes]:
    """Axes in degrees that just hold the places, equal-sided at their middle latitude."""
    around = (_half_spacing(places) if margin is None else margin) * 1.5
    west, east = float(places["lon"].min()) - around, float(places["lon"].max()) + around
    south, north = float(places["lat"].min()) - around, float(places["lat"].max()) + around
    middle = (south + north) / 2
    stretch = 1.0 / max(0.2, float(np.cos(np.radians(middle)))) if north - south < 60 else 1.0
    height = (WIDTH - 0.5) * (north - south) * stretch / max(east - west, 1e-9)
    figure = _figure(theme, float(np.clip(height + 0.7, 2.2, 6.0)))
    axes = _axes(figure.add_subplot(), theme, grid="both")
    axes.set(xlim=(west, east), ylim=(south, north))
    axes.set_aspect(stretch)
    axes.xaxis.set_major_formatter(lambda value, _: _degrees(value, "W", "E"))
    axes.yaxis.set_major_formatter(lambda value, _: _degrees(value, "S", "N"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def _degrees(value: float, negative: str, positive: str) -> str:
    """An angle as a map writes it."""
    side = "" if value == 0 else negative if value < 0 else positive
    return f"{abs(value):g}°{side}"


def _half_spacing(places: pd.DataFrame) -> float:
    """Half the usual distance in degrees between neighbouring places, so that boxes around them touch."""
    latitudes = np.unique(np.round(places["lat"].to_numpy(np.float64), 6))
    return float(np.median(np.diff(latitudes)) / 2) if latitudes.size > 1 else 0.05


def _scale(theme: Theme) -> LinearSegmentedColormap:
    """Colours of a share from none to all."""
    return LinearSegmentedColormap.from_list("share", [theme.low, theme.main])


def _mark(right: bool | None, theme: Theme) -> tuple[str, str]:
    """Sign and colour of right and wrong; the sign serves readers who do not see the colour."""
    if right is None:
        return "", theme.ink
    return ("✓ ", theme.good) if right else ("✗ ", theme.bad)


def _plain(text: str, keep: str = "") -> str:
    """Text that matplotlib draws as it stands: dollars are no mathematics, control characters are spaces."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text).replace("$", r"\$")


def _short(text: str, most: int) -> str:
    """At most so many characters, the last one an ellipsis where something is cut."""
    return _plain(text if len(text) <= most else text[: most - 1] + "…")
