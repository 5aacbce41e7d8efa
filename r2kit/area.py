"""How much land each class covers, from a map and a probability sample of reference labels, with intervals.

Counting pixels of a map adds up its mistakes. A sample whose inclusion probabilities are known corrects them: the
reference labels say what is there, the map only helps to say it precisely. That needs the design of the sample, and a
sample without one (points where someone happened to be) supports no such estimate: it is refused.

The estimators are those for a stratified random sample whose strata may differ from the map's classes (Stehman 2014);
with the classes as strata they are the familiar ones of Olofsson et al. 2014.

Source: Olofsson et al. 2014, "Good practices for estimating area and assessing accuracy of land change", Remote Sensing
of Environment 148; Stehman 2014, "Estimating area and map accuracy for stratified random sampling when the strata are
different from the map classes", International Journal of Remote Sensing 35.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import rasterio.warp
import scipy.stats
from numpy.typing import NDArray
from rasterio.windows import Window

from r2kit.data.reader import open_raster
from r2kit.data.table import read_table
from r2kit.errors import DataError, did_you_mean
from r2kit.maps.writer import class_names
from r2kit.run import write_atomic

Design = Literal["stratified", "simple", "systematic"]
_DESIGNS = get_args(Design)
_DEGREES = "EPSG:4326"
_EQUAL_AREA = "EPSG:6933"
_DISTORTION = 0.02  # of areas: UTM within a zone stays far below, Web Mercator passes it in the tropics


@dataclass(frozen=True)
class Estimate:
    """An estimate with its standard error and interval, all in one unit.

    Attributes:
        value: The estimate; NaN where the sample cannot give it.
        error: Standard error.
        low: Lower end.
        high: Upper end.
    """

    value: float
    error: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """Return the same in another unit."""
        return Estimate(*(factor * number for number in (self.value, self.error, self.low, self.high)))


@dataclass(frozen=True)
class ClassEstimates:
    """What is known about one class.

    Attributes:
        name: The class.
        mapped: Share of the map's pixels.
        share: Share of the land that is truly of the class.
        users: Of the land mapped as the class, the share that is of it.
        producers: Of the land of the class, the share that is mapped as it.
        sampled: Sample points whose reference is the class.
    """

    name: str
    mapped: float
    share: Estimate
    users: Estimate
    producers: Estimate
    sampled: int


@dataclass(frozen=True)
class AreaReport:
    """What `estimate_areas` found; multiply shares by `total_area` for areas."""

    design: str
    level: float
    points: int
    total_area: float
    unit: str
    overall: Estimate
    classes: tuple[ClassEstimates, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON primitives; NaN becomes None."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        return found


def ratio_estimate(
    y: NDArray[np.float64], x: NDArray[np.float64], stratum: NDArray[np.int64], sizes: NDArray[np.float64], level: float
) -> Estimate:
    """Estimate the ratio of two population totals from a stratified random sample.

    Args:
        y: (n,) the numerator of each sampled unit, for example 1 where map and reference are both the class.
        x: (n,) the denominator, for example 1 where the map is the class; all ones for a mean.
        stratum: (n,) integers in [0, H).
        sizes: (H,) units of the population in each stratum.
        level: Coverage of the interval, a normal one.

    Returns:
        NaN where the denominator was never seen, or a stratum with variation has one unit.

    Source: the ratio estimator of Stehman 2014; a mean is the ratio to the number of units.
    """
    top = bottom = variance = 0.0
    parts = []
    for h, size in enumerate(sizes):
        mine = stratum == h
        n = int(mine.sum())
        if n == 0:
            continue
        top += size * y[mine].mean()
        bottom += size * x[mine].mean()
        parts.append((size, n, y[mine], x[mine]))
    if bottom == 0.0:
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    ratio = top / bottom
    for size, n, own_y, own_x in parts:
        residual = own_y - ratio * own_x
        if n == 1:
            if size > 1:
                return Estimate(ratio, math.nan, math.nan, math.nan)
            continue
        variance += size**2 * (1.0 - n / size) * residual.var(ddof=1) / n
    error = math.sqrt(variance) / bottom
    half = float(scipy.stats.norm.ppf(0.5 + level / 2)) * error
    return Estimate(ratio, error, max(0.0, ratio - half), min(1.0, ratio + half))


def estimate_classes(
    mapped: NDArray[np.int64],
    reference: NDArray[np.int64],
    stratum: NDArray[np.int64],
    sizes: NDArray[np.float64],
    num_classes: int,
    level: float = 0.95,
) -> tuple[Estimate, list[tuple[Estimate, Estimate, Estimate]]]:
    """Estimate accuracy and the share of each class.

    Args:
        mapped: (n,) class of the map at each sampled unit, in [0, K).
        reference: (n,) true class, in [0, K).
        stratum: (n,) stratum it was drawn from, in [0, H).
        sizes: (H,) units of the population in each stratum.
        num_classes: K.
        level: Coverage of the intervals.

    Returns:
        Overall accuracy; and for each class the share of the land, user's and producer's accuracy.
    """
    ones = np.ones(len(mapped))
    overall = ratio_estimate((mapped == reference).astype(float), ones, stratum, sizes, level)
    classes = []
    for k in range(num_classes):
        is_map, is_true = (mapped == k).astype(float), (reference == k).astype(float)
        both = is_map * is_true
        classes.append(
            (
                ratio_estimate(is_true, ones, stratum, sizes, level),
                ratio_estimate(both, is_map, stratum, sizes, level),
                ratio_estimate(both, is_true, stratum, sizes, level),
            )
        )
    return overall, classes


def estimate_areas(
    map_file: str | Path, sample_file: str | Path, design: str | None, *, level: float = 0.95
) -> AreaReport:
    """Estimate the area of each class of a map from a sample of reference labels.

    Args:
        map_file: A map that ``r2kit predict`` made, in a projection whose units are lengths; best one of equal area.
        sample_file: CSV or Parquet with columns `reference` (class names) and lon and lat in degrees (or x and y in the
            map's coordinates). For a stratified design whose strata are not the map's classes also `stratum` and
            `stratum_size` (units of the population in it).
        design: ``stratified``: drawn at random within strata, by default the map's classes. ``simple``: at random over
            the whole map. ``systematic``: on a grid with a random start, whose variance is taken as that of `simple`.
        level: Coverage of the intervals.

    Raises:
        DataError: If there is no such design, a point lies outside the map, or a label is no class of the map.
    """
    map_file, sample_file = Path(map_file), Path(sample_file)
    if design is None or design not in _DESIGNS:
        came = "no design was given" if design is None else f"'{design}' is none"
        raise DataError(
            f"--design: {came}; areas can be estimated from a probability sample only, so say how its points were "
            f"drawn: {', '.join(_DESIGNS)}. A sample that was not drawn at random supports no estimate of areas"
            f"{did_you_mean(design, _DESIGNS) if design else ''}"
        )
    names = class_names(map_file)
    sample = read_table(sample_file, "a reference sample")
    counts, pixel_area, unit = _map_counts(map_file, len(names))
    reference = _reference(sample_file, sample, names)
    mapped, inside = _mapped(map_file, sample_file, sample)
    notes = []
    if not inside.all():
        notes.append(f"{int((~inside).sum())} point(s) lie where the map says nothing; they are outside its population")
        sample, reference, mapped = sample[inside], reference[inside], mapped[inside]
    if len(mapped) < 2:
        raise DataError(f"{sample_file}: fewer than two points lie on the map")
    stratum, sizes = _strata(sample_file, sample, design, mapped, counts, notes, names)
    if design == "systematic":
        notes.append("the variance of a systematic sample is taken as that of a simple random one, usually too large")
    overall, classes = estimate_classes(mapped, reference, stratum, sizes, len(names), level)
    total = counts.sum()
    figures = [overall, *(estimate for of_class in classes for estimate in of_class)]
    if len(mapped) < total and any(estimate.error == 0.0 for estimate in figures):
        notes.append(
            "an interval without width rests on points that all agree, from which no spread can be estimated; it is "
            "not sure, the sample is small"
        )
    rows = tuple(
        ClassEstimates(name, float(counts[k] / total), *classes[k], sampled=int((reference == k).sum()))
        for k, name in enumerate(names)
    )
    area = float(total) * pixel_area
    return AreaReport(design, level, len(mapped), area, unit, overall, rows, tuple(notes))


def write_area_report(found: AreaReport, out: Path) -> None:
    """Write a report as JSON.

    Raises:
        DataError: If the file cannot be written.
    """
    try:
        write_atomic(out, json.dumps(found.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None


# ----------------------------------------------------------------------------------------------- the map and the sample


def _map_counts(path: Path, classes: int) -> tuple[NDArray[np.float64], float, str]:
    """Pixels of each class, the area of a pixel, and its unit."""
    counts = np.zeros(classes)
    with open_raster(path) as dataset:
        if dataset.crs is None or dataset.crs.is_geographic:
            raise DataError(
                f"{path}: its pixels are {'degrees' if dataset.crs else 'without a coordinate system'} and have no one "
                f"area; warp the map to an equal-area projection first, e.g. rio warp MAP OUT --dst-crs {_EQUAL_AREA}"
            )
        _refuse_distorted(path, dataset)
        factor = float(dataset.crs.linear_units_factor[1])
        t = dataset.transform
        area = abs(t.a * t.e - t.b * t.d) * factor**2 / 10_000.0
        for _, window in dataset.block_windows(1):
            values = dataset.read(1, window=window)
            counts += np.bincount(values[values < classes].ravel(), minlength=classes)
    if counts.sum() == 0:
        raise DataError(f"{path}: holds no class anywhere")
    return counts, area, "ha"


def _refuse_distorted(path: Path, dataset: Any) -> None:
    """Raise where pixels of one size stand for ground of another, as in Web Mercator."""
    (height, width), t = dataset.shape, dataset.transform
    factor = float(dataset.crs.linear_units_factor[1])
    for row, column in ((0.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (1.0, 1.0)):
        # A square of a hundredth of the map's sides, as corners: x and y on the map, then on the ground.
        columns = 0.99 * column * width + np.array([0.0, 1.0, 1.0, 0.0]) * width / 100
        rows = 0.99 * row * height + np.array([0.0, 0.0, 1.0, 1.0]) * height / 100
        xs, ys = t.a * columns + t.b * rows + t.c, t.d * columns + t.e * rows + t.f
        ground = rasterio.warp.transform(dataset.crs, _EQUAL_AREA, xs, ys)
        true, drawn = _shoelace(*(np.array(axis) for axis in ground)), _shoelace(xs, ys) * factor**2
        if math.isfinite(true) and true > 0 and abs(drawn / true - 1.0) > _DISTORTION:
            raise DataError(
                f"{path}: {dataset.crs.to_string()[:60]} shows {drawn / true:.2f} times the true area somewhere; warp "
                f"the map to an equal-area projection first, e.g. rio warp MAP OUT --dst-crs {_EQUAL_AREA}"
            )


def _shoelace(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Area of a polygon by its corners."""
    x, y = x - x[0], y - y[0]
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2.0)


