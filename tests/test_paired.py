"""The headline figure of every kind of task as sums over images: its value, its interval, and the difference of two."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from r2kit import metrics
from r2kit.compare import compare_runs
from r2kit.errors import RunError
from r2kit.recipe_file import load_recipe, to_yaml
from r2kit.result import detection, multilabel, saliency, segmentation
from r2kit.result.paired import FIGURES, difference, interval, judge
from r2kit.run import Run
from tests.objects.test_result import CLASSES as OBJECTS
from tests.objects.test_result import stored

N = 24


def frame(**columns):
    """A table of N images with nothing but `columns`."""
    ids = [f"{i}.png" for i in range(N)]
    return pd.DataFrame({"id": ids, "path": ids, **columns, "group": None, "lon": np.nan, "lat": np.nan})


def confusions(right):
    """(N, 4) counts of two classes in images of 100 pixels whose truth is always the same, a share of `right` hit."""
    truth = np.random.default_rng(5).integers(30, 70, N)
    hit, other = np.round(truth * right).astype(int), np.round((100 - truth) * right).astype(int)
    return [[int(h), int(t - h), int(100 - t - o), int(o)] for t, h, o in zip(truth, hit, other, strict=True)]


def tables(kind, right=0.8, seed=0):
    """A table of predictions of one kind, about `right` of it right; the truth does not depend on the arguments."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(1)
    if kind == "classification":
        label = truth.choice(["a", "b"], N)
        return frame(label=label, pred=np.where(rng.random(N) < right, label, "c")), ("a", "b", "c")
    if kind == "multilabel":
        held = truth.random((N, 2)) < 0.5
        probs = (held * right + rng.random((N, 2))) / 2
        names = [";".join(name for name, has in zip("ab", row, strict=True) if has) for row in held]
        return frame(label=names, pred=names, prob_a=probs[:, 0], prob_b=probs[:, 1]), ("a", "b")
    if kind == "saliency":
        curves = [(right * rng.random(256)).tolist() for _ in range(N)]
        more = dict.fromkeys(("mae", "weighted_f", "s_measure"), 0.5)
        everything = truth.random(N)
        return frame(f_curve=curves, e_curve=curves, f_everything=everything, **more), ("no", "yes")
    if kind == "segmentation":
        boundary = [np.ones(8, int).tolist() for _ in range(N)]
        return frame(confusion=confusions(right), boundary=boundary), ("a", "b")
    return stored(count=N, masks=kind == "instance", seed=3)[0], OBJECTS


def reported(kind, table, classes):
    """The headline figure as `r2kit evaluate` reports it."""
    if kind == "multilabel":
        return multilabel.compute(table, classes, split="test", threshold=0.5)["map"]
    if kind == "saliency":
        return saliency.compute(table, split="test")["max_f"]
    if kind == "segmentation":
        return segmentation.compute(table, classes, split="test", tolerance=2.0)["miou"]
    if kind == "classification":
        return metrics.bootstrap_interval((table["label"] == table["pred"]).to_numpy(float)).to_dict()
    return detection.compute(table, classes, split="test", outlines=kind == "instance")["map"]


@pytest.mark.parametrize("kind", FIGURES)
def test_the_figure_is_the_reported_one(kind):
    table, classes = tables(kind)
    found, told = interval(judge(kind, table, classes)), reported(kind, table, classes)
    assert found.value == pytest.approx(told["value"])
    assert (found.low, found.high) == pytest.approx((told["low"], told["high"]), abs=0.01)


@pytest.mark.parametrize("kind", ["classification", "multilabel", "segmentation", "saliency"])
def test_a_difference_is_that_of_the_figures_and_knows_its_sign(kind):
    better, worse = (judge(kind, *tables(kind, right, seed)) for right, seed in ((0.95, 0), (0.1, 7)))
    found = difference(worse, better)
    assert found.value == pytest.approx(better.value - worse.value)
    assert found.low > 0
    assert difference(better, worse).high < 0


@pytest.mark.parametrize("kind", FIGURES)
def test_a_network_does_not_differ_from_itself_in_any_order(kind):
    one = judge(kind, *tables(kind))
    backwards = one.at(np.arange(len(one.ids))[::-1])
    assert backwards.value == pytest.approx(one.value)
    found = difference(one, backwards.at(np.arange(len(one.ids))[::-1]))
    assert found.value == 0.0
    assert found.low <= 0.0 <= found.high
    assert one.truth.shape == one.ids.shape
    with pytest.raises(ValueError, match="another order"):
        difference(one, backwards)


def test_a_detector_that_misses_objects_differs_by_what_it_loses():
    table, classes = tables("detection")
    some = [f"{i}.png" for i in range(12)]
    missed = table[(table["kind"] != "found") | ~table["id"].isin(some)]  # nothing is found in half of the images
    base, other = judge("detection", table, classes), judge("detection", missed, classes)
    found = difference(base, other)
    assert found.value == pytest.approx(other.value - base.value)
    assert found.low <= found.value <= found.high
    assert found.value < 0


def as_run(finished_run, path, kind, name, table):
    """A copy of the run as if its recipe were of another kind of task and had given these predictions."""
    shutil.copytree(finished_run.path, path)
    data = {"root": "tiles", "masks": {"classes": {"a": 0, "b": 1}}}  # a mapping: recipes of maps have no hash
    recipe = load_recipe({"seed": 3, "task": {"kind": kind}, "model": {"name": name}, "data": data})
    (path / "recipe.yaml").write_text(to_yaml(recipe))
    classes = json.loads((path / "preprocess.json").read_text())
    classes["classes"] = list(table[1])
    (path / "preprocess.json").write_text(json.dumps(classes))
    table[0].to_parquet(path / "predictions_test.parquet")
    history = pd.read_csv(path / "metrics.csv")
    history.rename(columns={"val_acc": "val_miou"}).to_csv(path / "metrics.csv", index=False)
    return Run(path)


def test_runs_of_segmentation_are_compared_by_mean_iou(finished_run, tmp_path):
    base = as_run(finished_run, tmp_path / "base", "segmentation", "resnet18", tables("segmentation", 0.7))
    other = as_run(finished_run, tmp_path / "other", "segmentation", "resnet34", tables("segmentation", 0.9))
    found = compare_runs([base, other], out=tmp_path / "page", speed=False)
    assert found.figure == "mean IoU"
    assert found.images == {3: N}
    assert found.sentences[0].startswith("resnet34 is better than resnet18 by ")
    assert found.entries[0].cost.swing is not None
    assert "mean IoU, 24 held-out images" in (tmp_path / "page" / "compare.html").read_text()
    with pytest.raises(RunError, match="compare runs of one task"):
        compare_runs([base, finished_run], speed=False)
