"""Area estimates against the published worked examples, a simulation, and what is refused."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from affine import Affine

from r2kit import cli
from r2kit.area import estimate_areas, estimate_classes, ratio_estimate
from r2kit.data.reader import keep_raster_open
from r2kit.errors import DataError

# Olofsson et al. 2014, table 8: rows are map classes (deforestation, gain, stable forest, stable non-forest), columns
# the reference; 10 million pixels of 30 m.
OLOFSSON = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
PIXELS = np.array([200_000, 150_000, 3_200_000, 6_450_000], dtype=float)


def expand(matrix):
    mapped, reference = np.nonzero(matrix)
    counts = matrix[mapped, reference]
    return np.repeat(mapped, counts), np.repeat(reference, counts)


def test_the_worked_example_of_olofsson():
    mapped, reference = expand(OLOFSSON)
    overall, classes = estimate_classes(mapped, reference, mapped, PIXELS, 4)
    hectares = PIXELS.sum() * 0.09
    # Published: area and half width of the 95 % interval in hectares.
    for (share, _, _), area, half in zip(
        classes, (21_158, 11_686, 285_770, 581_386), (6_158, 3_756, 15_510, 16_282), strict=True
    ):
        assert share.value * hectares == pytest.approx(area, abs=1)
        assert 1.96 * share.error * hectares == pytest.approx(half, rel=2e-3)
    assert overall.value == pytest.approx(0.947, abs=5e-4)
    assert 1.96 * overall.error == pytest.approx(0.018, abs=1e-3)
    users = [(row[1].value, 1.96 * row[1].error) for row in classes]
    np.testing.assert_allclose(users, [(0.88, 0.07), (0.73, 0.10), (0.93, 0.04), (0.96, 0.02)], atol=6e-3)
    # The paper's own formula for the variance of the producer's accuracy, its equation 7.
    share, n = OLOFSSON / OLOFSSON.sum(1, keepdims=True), OLOFSSON.sum(1)
    total = (PIXELS[:, None] * share).sum(0)
    for j, (_, _, producers) in enumerate(classes):
        value = PIXELS[j] * share[j, j] / total[j]
        assert producers.value == pytest.approx(value)
        others = [i for i in range(4) if i != j]
        variance = PIXELS[j] ** 2 * (1 - value) ** 2 * share[j, j] * (1 - share[j, j]) / (n[j] - 1)
        variance += value**2 * sum(PIXELS[i] ** 2 * share[i, j] * (1 - share[i, j]) / (n[i] - 1) for i in others)
        assert producers.error == pytest.approx(math.sqrt(variance) / total[j], rel=1e-3)


def test_intervals_cover_the_truth_when_strata_are_not_the_classes():
    rng = np.random.default_rng(0)
    size = 20_000
    stratum = (np.arange(size) >= 14_000).astype(np.int64)
    truth = (rng.random(size) < np.where(stratum == 1, 0.7, 0.1)).astype(np.int64)
    mapped = np.where(rng.random(size) < 0.85, truth, 1 - truth)
    sizes = np.array([14_000.0, 6_000.0])
    true_producers = ((mapped == 1) & (truth == 1)).sum() / truth.sum()
    covered = []
    for _ in range(300):
        chosen = np.concatenate(
            [rng.choice(14_000, 150, replace=False), 14_000 + rng.choice(6_000, 150, replace=False)]
        )
        _, classes = estimate_classes(mapped[chosen], truth[chosen], stratum[chosen], sizes, 2)
        share, _, producers = classes[1]
        covered.append((share.low <= truth.mean() <= share.high, producers.low <= true_producers <= producers.high))
    assert (np.mean(covered, axis=0) > 0.91).all()
    assert (np.mean(covered, axis=0) < 0.985).all()


def test_what_a_sample_cannot_give_is_not_a_number():
    ones = np.ones(3)
    never = ratio_estimate(np.zeros(3), np.zeros(3), np.zeros(3, int), np.array([10.0]), 0.95)
    assert math.isnan(never.value)
    single = ratio_estimate(ones[:1], ones[:1], np.zeros(1, int), np.array([10.0]), 0.95)
    assert single.value == 1.0
    assert math.isnan(single.error)
    census = ratio_estimate(np.array([1.0, 0, 1]), ones, np.zeros(3, int), np.array([3.0]), 0.95)
    assert census.error == 0.0


@pytest.fixture
def land(tmp_path):
    """A map of two classes on a grid of 100 m, half and half, and how to write a sample."""
    values = np.repeat([[0, 1]], 40, axis=0).repeat(20, axis=1).astype(np.uint8)
    values[:2, :2] = 255
    profile = {"height": 40, "width": 40, "count": 1, "dtype": "uint8", "nodata": 255, "crs": "EPSG:6933"}
    with keep_raster_open(
        tmp_path / "map.tif", "GTiff", "w", {**profile, "transform": Affine(100, 0, 0, 0, -100, 4000)}
    ) as file:
        file.write(values[None])
        file.update_tags(CLASS_0="field", CLASS_1="water")

    def write(**columns):
        pd.DataFrame(columns).to_csv(tmp_path / "sample.csv", index=False)
        return tmp_path / "map.tif", tmp_path / "sample.csv"

    return write


def test_from_files_to_hectares(land, tmp_path, capsys):
    x = [250, 650, 1050, 1450, 2250, 2650, 3050, 3450]
    files = land(x=x, y=[2000] * 8, reference=["field"] * 3 + ["water"] + ["water"] * 4)
    found = estimate_areas(*files, "stratified")
    assert found.total_area == 1600 - 4  # 40 x 40 pixels of one hectare, four without a class
    assert found.classes[0].share.value == pytest.approx(796 / 1596 * 0.75)
    assert found.classes[1].users.value == 1.0
    assert found.points == 8
    with pytest.raises(SystemExit) as ended:
        cli.main(["area", *map(str, files), "--design", "stratified", "-o", str(tmp_path / "area.json")])
    assert ended.value.code == 0
    assert "overall accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "area.json").read_text())["points"] == 8
    plain = estimate_areas(*files, "systematic")
    assert plain.classes[0].share.value == pytest.approx(3 / 8)
    assert any("systematic" in note for note in plain.notes)
    own = land(
        x=x,
        y=[2000] * 8,
        reference=["field"] * 4 + ["water"] * 4,
        stratum=["a"] * 4 + ["b"] * 4,
        stratum_size=[400] * 4 + [1196] * 4,
    )
    assert estimate_areas(*own, "stratified").classes[0].share.value == pytest.approx(400 / 1596)


def test_intervals_without_width_are_not_passed_off_as_sure(land):
    x = [250, 650, 2250, 2650]
    agreeing = estimate_areas(*land(x=x, y=[2000] * 4, reference=["field"] * 2 + ["water"] * 2), "simple")
    assert (agreeing.overall.low, agreeing.overall.high) == (1.0, 1.0)
    assert any("an interval without width rests on points that all agree" in note for note in agreeing.notes)
    x = [250, 350, 650, 2250, 2350, 2650]
    mixed = ["field", "field", "water", "water", "water", "field"]
    assert estimate_areas(*land(x=x, y=[2000] * 6, reference=mixed), "simple").notes == ()


def test_points_without_a_class_are_left_out_and_named(land):
    files = land(x=[50, 650, 2250, 2650, 1050], y=[3950] * 5, reference=["field"] * 2 + ["water"] * 2 + ["field"])
    found = estimate_areas(*files, "simple")
    assert found.points == 4
    assert "1 point(s)" in found.notes[0]


@pytest.mark.parametrize(
    ("columns", "design", "message"),
    [
        ({"x": [50], "y": [50], "reference": ["field"]}, None, "no design was given.*not drawn at random"),
        ({"x": [50], "y": [50], "reference": ["field"]}, "stratifed", "did you mean 'stratified'"),
        ({"x": [50], "y": [50], "reference": ["feld"]}, "simple", "no class of the map.*did you mean 'field'"),
        ({"x": [50], "y": [50], "label": ["field"]}, "simple", "no column 'reference'"),
        ({"a": [50], "reference": ["field"]}, "simple", "neither columns lon and lat"),
        ({"x": [50], "y": [9999], "reference": ["field"]}, "simple", "1 of 1 points lie outside"),
        ({"x": ["east"], "y": [50], "reference": ["field"]}, "simple", "are no numbers"),
        (
            {"x": [50, 60], "y": [50, 60], "reference": ["field"] * 2},
            "stratified",
            "no point lies on land mapped as water",
        ),
        (
            {"x": [50, 60], "y": [50, 60], "reference": ["field"] * 2, "stratum": ["a", "a"]},
            "stratified",
            "stratum_size",
        ),
        (
            {"x": [50, 60], "y": [50, 60], "reference": ["field"] * 2, "stratum": ["a"] * 2, "stratum_size": [5, 6]},
            "stratified",
            "one number for each stratum",
        ),
    ],
)
def test_what_supports_no_estimate_is_refused(land, columns, design, message):
    with pytest.raises(DataError, match=message):
        estimate_areas(*land(**columns), design)


def test_degrees_have_no_area(tmp_path, land):
    _, sample = land(x=[1.0, 2.0], y=[1.0, 2.0], reference=["field"] * 2)
    profile = {"height": 4, "width": 4, "count": 1, "dtype": "uint8", "crs": "EPSG:4326"}
    with keep_raster_open(
        tmp_path / "degrees.tif", "GTiff", "w", {**profile, "transform": Affine(1, 0, 0, 0, -1, 4)}
    ) as file:
        file.write(np.zeros((1, 4, 4), np.uint8))
        file.update_tags(CLASS_0="field")
    with pytest.raises(DataError, match="equal-area projection"):
        estimate_areas(tmp_path / "degrees.tif", sample, "simple")


@pytest.mark.parametrize(
    ("crs", "north", "distorted"), [("EPSG:3857", 6_000_000, True), ("EPSG:32633", 5_000_000, False)]
)
def test_a_map_whose_pixels_stretch_has_no_area(tmp_path, land, crs, north, distorted):
    file = tmp_path / "stretched.tif"
    profile = {"height": 40, "width": 40, "count": 1, "dtype": "uint8", "crs": crs}
    place = Affine(10, 0, 500_000, 0, -10, north)
    with keep_raster_open(file, "GTiff", "w", {**profile, "transform": place}) as dataset:
        dataset.write(np.arange(1600, dtype=np.uint8).reshape(1, 40, 40) % 2)
        dataset.update_tags(CLASS_0="field", CLASS_1="water")
    sample = tmp_path / "points.csv"
    points = [(500_005 + 10 * i, north - 5, "field") for i in range(6)]
    pd.DataFrame(points, columns=["x", "y", "reference"]).to_csv(sample, index=False)
    if distorted:
        with pytest.raises(DataError, match=r"EPSG:3857 shows 2\.\d+ times the true area somewhere; warp the map"):
            estimate_areas(file, sample, "simple")
    else:
        assert estimate_areas(file, sample, "simple").total_area == pytest.approx(16.0)
