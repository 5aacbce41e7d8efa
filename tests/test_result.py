"""Figures from stored predictions, and what is said about them."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from r2kit import metrics, result
from r2kit.errors import RunError

CLASSES = ("arid", "cold", "ocean")


def table(count=60, seed=0, blocks=12, skill=0.7):
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 3
    pred = np.where(rng.random(count) < skill, label, rng.integers(0, 3, count))
    probs = np.full((count, 3), 0.2)
    probs[np.arange(count), pred] = 0.6
    names = np.array(CLASSES, dtype=object)
    frame = pd.DataFrame(
        {"id": [f"i{i}" for i in range(count)], "path": "p", "label": names[label], "pred": names[pred]}
    )
    for i, name in enumerate(CLASSES):
        frame[f"prob_{name}"] = probs[:, i]
    frame["group"] = [f"b{i * blocks // count}" for i in range(count)] if blocks else None
    frame["lon"], frame["lat"] = np.linspace(-60, 60, count), np.linspace(-30, 50, count)
    frame["pred_majority"] = "arid"
    frame["pred_logistic"] = names[np.where(rng.random(count) < 0.5, label, 0)]
    return frame


def test_every_figure_follows_from_the_table():
    frame = table()
    found = result.compute(frame, CLASSES, split="test", seed=5)
    right = (frame["label"] == frame["pred"]).to_numpy()
    label, pred = (result.labels(frame, c, CLASSES) for c in ("label", "pred"))
    confusion = metrics.confusion_matrix(label, pred, 3)
    assert found["accuracy"]["value"] == right.mean()
    assert found["accuracy"] == metrics.bootstrap_interval(right, frame["group"], seed=5).to_dict()
    assert found["accuracy"]["units"] == "groups"
    assert found["confusion"] == confusion.tolist()
    assert found["macro_f1"]["value"] == metrics.macro_f1(confusion)
    assert found["calibration_error"]["value"] == pytest.approx(abs(right.mean() - 0.6))
    for i, row in enumerate(found["per_class"]):
        assert row["support"] == 20
        assert row["recall"]["value"] == right[label == i].mean()
    recalls = [row["recall"]["value"] for row in found["per_class"]]
    assert found["worst_classes"] == [CLASSES[i] for i in np.argsort(recalls, kind="stable")]
    pairs = [(p["label"], p["pred"], p["images"]) for p in found["confusion_pairs"]]
    assert pairs == [(CLASSES[a], CLASSES[b], n) for a, b, n in metrics.confusion_pairs(confusion)]
    base = (frame["pred_logistic"] == frame["label"]).to_numpy()
    assert found["baselines"]["majority"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert found["difference"]["logistic"]["value"] == pytest.approx(right.mean() - base.mean())
    json.dumps(found, allow_nan=False)


def test_the_difference_is_paired():
    frame = table(count=300, blocks=0)
    frame["pred_logistic"] = frame["pred"]  # the same answers, right and wrong: no doubt that there is no difference
    frame.loc[:3, "pred_logistic"] = frame.loc[:3, "label"]
    found = result.compute(frame, CLASSES, split="test")
    spread = found["difference"]["logistic"]["high"] - found["difference"]["logistic"]["low"]
    alone = found["accuracy"]["high"] - found["accuracy"]["low"]
    assert spread < alone / 3


def test_a_class_without_images_is_not_known():
    frame = table()
    frame = frame[frame["label"] != "cold"]
    found = result.compute(frame, CLASSES, split="test")
    row = found["per_class"][1]
    assert row["support"] == 0
    assert row["recall"]["value"] is None
    assert "cold" not in found["worst_classes"]
    assert any("No image of 'cold'" in note for note in result.caveats(found))
    json.dumps(found, allow_nan=False)


def test_headline_says_result_interval_and_baselines():
    found = result.compute(table(), CLASSES, split="test")
    sentence = result.headline(found)
    assert sentence.startswith(f"{100 * found['accuracy']['value']:.1f} % of the 60 test images in 12 spatial blocks")
    assert "95 % interval" in sentence
    assert "always answering 'arid' gives 33.3 %" in sentence
    assert "logistic regression" in sentence


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.2, "better than colour alone by 10.0"), (-0.2, -0.01, "worse than"), (-0.1, 0.1, "not shown")],
)
def test_verdict_follows_the_interval(low, high, words):
    value = {0.01: 0.1, -0.2: -0.1, -0.1: 0.0}[low]
    difference = {"value": value, "low": low, "high": high, "level": 0.95}
    assert words in result.verdict({"difference": {"logistic": difference}})
    assert result.verdict({"difference": {}}) is None


def test_caveats_name_what_weakens_the_result():
    found = result.compute(table(blocks=4), CLASSES, split="val")
    notes = " ".join(result.caveats(found))
    assert "also chose the best epoch" in notes
    assert "only 4 groups" in notes
    assert not result.caveats(result.compute(table(), CLASSES, split="test"))


def test_summary_names_the_weak_classes_and_the_baselines():
    lines = result.summary_lines(result.compute(table(), CLASSES, split="test"))
    text = "\n".join(lines)
    assert lines[0].startswith("test accuracy")
    assert text.count("weak class") == 3
    assert "majority class (arid)" in text
    assert "macro F1" in text


def test_nothing_and_little_are_defined():
    empty = result.compute(table().iloc[:0], CLASSES, split="test")
    assert empty["accuracy"]["value"] is None
    assert "not known" in result.headline(empty)
    json.dumps(empty, allow_nan=False)
    one = result.compute(table().iloc[:1], CLASSES, split="test")
    assert math.isfinite(one["accuracy"]["low"])
    json.dumps(one, allow_nan=False)


def test_a_table_of_other_classes_is_refused():
    with pytest.raises(RunError, match="'ocean', which is no class of this run"):
        result.compute(table(), ("arid", "cold"), split="test")
    with pytest.raises(RunError, match="column 'prob_cold' is missing"):
        result.compute(table().drop(columns="prob_cold"), CLASSES, split="test")


def test_calibration_is_fitted_on_validation_and_judged_on_the_rest():
    frame, validation = table(count=300, skill=0.9), table(count=200, seed=1, skill=0.9)
    found = result.calibrate(frame, validation, CLASSES, seed=2)
    # Right in 0.93 of the cases at a stated 0.6: underconfident, so the temperature goes below 1.
    assert found["temperature"] < 0.6
    assert found["calibration_error"][1] < found["calibration_error"][0]
    assert found["log_loss"][1] < found["log_loss"][0]
    assert found["images"] == 200
    for row in found["sets"]:
        assert abs(row["coverage"]["value"] - row["promised"]) < 0.25
        assert row["coverage"]["units"] == "groups"
        assert 1.0 <= row["mean_size"] <= 3.0
    whole = {**result.compute(frame, CLASSES, split="test"), "calibrated": found}
    assert "fitted on 200 validation images" in result.calibrated_lines(whole)[0]
    assert any("promise of label sets" in note for note in result.caveats(whole))
    json.dumps(found, allow_nan=False)


def test_without_validation_images_nothing_is_calibrated():
    whole = {**result.compute(table(), CLASSES, split="test"), "calibrated": {"left_out": "there are none"}}
    assert result.calibrate(table(), "there are none", CLASSES) == {"left_out": "there are none"}
    assert result.calibrated_lines(whole) == []
