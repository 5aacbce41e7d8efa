"""Several labels for each image, from a table to a report."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch.nn import functional as F

import r2kit
from r2kit import metrics
from r2kit.cli import main
from r2kit.data.sources import open_source
from r2kit.data.splits import make_split
from r2kit.errors import DataError, RecipeError
from r2kit.evaluate import evaluate, summary_lines
from r2kit.losses import label_weights, multilabel_loss
from r2kit.predict import predict
from r2kit.recipe import DataSpec
from r2kit.recipe_file import load_recipe
from r2kit.result.multilabel import compute
from r2kit.tasks import multilabel_metrics


@pytest.fixture
def table(several_table):
    return several_table


# ---------------------------------------------------------------------------------------------------------- the table


def test_a_cell_holds_any_number_of_labels(table):
    source = open_source(DataSpec(root=str(table), workers=0), "classes")
    assert source.classes == ("field", "sand")
    assert source.manifest["labels"].iloc[:4].tolist() == [(0, 1), (), (0,), (1,)]
    assert source.manifest["label"].iloc[:4].tolist() == [1, 0, 0, 1]  # the rarest; the most frequent for none
    split = make_split(source.manifest, source.classes, DataSpec(), 0, source.contents)
    assert split.kind == "group"


def test_what_a_table_of_several_labels_may_not_be(tmp_path, table):
    (tmp_path / "twice.csv").write_text("path,label\nx.png,a\nx.png,b\n")
    with pytest.raises(DataError, match=r"listed with the labels a and b; .* separated by ';'"):
        open_source(DataSpec(root=str(tmp_path / "twice.csv")))
    (tmp_path / "empty.csv").write_text("path,label,group\nx.png,,1\n")
    with pytest.raises(DataError, match="every cell of the column label is empty"):
        open_source(DataSpec(root=str(tmp_path / "empty.csv")), "classes")
    with pytest.raises(DataError, match=r"task\.kind=multilabel: source 'folder' gives an image one class; list the"):
        open_source(DataSpec(root=str(tmp_path)), "classes")
    for overrides, message in (
        (["data.root=t.csv", "task.threshold=1.5"], "task.threshold: got 1.5"),
        (["data.root=t.csv", "task.loss=asymmetric", "task.class_weights=effective_number"], "weighs rare labels by"),
        (["data.root=t.csv", "task.loss=focal", "task.label_smoothing=0.1"], "the focal loss has none"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe({"task": {"kind": "multilabel"}}, overrides)


# -------------------------------------------------------------------------------------------------- losses and metrics


def test_losses_against_their_formulas():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    target = (torch.rand(6, 4, generator=generator) < 0.4).double()
    p = logits.sigmoid()
    plain = -(target * p.log() + (1 - target) * (1 - p).log())
    assert multilabel_loss(logits, target).item() == pytest.approx(plain.mean().item())
    truth = torch.where(target > 0, p, 1 - p)
    focal = multilabel_loss(logits, target, "focal", focal_gamma=2.0)
    assert focal.item() == pytest.approx(((1 - truth) ** 2 * plain).mean().item())
    shifted = (p - 0.05).clamp(min=0)
    asymmetric = -(target * p.log() + (1 - target) * shifted**4 * (1 - shifted).log())
    assert multilabel_loss(logits, target, "asymmetric").item() == pytest.approx(asymmetric.mean().item(), rel=1e-5)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    weighted = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    assert multilabel_loss(logits, target, pos_weight=weight).item() == pytest.approx(weighted.item())
    smooth = multilabel_loss(logits, target, label_smoothing=0.2)
    assert smooth.item() == pytest.approx(multilabel_loss(logits, target * 0.8 + 0.1).item())
    with pytest.raises(ValueError, match=r"want \(B, K\)"):
        multilabel_loss(logits, torch.zeros(6, dtype=torch.long))


def test_weights_of_labels():
    counts = [1, 50, 90, 0]
    slow = [sum(0.99**i for i in range(100 - max(n, 1))) / sum(0.99**i for i in range(max(n, 1))) for n in counts]
    np.testing.assert_allclose(label_weights(counts, 100, 0.99).numpy(), slow, rtol=1e-5)
    np.testing.assert_allclose(label_weights([10, 50], 100, 1 - 1e-9).numpy(), [9, 1], rtol=1e-4)


def some(count=200, labels=5, seed=0):
    rng = np.random.default_rng(seed)
    held = rng.random((count, labels)) < [0.5, 0.3, 0.1, 0.05, 0.6]
    probs = np.round(np.clip(held * 0.3 + rng.random((count, labels)) * 0.7, 0, 1), 2)  # rounded: with ties
    return probs, held


def test_metrics_agree_with_scikit_learn():
    probs, held = some()
    each = [metrics.average_precision(p, h)[0] for p, h in zip(probs.T, held.T, strict=True)]
    np.testing.assert_allclose(each, [average_precision_score(h, p) for p, h in zip(probs.T, held.T, strict=True)])
    assert metrics.mean_average_precision(probs, held) == pytest.approx(average_precision_score(held, probs))
    macro, micro = metrics.f1_of_labels(held, probs >= 0.5)
    assert macro == pytest.approx(f1_score(held, probs >= 0.5, average="macro"))
    assert micro == pytest.approx(f1_score(held, probs >= 0.5, average="micro"))

    weight = np.random.default_rng(1).integers(0, 4, (3, 200)).astype(float)
    found = metrics.average_precision(probs[:, 0], held[:, 0], weight)
    want = [average_precision_score(held[:, 0], probs[:, 0], sample_weight=w) for w in weight]
    np.testing.assert_allclose(found, want)
    assert np.isnan(metrics.average_precision(probs[:, 0], np.zeros(200, dtype=bool))[0])


def test_metrics_of_an_epoch_count_an_image_once():
    probs, held = some(23)
    logits, label = torch.logit(torch.from_numpy(probs).clamp(0.001, 0.999)), torch.from_numpy(held).float()
    index = torch.arange(23)
    want = multilabel_metrics(index, logits, label, 0.5)
    assert want["val_map"] == pytest.approx(average_precision_score(held, logits.sigmoid().numpy()))
    padded = torch.cat([torch.randperm(23, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5])])
    assert multilabel_metrics(index[padded], logits[padded], label[padded], 0.5) == want


def test_intervals_hold_the_value_and_shrink_with_images():
    wide, narrow = (metrics.mean_average_precision_interval(*some(count), seed=0) for count in (60, 600))
    for interval in (wide, narrow):
        assert interval.low < interval.value < interval.high
    assert narrow.high - narrow.low < wide.high - wide.low
    probs, held = some(60)
    grouped = metrics.mean_average_precision_interval(probs, held, np.arange(60) // 3)
    assert (grouped.units, grouped.n) == ("groups", 20)


# --------------------------------------------------------------------------------------------------- from end to end


def test_a_run_learns_its_labels(several_run, table):
    run = several_run
    rows = pd.read_csv(run.metrics_csv)
    assert list(rows.columns[-5:]) == ["train_loss", "val_loss", "val_map", "val_f1", "val_f1_micro"]
    result = json.loads(run.metrics_json.read_text())
    stored = pd.read_parquet(run.predictions("test"))
    probs = stored[["prob_field", "prob_sand"]].to_numpy()
    assert (probs.sum(axis=1) != 1).any()  # every label on its own
    source = pd.read_csv(table).set_index("path")["label"].fillna("")
    want = np.array([[name in source[i] for name in ("field", "sand")] for i in stored["id"]])
    assert result["map"]["value"] == pytest.approx(average_precision_score(want, probs))
    assert result["micro_f1"]["value"] == pytest.approx(f1_score(want, probs >= 0.5, average="micro"))
    assert result["threshold"] == 0.5
    assert result["group_word"] == "group"
    assert compute(stored, ("field", "sand"), split="test", threshold=0.5, seed=1, group_word="group") == {
        key: value for key, value in result.items() if key not in ("predictions", "tta")
    }
    assert summary_lines(result)[0].startswith("test mean average precision ")
    page = run.report.read_text()
    assert "A label is given from a probability of 0.5" in page
    assert "Label by label" in page
    assert "No pictures here" not in page


def test_predictions_name_every_label_above_the_threshold(several_run, table, tmp_path):
    found = predict(several_run, [table.parent / "00.png", table.parent / "01.png"], out=tmp_path / "out.csv")
    assert list(found.columns) == ["path", "labels", "confidence", "prob_field", "prob_sand"]
    for row in found.itertuples():
        want = ";".join(n for n, p in (("field", row.prob_field), ("sand", row.prob_sand)) if p >= 0.5)
        assert row.labels == want
    assert (tmp_path / "out.parquet").is_file()


def test_other_data_is_evaluated_with_the_labels_of_the_run(several_run, table):
    again = evaluate(several_run, data=table, split="all")
    assert again["images"] == 60
    assert evaluate(several_run, tta=True)["tta"] is True


def test_rare_labels_weigh_more_and_are_drawn_more_often(several_run, tmp_path, capsys):
    recipe = several_run.recipe.model_dump(mode="json")
    for overrides, said in (
        (["task.class_weights=effective_number"], "class weights in the loss: field 1, sand 2"),
        (["task.loss=asymmetric", "data.sampler=balanced"], "drawn an epoch"),
    ):
        r2kit.finetune(recipe, overrides=[*overrides, "train.epochs=1"], out=tmp_path / said[:5])
        out = " ".join(capsys.readouterr().out.split())
        assert said[:24] in out


def test_check_and_split_from_the_command_line(table, tmp_path, capsys):
    with pytest.raises(SystemExit) as checked:
        main(["data", "check", str(table), "task.kind=multilabel", "-o", str(tmp_path / "check")])
    assert checked.value.code in (None, 0, 1)
    manifest = pd.read_parquet(tmp_path / "check" / "manifest.parquet")
    assert sorted(set(manifest["class"])) == ["", "field", "field;sand", "sand"]
    assert "imbalance" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["data", "split", str(table), "task.kind=multilabel", "-o", str(tmp_path / "split.csv")])
    assert not caught.value.code
    assert set(pd.read_csv(tmp_path / "split.csv")["split"]) == {"train", "val", "test"}
