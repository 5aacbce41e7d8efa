"""Figures: they draw whatever comes, leave matplotlib's global state alone, and show what they were given."""

import ast
import inspect
import io

import matplotlib
import matplotlib.text
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from r2kit import metrics, plots

NASTY = ["$\\frac{1", "a" * 80, "氷河", "line\nbreak", "<b>&", "50 % $x$", "_^{}"]


def pixels(figure):
    image = Image.open(io.BytesIO(plots.png(figure, dpi=60)))
    return np.asarray(image.convert("RGB")).astype(int)


def words(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def per_class(names):
    recall = {"value": 0.5, "low": 0.2, "high": 0.8}
    return [{"class": name, "support": 9, "recall": recall} for name in names]


def places(count=40):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"lon": rng.uniform(-170, 170, count), "lat": rng.uniform(-60, 70, count)})
    frame["split"] = np.array(["train", "val", "test", "train"])[np.arange(count) % 4]
    frame["group"] = [f"b{i // 5}" for i in range(count)]
    frame["label"], frame["pred"] = "a", ["a" if i % 3 else "b" for i in range(count)]
    return frame


def shares(frame):
    return (frame["label"] == frame["pred"]).astype(float).groupby(frame["group"]).mean()


def every_figure(theme, names):
    k = len(names)
    rng = np.random.default_rng(0)
    tile = plots.Tile(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), names[0], True)
    history = pd.DataFrame({"epoch": [0, 1], "train_loss": [1.0, 0.5], "val_loss": [1.1, 0.7], "val_acc": [0.3, 0.6]})
    probs = rng.dirichlet(np.ones(k), 50)
    yield plots.mosaic([tile, plots.Tile(tile.image, names[1], False)], title=names[0], theme=theme)
    yield plots.confusion_figure(rng.integers(0, 9, (k, k)), names, theme=theme)
    yield plots.recall_figure(per_class(names), theme=theme)
    yield plots.learning_curves(history, best_epoch=1, theme=theme)
    yield plots.reliability_figure(metrics.reliability(probs, rng.integers(0, k, 50)), theme=theme)
    yield plots.split_map(places(), theme=theme)
    yield plots.block_map(places(), shares(places()), "accuracy", degrees=20.0, others=places(), theme=theme)


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_every_figure_draws_with_names_from_strangers(theme):
    corner = tuple(int(theme.surface[i : i + 2], 16) for i in (1, 3, 5))
    for figure in every_figure(theme, NASTY):
        image = pixels(figure)
        assert tuple(image[0, 0]) == corner
        assert image.std() > 3  # something is drawn


def test_a_mosaic_shows_every_picture_in_its_place_and_whole():
    shapes = [(20, 40), (40, 20), (30, 30), (64, 64), (200, 100)]
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)], dtype=np.uint8)
    tiles = [
        plots.Tile(np.broadcast_to(colour, (*shape, 3)), f"tile {i}")
        for i, (shape, colour) in enumerate(zip(shapes, colours, strict=True))
    ]
    figure = plots.mosaic(tiles, columns=3, theme=plots.LIGHT)
    image = pixels(figure)
    places = [np.argwhere(abs(image - colour).max(-1) <= 2) for colour in colours.astype(int)]
    boxes = [(place.min(0), place.max(0)) for place in places]
    for (low, high), (tall, wide) in zip(boxes, shapes, strict=True):
        assert (high[0] - low[0]) / (high[1] - low[1]) == pytest.approx(tall / wide, rel=0.1)
    corners = np.array([low for low, _ in boxes])
    assert (np.diff(corners[:3, 1]) > 0).all()  # from left to right
    assert corners[3:, 0].min() > max(high[0] for _, high in boxes[:3])  # the second row below the first
    assert {"tile 0", "tile 4"} <= set(words(figure))


def test_equal_figures_are_equal_bytes():
    first, second = (plots.png(plots.recall_figure(per_class("ab")), dpi=50) for _ in range(2))
    assert first == second


def test_dollars_are_drawn_as_they_stand():
    assert plots._plain("$a_1$") == r"\$a_1\$"
    assert r"\$a_1\$ (9)" in words(plots.recall_figure(per_class(["$a_1$", "b"])))


def test_no_pyplot_and_no_global_state():
    names = [
        alias.name for node in ast.walk(ast.parse(inspect.getsource(plots))) for alias in getattr(node, "names", [])
    ]
    assert names
    assert not any("pyplot" in str(name) for name in names)
    before = dict(matplotlib.rcParams)
    plots.png(plots.recall_figure(per_class("ab")))
    assert dict(matplotlib.rcParams) == before


def test_confusion_shows_shares_and_counts():
    text = words(plots.confusion_figure(np.array([[8, 2], [0, 5]]), ["a", "b"]))
    assert "80 %\n8" in text
    assert "20 %\n2" in text
    assert "100 %\n5" in text
    assert not any(t.startswith("0 %\n") for t in text)


