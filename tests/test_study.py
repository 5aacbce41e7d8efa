"""One key at a time around a recipe, and networks with blocks of another make."""

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from r2kit import cli, metrics
from r2kit.backbones import create_model
from r2kit.backbones.measure import count_parameters
from r2kit.errors import ModelError, RecipeError
from r2kit.models import build_model
from r2kit.recipe import ModelSpec
from r2kit.recipe_file import load_recipe
from r2kit.study import Point, plot_study, split_values, study

TINY = {"layers": [1, 1, 1], "base_width": 4, "cardinality": 1, "scale": 2}


@pytest.fixture
def tiny_recipe(quick_recipe, monkeypatch):
    """A recipe of a very small CIFAR network; charts are not drawn."""
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **rest: Image.new("RGB", (8, 8)).save(target, "PNG"))
    return {
        **quick_recipe,
        "data": {**quick_recipe["data"], "image_size": 16},
        "model": {"name": "cifar_res2next29_6c24w4s", "block": TINY},
        "train": {"epochs": 1, "batch_size": 8},
    }


def test_each_key_is_varied_around_the_base(tiny_recipe, tmp_path, capsys):
    vary = ["model.block.scale=4", "model.block.layers=[2, 1, 1]"]
    points = study(tiny_recipe, vary, out=tmp_path / "out")
    assert [point.name for point in points] == ["base", "scale-4", "layers-2-1-1"]
    base, scale, layers = points
    for point, change in ((base, {}), (scale, {"scale": 4}), (layers, {"layers": [2, 1, 1]})):
        network = create_model("cifar_res2next29_6c24w4s", num_classes=3, **{**TINY, **change})
        assert point.parameters == count_parameters(network)
    assert base.difference is None
    for point in (scale, layers):
        assert point.difference.value == pytest.approx(point.accuracy.value - base.accuracy.value)
    written = pd.read_csv(tmp_path / "out" / "study.csv")
    assert written["key"].tolist() == ["base", "model.block.scale", "model.block.layers"]
    assert written["macs"].tolist() == [point.macs for point in points]
    assert written["accuracy"].tolist() == pytest.approx([point.accuracy.value for point in points])
    assert (tmp_path / "out" / "study.png").is_file()
    assert "scale-4" in capsys.readouterr().out
    # A second seed: what is finished is kept, and the intervals are over the seeds.
    stamp = (tmp_path / "out" / "scale-4-seed-3" / "model.safetensors").stat().st_mtime_ns
    again = study(tiny_recipe, vary[:1], seeds=2, out=tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "scale-4-seed-3" / "model.safetensors").stat().st_mtime_ns == stamp
    assert (again[1].accuracy.units, again[1].accuracy.n, again[1].difference.n) == ("seeds", 2, 2)


def test_lines_go_through_the_base():
    def point(key, value, accuracy, cost):
        return Point(key, value, metrics.Interval(accuracy, 0, 1, 0.95, "images", 9), None, cost * 10**6, cost, 1.0)

    points = [point("base", "", 0.5, 2), point("a", "9", 0.7, 3), point("a", "1", 0.4, 1), point("b", "x", 0.6, 4)]
    left, right = plot_study(points).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in left.get_lines()}
    assert lines["a"] == ([1, 2, 3], pytest.approx([40, 50, 70]))
    assert lines["b"] == ([2, 4], pytest.approx([50, 60]))
    assert len(right.get_lines()) == 3


def test_values_are_divided_at_commas_outside_brackets():
    assert split_values("1, 2") == ["1", "2"]
    assert split_values("[2, 2],[3,3],x") == ["[2, 2]", "[3,3]", "x"]


@pytest.mark.parametrize(
    ("vary", "error", "message"),
    [
        ([], RecipeError, "nothing is varied"),
        (["model.block.scale"], RecipeError, "written key.path=value,value"),
        (["model.block.scale=2,,4"], RecipeError, "written key.path=value,value"),
        (["model.block.scale=4,4"], RecipeError, "4 comes twice"),
        (["model.block.scale=2"], RecipeError, "the recipe's own value"),
        (["model.block.sclae=2"], RecipeError, "did you mean 'model.block.scale'"),
        (["seed=1,2"], RecipeError, "--seeds gives"),
        (["model.block.layers=[1, 1]"], ModelError, "three stages"),
        (["model.name=resnet18"], ModelError, "has no option 'scale'"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tiny_recipe, tmp_path, vary, error, message):
    with pytest.raises(error, match=message):
        study(tiny_recipe, vary, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_tasks_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "segment_water", "--vary", "train.lr=1e-3"])
    assert ended.value.code == 2
    assert "a study knows classification" in capsys.readouterr().err


def test_blocks_of_a_recipe_reach_the_network():
    bands = ["red", "green", "blue"]
    spec = ModelSpec(name="res2netplus50", block={"layers": [1, 1, 1, 1], "scale": 2, "base_width": 8})
    found = build_model(spec, num_classes=5, bands=bands)
    assert [len(stage) for stage in (found.layer1, found.layer2, found.layer3, found.layer4)] == [1] * 4
    assert found.layer1[0].conv1.out_channels == 16  # 8w x 2s
    with pytest.raises(ModelError, match="no option 'base_width'"):
        build_model(ModelSpec(name="test_vit", block={"base_width": 8}), num_classes=5, bands=bands)
    with pytest.raises(ModelError, match="four stages"):
        build_model(ModelSpec(name="res2netplus50", block={"layers": [1, 1]}), num_classes=5, bands=bands)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=scalenet50", "model.block.scale=2"], "given by its channel table"),
        (["model.warm_start=true", "model.pretrained=true", "model.block.scale=2"], "block by block"),
        (["model.block.layers=[]"], "allowed is a list, each a whole number at least 1 or null"),
    ],
)
def test_blocks_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, overrides)


def test_every_accuracy_stands_with_its_interval():
    def point(key, value, accuracy, low, high, cost):
        interval = metrics.Interval(accuracy, low, high, 0.95, "images", 9)
        return Point(key, value, interval, None, cost * 10**6, cost, 1.0)

    left, _ = plot_study([point("base", "", 0.5, 0.4, 0.6, 2), point("a", "9", 0.7, 0.55, 0.8, 3)]).axes
    upright = sorted(segment[:, 1].tolist() for lines in left.collections for segment in lines.get_segments())
    assert upright == [pytest.approx([40.0, 60.0]), pytest.approx([55.0, 80.0])]
