"""Salient objects: network, losses, measures against pysodmetrics, and a run from recipe to report."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from r2kit.data.targets import IGNORE
from r2kit.dense.saliency import build_saliency, f_curve, measures, saliency_loss
from r2kit.errors import RecipeError
from r2kit.evaluate import evaluate, summary_lines
from r2kit.predict import predict
from r2kit.recipe import ModelSpec, SaliencyLossSpec, SaliencySpec
from r2kit.run import Run
from r2kit.train import dry_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def pair(seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :48]
    truth = (y - 20) ** 2 + (x - rng.integers(15, 33)) ** 2 < rng.integers(40, 150)
    return np.clip(truth * 0.6 + rng.random(truth.shape) * 0.5, 0, 1), truth


def test_measures_are_those_of_pysodmetrics():
    from py_sod_metrics import MAE, Emeasure, FmeasureHandler, FmeasureV2, Smeasure, WeightedFmeasure

    handler = FmeasureHandler(with_dynamic=True, with_adaptive=False, beta=0.3)
    theirs = [MAE(), Smeasure(), WeightedFmeasure(), Emeasure(), FmeasureV2({"fm": handler})]
    ours = []
    for seed in range(4):
        probs, truth = pair(seed)
        ours.append(measures(probs, truth.astype(np.uint8)))
        for measure in theirs:
            measure.step(probs, truth, normalize=False)
    mae, structure, weighted, enhanced, f = (measure.get_results() for measure in theirs)
    assert np.mean([one["mae"] for one in ours]) == pytest.approx(mae["mae"], abs=1e-9)
    assert np.mean([one["s_measure"] for one in ours]) == pytest.approx(structure["sm"])
    assert np.mean([one["weighted_f"] for one in ours]) == pytest.approx(weighted["wfm"])
    assert np.mean([one["e_curve"] for one in ours], axis=0) == pytest.approx(enhanced["em"]["curve"])
    assert np.mean([one["f_curve"] for one in ours], axis=0) == pytest.approx(f["fm"]["dynamic"], abs=1e-6)


def test_the_f_curve_is_that_of_thresholding():
    probs, truth = pair(7)
    curve = f_curve(probs.ravel(), truth.ravel())
    for step in (0, 60, 128, 255):
        found = (probs * 255).astype(np.uint8) >= 255 - step
        precision, recall = (found & truth).sum() / max(found.sum(), 1), (found & truth).sum() / truth.sum()
        wanted = 0.0 if precision + recall == 0 else 1.3 * precision * recall / (0.3 * precision + recall)
        assert curve[step] == pytest.approx(wanted)
    assert (f_curve(probs.ravel(), np.zeros(truth.size, bool)) == 0).all()


def test_losses():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 40, 40), torch.zeros(2, 40, 40, dtype=torch.int64)
    mask[0, 10:30, 10:30] = 1
    mask[1, :20] = IGNORE

    def only(**weights):
        return SaliencyLossSpec(**{"bce": 0.0, "iou": 0.0, **weights})

    p, known = logits[:, 0].sigmoid(), mask != IGNORE
    t = (mask == 1).float()
    bce = -(t * p.log() + (1 - t) * (1 - p).log())
    assert saliency_loss(logits, mask, only(bce=1.0), 0.0).item() == pytest.approx(bce[known].mean().item(), rel=1e-5)
    both, either = (p * t * known).sum((1, 2)), ((p + t - p * t) * known).sum((1, 2))
    iou = (1 - (both + 1) / (either + 1)).mean().item()
    assert saliency_loss(logits, mask, only(iou=1.0), 0.0).item() == pytest.approx(iou, rel=1e-5)
    levels = [saliency_loss(logits[:, [k]], mask, SaliencyLossSpec(), 0.0).item() for k in range(3)]
    deep = saliency_loss(logits, mask, SaliencyLossSpec(), 0.5).item()
    assert deep == pytest.approx(levels[0] + 0.5 * (levels[1] + levels[2]), rel=1e-5)
    # Near a boundary a pixel counts more: an error there costs more than one far away.
    base = torch.where(t > 0, 4.0, -4.0)[:, None]
    near, far = base.clone(), base.clone()
    near[0, 0, 20, 31], far[0, 0, 2, 2] = 4.0, 4.0
    costs = [saliency_loss(one, mask, only(structure=1.0), 0.0).item() for one in (near, far)]
    assert costs[0] > costs[1]
    empty = saliency_loss(logits.requires_grad_(), torch.full_like(mask, IGNORE), only(structure=1.0, bce=1.0), 0.5)
    empty.backward()
    assert empty.item() == 0.0
    assert (logits.grad == 0).all()


def test_the_network_is_supervised_at_every_level_and_answers_with_the_finest():
    torch.manual_seed(0)
    model = build_saliency(ModelSpec(name="test_resnet"), SaliencySpec(width=16), in_chans=4)
    image = torch.randn(2, 4, 50, 70)
    logits = model(image)
    assert logits.shape == (2, 5, 50, 70)
    saliency_loss(logits, torch.randint(0, 2, (2, 50, 70)), SaliencyLossSpec(structure=1.0), 0.5).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    found = model(image)
    assert found.shape == (2, 2, 50, 70)
    assert (found[:, 0] == 0).all()
    assert torch.allclose(found.softmax(1)[:, 1], found[:, 1].sigmoid(), atol=1e-6)


def test_from_recipe_to_report(salient_run, mask_folder, tmp_path):
    run = Run.open(shutil.copytree(salient_run.path, tmp_path / "run"))  # evaluated again below
    result = json.loads(run.metrics_json.read_text())
    assert result["task"] == "saliency"
    for figure in ("max_f", "weighted_f", "s_measure", "max_e", "mae"):
        assert 0 <= result[figure]["low"] <= result[figure]["value"] <= result[figure]["high"] <= 1
    assert run.metrics_csv.read_text().splitlines()[0] == "epoch,step,lr,train_loss,val_loss,val_mae,val_max_f"
    assert "largest F-measure" in summary_lines(result)[0]
    assert run.report.read_text(encoding="utf-8").count("data:image/jpeg") >= 3
    assert "averaged over eight" in summary_lines(evaluate(run, split="val", tta=True))[0]
    table = predict(run, mask_folder / "images" / "0.png", out=tmp_path / "out")
    picture = Image.open(table["mask"][0])
    assert picture.mode == "L"
    assert picture.size == (40, 40)
    assert np.asarray(picture).max() > np.asarray(picture).min()


def test_masks_of_three_classes_are_refused(salient_recipe):
    overrides = ["data.masks={classes: {a: 0, b: 255, c: 3}}"]
    with pytest.raises(RecipeError, match=r"needs masks of two classes, .* there are 3 \(a, b, c\)"):
        dry_run(salient_recipe, overrides=overrides, quiet=True)