def _reference(path: Path, sample: pd.DataFrame, names: Sequence[str]) -> NDArray[np.int64]:
    """Reference labels as positions in the map's classes."""
    if "reference" not in sample:
        raise DataError(
            f"{path}: no column 'reference' with the true class of each point"
            f"{did_you_mean('reference', list(sample.columns))}"
        )
    number = {name: k for k, name in enumerate(names)}
    unknown = sample.loc[~sample["reference"].isin(number), "reference"]
    if len(unknown):
        word = str(unknown.iloc[0])
        raise DataError(
            f"{path}: reference '{word}' is no class of the map, which has {', '.join(names)}"
            f"{did_you_mean(word, names)}"
        )
    return np.array([number[word] for word in sample["reference"]], dtype=np.int64)


def _mapped(map_file: Path, path: Path, sample: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Class of the map at each point, and whether the map has one there."""
    pair = next((pair for pair in (("x", "y"), ("lon", "lat")) if set(pair) <= set(sample.columns)), None)
    if pair is None:
        raise DataError(f"{path}: has neither columns lon and lat (degrees) nor x and y (the map's coordinates)")
    xs, ys = (pd.to_numeric(sample[axis], errors="coerce").to_numpy(np.float64) for axis in pair)
    bad = ~(np.isfinite(xs) & np.isfinite(ys))
    if bad.any():
        raise DataError(f"{path}: row {int(np.flatnonzero(bad)[0]) + 1}: {pair[0]} and {pair[1]} are no numbers")
    values = np.zeros(len(sample), dtype=np.int64)
    with open_raster(map_file) as dataset:
        if pair == ("lon", "lat"):
            xs, ys = (np.asarray(axis) for axis in rasterio.warp.transform(_DEGREES, dataset.crs, xs, ys))
        inverse = ~dataset.transform
        columns = np.floor(inverse.a * xs + inverse.b * ys + inverse.c)
        rows = np.floor(inverse.d * xs + inverse.e * ys + inverse.f)
        outside = ~((rows >= 0) & (rows < dataset.height) & (columns >= 0) & (columns < dataset.width))
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise DataError(
                f"{path}: {int(outside.sum())} of {len(sample)} points lie outside the map, first row {at + 1}: "
                f"{pair[0]} {sample[pair[0]].iloc[at]}, {pair[1]} {sample[pair[1]].iloc[at]}"
            )
        for i, (row, column) in enumerate(zip(rows.astype(int), columns.astype(int), strict=True)):
            values[i] = dataset.read(1, window=Window(column, row, 1, 1))[0, 0]
        nodata = dataset.nodata
    return values, values != nodata


def _strata(
    path: Path,
    sample: pd.DataFrame,
    design: str,
    mapped: NDArray[np.int64],
    counts: NDArray[np.float64],
    notes: list[str],
    names: Sequence[str],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Stratum of each point and the size of each stratum."""
    if design != "stratified":
        return np.zeros(len(mapped), dtype=np.int64), np.array([counts.sum()])
    if "stratum" not in sample:
        notes.append("the strata are the map's classes; for others give columns stratum and stratum_size")
        empty = [names[k] for k in np.flatnonzero(counts) if not (mapped == k).any()]
        if empty:
            raise DataError(
                f"{path}: no point lies on land mapped as {', '.join(empty)}; every stratum needs points, two at least"
            )
        return mapped, counts
    if "stratum_size" not in sample:
        raise DataError(f"{path}: has a column stratum and none stratum_size (units of the population in the stratum)")
    code, labels = pd.factorize(sample["stratum"], sort=True)
    given = pd.to_numeric(sample["stratum_size"], errors="coerce").groupby(code)
    if not (given.nunique() == 1).all() or not (given.first() >= pd.Series(code).value_counts().sort_index()).all():
        raise DataError(
            f"{path}: stratum_size must be one number for each stratum, not below its points ({', '.join(labels[:3])})"
        )
    return code.astype(np.int64), given.first().to_numpy(np.float64)
