"""Evaluation of a finished run: what is stored, where every figure comes from, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from r2kit import result
from r2kit.baselines import band_features
from r2kit.errors import DataError, RunError
from r2kit.evaluate import evaluate, summary_lines
from r2kit.inference import Classifier
from r2kit.run import Run
from tests.conftest import make_images


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_predictions_are_the_models_own_on_the_held_out_images(run):
    found = evaluate(run, batch_size=5)
    table = pd.read_parquet(run.predictions("test"))
    data = run.datamodule()
    data.setup()
    batches = list(data.test_dataloader())
    with torch.inference_mode():
        logits = torch.cat([run.model()(batch["image"]) for batch in batches])
    label = torch.cat([batch["label"] for batch in batches]).numpy()
    probs = result.probabilities(table, run.preprocess.classes)
    np.testing.assert_allclose(probs, logits.softmax(1).numpy(), atol=1e-5)
    np.testing.assert_array_equal(result.labels(table, "label", run.preprocess.classes), label)
    assert found["accuracy"]["value"] == (logits.argmax(1).numpy() == label).mean()
    manifest = data.source.manifest.iloc[data.split.test]
    assert table["id"].tolist() == manifest["id"].tolist()
    assert found["split"] == "test"
    assert found["groups"] is None


def test_stored_figures_are_those_of_the_stored_table(run):
    found = evaluate(run)
    assert json.loads(run.metrics_json.read_text()) == found
    again = result.compute(
        pd.read_parquet(run.predictions("test")),
        run.preprocess.classes,
        split="test",
        group_word="group",
        seed=run.recipe.seed,
    )
    assert {key: found[key] for key in again} == again
    assert found["predictions"] == "predictions_test.parquet"
    assert summary_lines(found)[0].startswith("test accuracy")


def test_calibration_comes_from_the_stored_predictions_of_validation(run):
    found = evaluate(run)
    stored = pd.read_parquet(run.predictions("val"))
    assert found["calibrated"] == result.calibrate(
        pd.read_parquet(run.predictions("test")), stored, run.preprocess.classes, seed=run.recipe.seed
    )
    held = pd.read_parquet(run.split_file)
    assert sorted(stored["id"]) == sorted(held["id"][held["split"] == "val"])
    assert "judged on others" in evaluate(run, split="val")["calibrated"]["left_out"]


def test_nothing_depends_on_the_batch_size(run):
    first = evaluate(run, batch_size=1)
    one = pd.read_parquet(run.predictions("test"))
    second = evaluate(run, batch_size=64)
    many = pd.read_parquet(run.predictions("test"))
    pd.testing.assert_frame_equal(one, many, rtol=1e-4, atol=1e-5)
    assert first["confusion"] == second["confusion"]


def test_baselines_learn_from_the_training_images_only(run, monkeypatch):
    seen = {}

    def spy(train, label, features):
        seen.update(train=train, label=label, features=features)
        return np.zeros(len(features), dtype=np.int64)

    monkeypatch.setattr("r2kit.evaluate.classification.logistic_regression", spy)
    found = evaluate(run)
    data = run.datamodule()
    data.setup()
    raw = [band_features(data.source.read(int(row))) for row in data.split.train]
    np.testing.assert_allclose(seen["train"], np.stack(raw))
    np.testing.assert_array_equal(seen["label"], data.labels[data.split.train])
    assert len(seen["features"]) == len(data.split.test)
    share = (data.labels[data.split.test] == 0).mean()
    assert found["baselines"]["logistic"]["accuracy"]["value"] == pytest.approx(share)


def test_another_split_leaves_the_reported_result_alone(run):
    before = run.metrics_json.read_text()
    found = evaluate(run, split="val")
    assert found["split"] == "val"
    assert run.metrics_json.read_text() == before
    assert json.loads((run.path / "metrics_val.json").read_text()) == found
    assert any("chose the best epoch" in note for note in result.caveats(found))


def test_averaging_over_orientations_is_recorded_and_has_files_of_its_own(run):
    before, table = run.metrics_json.read_text(), run.predictions("test").read_bytes()
    plain = evaluate(run)
    found = evaluate(run, tta=True)
    assert (plain["tta"], found["tta"]) == (False, True)
    assert found["predictions"] == "predictions_test_tta.parquet"
    assert json.loads((run.path / "metrics_test_tta.json").read_text()) == found
    assert run.metrics_json.read_text() == before
    assert run.predictions("test").read_bytes() == table
    assert "averaged over eight orientations" in summary_lines(found)[0]
    assert "orientations" not in summary_lines(plain)[0]
    stored = pd.read_parquet(run.predictions("test_tta"))
    data = run.datamodule()
    data.setup()
    images = torch.cat([batch["image"] for batch in data.test_dataloader()])
    expected = Classifier(run.model(), "cpu", tta=True)(images)
    np.testing.assert_allclose(result.probabilities(stored, run.preprocess.classes), expected, atol=1e-5)


def test_another_folder_is_evaluated_with_the_runs_classes(run, tmp_path):
    other = make_images(tmp_path / "elsewhere", 4, size=40, seed=9)
    shutil.rmtree(other / "field")  # the two that are left have other numbers here than in the run
    before = run.metrics_json.read_text()
    found = evaluate(run, data=other)
    table = pd.read_parquet(run.predictions("elsewhere"))
    assert sorted(table["label"]) == ["sand"] * 4 + ["water"] * 4
    assert found["classes"] == ["field", "sand", "water"]
    assert found["accuracy"]["value"] == (table["label"] == table["pred"]).mean()
    assert found["baselines"]["logistic"]["accuracy"]["value"] == 1.0  # colours tell these apart
    assert run.metrics_json.read_text() == before
    assert (run.path / "metrics_elsewhere.json").is_file()


def test_without_the_training_images_other_data_is_evaluated_without_baselines(run, tmp_path, monkeypatch):
    other = make_images(tmp_path / "elsewhere", 3, seed=9)

    def gone(self):
        raise DataError("tiles: no such folder")

    monkeypatch.setattr(Run, "datamodule", gone)
    found = evaluate(run, data=other)
    assert found["baselines"] == {}
    assert any("tiles: no such folder" in note for note in result.caveats(found))


def test_a_folder_named_like_a_split_does_not_replace_the_splits_predictions(run, tmp_path):
    before = run.predictions("test").read_bytes()
    evaluate(run, data=make_images(tmp_path / "test", 2))
    assert run.predictions("test").read_bytes() == before
    assert run.predictions("data_test").is_file()


def test_the_interval_is_over_blocks_where_the_split_is_spatial(run):
    split = pd.read_parquet(run.split_file)
    split["block"] = [f"b{i // 2}" for i in range(len(split))]
    run.write_info(split="blocks")
    split.to_parquet(run.split_file)
    found = evaluate(run)
    table = pd.read_parquet(run.predictions("test"))
    assert found["groups"] == table["group"].nunique()
    block = split.set_index("id")["block"]
    assert table["group"].tolist() == block[table["id"]].tolist()


def test_unknown_class_is_named(run, tmp_path):
    other = make_images(tmp_path / "elsewhere", 2)
    (other / "sand").rename(other / "sands")
    with pytest.raises(DataError, match=r"'sands' is unknown to the run.*did you mean 'sand'"):
        evaluate(run, data=other)


def test_unknown_or_empty_split_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="'tets' is none of auto, train, val, test; did you mean 'test'"):
        evaluate(run, split="tets")
    split = pd.read_parquet(run.split_file)
    split[split["split"] != "test"].to_parquet(run.split_file)
    with pytest.raises(RunError, match="held out no test images; take --split val"):
        evaluate(run, split="test")
    assert evaluate(run)["split"] == "val"  # the reported split of a run without a test
    with pytest.raises(DataError, match="has no split 'val', only all images together"):
        evaluate(run, data=make_images(tmp_path / "elsewhere", 2), split="val")


def test_images_that_the_run_learned_from_are_counted_in_other_data(run, tmp_path):
    held = pd.read_parquet(run.split_file)
    root = Path(run.recipe.data.root)
    other = make_images(tmp_path / "elsewhere", 2, seed=9)
    fresh = evaluate(run, data=other)
    assert fresh["known"] == {"images": 6, "train": 0, "val": 0}
    assert not any("trained on" in line for line in summary_lines(fresh))
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        for i, identity in enumerate(held["id"][held["split"] == part].iloc[:count]):
            shutil.copy(root / identity, other / Path(identity).parts[0] / f"{part}-{i}.png")  # under another name
    found = evaluate(run, data=other)
    assert found["known"] == {"images": 12, "train": 3, "val": 1}
    assert summary_lines(found)[0] == (
        "of these 12 images 3 were trained on by this run and 1 chose its best epoch: the figures are better than on "
        "images that it never saw"
    )
    assert json.loads((run.path / "metrics_elsewhere.json").read_text())["known"] == found["known"]
    assert "known" not in evaluate(run)

    # Runs of before hold no hashes: their images are known by their place.
    held.drop(columns="pixels").to_parquet(run.split_file, index=False)
    assert evaluate(run, data=other)["known"] == {"images": 12, "train": 0, "val": 0}
    counts = held["split"].value_counts()
    assert evaluate(run, data=root)["known"] == {"images": len(held), "train": counts["train"], "val": counts["val"]}


@pytest.mark.parametrize("kind", ["several_run", "pond_run", "salient_run", "detection_run"])
def test_every_kind_of_task_counts_the_images_that_it_learned_from(kind, request, tmp_path):
    shutil.copytree(request.getfixturevalue(kind).path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    counts = pd.read_parquet(run.split_file)["split"].value_counts()
    found = evaluate(run, data=run.recipe.data.root, split="all")
    assert found["known"] == {"images": counts.sum(), "train": counts["train"], "val": counts["val"]}
    assert summary_lines(found)[0].startswith(f"of these {counts.sum()} images {counts['train']} were trained on")