@pytest.mark.parametrize("count", [1, 17, 70])
def test_confusion_of_few_and_many_classes(count):
    figure = plots.confusion_figure(np.eye(count, dtype=int), [f"class {i}" for i in range(count)])
    assert pixels(figure).std() > 3
    assert ("class 0" in words(figure)) == (count <= 60)


def test_recall_shows_the_weakest_on_top_and_leaves_empty_classes_out():
    rows = per_class(["mid", "low", "none"])
    rows[1]["recall"] = {"value": 0.1, "low": 0.0, "high": 0.3}
    rows[2]["support"] = 0
    axes = plots.recall_figure(rows).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["low (9)", "mid (9)"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert len(plots.recall_figure(per_class([str(i) for i in range(90)])).axes[0].get_yticks()) == 40


def test_learning_curves_of_one_epoch_and_missing_columns():
    history = pd.DataFrame({"epoch": [0], "val_loss": [1.0]})
    figure = plots.learning_curves(history)
    assert [len(axes.lines) for axes in figure.axes] == [1]  # no empty half where there is no accuracy
    assert pixels(figure).std() > 3


def test_blocks_lie_on_the_grid_and_carry_their_figure():
    frame = pd.DataFrame({"lon": [1.0, 4.0, -13.0, 31.0], "lat": [2.0, 7.0, -1.0, 2.0], "group": list("xxyz")})
    values = pd.Series({"z": np.nan, "y": 1.0, "x": 0.5})
    figure = plots.block_map(frame, values, "mean IoU", degrees=10.0)
    boxes = figure.axes[0].collections[0]
    corners = [path.get_extents().extents.tolist() for path in boxes.get_paths()]
    assert corners == [[0.0, 0.0, 10.0, 10.0], [-20.0, -10.0, -10.0, 0.0], [30.0, 0.0, 40.0, 10.0]]
    assert boxes.get_array().tolist() == [0.5, 1.0, None]  # the third is drawn empty
    assert "mean IoU in the block" in words(figure)


def test_the_map_of_one_place_draws():
    one = places().iloc[:1]
    assert pixels(plots.split_map(one)).std() > 1
    assert pixels(plots.block_map(one, shares(one), "accuracy")).std() > 1


def test_overlay_is_cold_without_evidence_and_warm_with_it():
    image = np.full((2, 2, 3), 128, dtype=np.uint8)
    cold, warm = plots.overlay(image, np.zeros((2, 2))), plots.overlay(image, np.ones((2, 2)))
    assert warm.mean() > cold.mean() + 60
    assert cold.dtype == np.uint8
    np.testing.assert_array_equal(plots.overlay(image, np.ones((2, 2)), strength=0.0), image)


def test_labels_in_words():
    names = ["arid", "cold", "ocean"]
    assert plots.label_words(np.int64(2), names) == "ocean"
    assert plots.label_words(np.array([0.3, 0.0, 0.7]), names) == "ocean 70 % + arid 30 %"
    assert plots.label_words(np.array([0.0, 1.0, 0.0]), names) == "cold"


def test_to_uint8_moves_the_bands_last():
    image = torch.tensor([0.0, 0.5, 2.0])[:, None, None].expand(3, 2, 4).numpy()
    assert plots.to_uint8(image).shape == (2, 4, 3)
    assert plots.to_uint8(image)[0, 0].tolist() == [0, 128, 255]


def test_batch_tiles_show_the_mixed_batch(finished_run):
    data = finished_run.datamodule()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    index = next(i for i in range(50) if data.mix(batch, 0, i)["label"].ndim == 2)
    plain = next(i for i in range(50) if data.mix(batch, 0, i)["label"].ndim == 1)
    mixed, unmixed = (plots.batch_tiles(batch, data, epoch=0, batch_index=i, most=5) for i in (index, plain))
    assert len(mixed) == 5
    assert all(tile.right is None for tile in mixed)
    assert [tile.caption for tile in unmixed] == [data.classes[i] for i in batch["label"][:5].tolist()]
    shown = data.preprocess.denormalize(data.mix(batch, 0, index)["image"][0]).numpy()
    np.testing.assert_array_equal(mixed[0].image, plots.to_uint8(shown))
    assert (finished_run.plots / "batch.png").is_file()


def test_a_caption_breaks_between_words_and_not_behind_a_number():
    tile = plots.Tile(np.zeros((8, 8, 3), np.uint8), "r009c052.tif, of another scene: 0 right, 0 wrong, 3 missed")
    found = words(plots.mosaic([tile], columns=2, cell=2.2))
    assert "r009c052.tif, of another scene:\n0 right, 0 wrong, 3 missed" in found
