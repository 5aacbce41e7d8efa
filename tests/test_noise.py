import numpy as np
import pandas as pd
import pytest

import r2kit
from r2kit.cli import main
from r2kit.errors import RunError
from r2kit.noise import rank_labels, rank_noise


def planted(count=300, classes=4, wrong=15, seed=0):
    """Probabilities of a network that is right nine times in ten, and labels of which the first ones are false."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, count)
    logits = rng.normal(0, 0.7, (count, classes))
    logits[np.arange(count), truth] += 3.0
    label = truth.copy()
    label[:wrong] = (truth[:wrong] + 1 + rng.integers(0, classes - 1, wrong)) % classes
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), label, truth


def test_planted_wrong_labels_come_first_and_the_truth_is_suggested():
    probs, label, truth = planted()
    scored = rank_labels(probs, label)
    first = scored["self_confidence"].argsort()[:15]
    assert len(set(first) & set(range(15))) >= 14
    assert (scored["suggested"][:15] == truth[:15]).mean() > 0.9
    assert scored["issue"][:15].mean() >= 0.75  # the rule is careful: a class's mean confidence must be reached
    assert scored["issue"][15:].mean() < 0.05


def test_scores_against_their_formulas():
    probs = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4], [0.6, 0.3, 0.1]])
    label = np.array([0, 1, 2, 1])
    scored = rank_labels(probs, label)
    np.testing.assert_allclose(scored["self_confidence"], [0.7, 0.8, 0.4, 0.3])
    np.testing.assert_allclose(scored["normalised_margin"], [0.75, 0.85, 0.45, 0.35])
    # Mean confidences are 0.7, 0.55 and 0.4: only the second reaches that of another class, its own, and none else.
    assert scored["issue"].tolist() == [False, False, False, False]
    assert scored["suggested"].tolist() == [1, 0, 0, 0]
    label[0] = 1  # now class 0 has no image, and attracts none
    assert not rank_labels(probs, label)["issue"][0]


def test_runs_are_ranked_and_written(finished_run, quick_recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", "noise", str(finished_run.path), "-o", str(tmp_path / "noise")])
    assert not caught.value.code
    assert "test images look more like another class" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "noise" / "noise.csv")
    stored = pd.read_parquet(finished_run.predictions("test"))
    assert set(table["id"]) == set(stored["id"])
    assert table["rank"].tolist() == list(range(1, len(stored) + 1))
    own = stored.apply(lambda row: row[f"prob_{row['label']}"], axis=1)
    assert sorted(table["self_confidence"]) == pytest.approx(sorted(own))
    assert "Labels that are likely wrong" in (tmp_path / "noise" / "noise.html").read_text()
    with pytest.raises(RunError, match="was tested by two of the runs"):
        rank_noise([finished_run, finished_run], tmp_path / "twice")


def test_a_run_without_test_images_is_no_judge(quick_recipe, tmp_path):
    run = r2kit.finetune(
        quick_recipe, overrides=["data.test_fraction=0.0", "train.epochs=1"], out=tmp_path / "val", quiet=True
    )
    with pytest.raises(RunError, match="no predictions of test images"):
        rank_noise([run], tmp_path / "noise")
