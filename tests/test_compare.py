"""Runs side by side: what is paired, what is said, what is refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from r2kit import cli
from r2kit.compare import compare_models, compare_runs, seeds_interval
from r2kit.errors import ModelError, RunError
from r2kit.result.paired import FIGURES
from r2kit.run import Run


def variant(finished_run, path, *, name="test_resnet", seed=3, right=None):
    """A copy of the run as if another network or seed had given the answers `right` (a share, or None to keep)."""
    shutil.copytree(finished_run.path, path)
    text = (path / "recipe.yaml").read_text()
    assert "name: test_resnet" in text
    (path / "recipe.yaml").write_text(
        text.replace("name: test_resnet", f"name: {name}").replace("seed: 3", f"seed: {seed}")
    )
    if right is not None:
        stored = pd.read_parquet(path / "predictions_test.parquet")
        stored = pd.concat([stored.assign(id=stored["id"] + f"-{copy}") for copy in range(20)], ignore_index=True)
        wrong = np.arange(len(stored)) >= round(right * len(stored))
        other = {"field": "sand", "sand": "water", "water": "field"}
        stored["pred"] = np.where(wrong, stored["label"].map(other), stored["label"])
        stored.to_parquet(path / "predictions_test.parquet")
    return Run(path)


def test_the_difference_is_paired_image_by_image(finished_run, tmp_path):
    base = variant(finished_run, tmp_path / "base", right=0.6)
    better = variant(finished_run, tmp_path / "better", name="test_resnet2", right=0.8)
    found = compare_runs([base, better], out=tmp_path / "out", speed=False)
    assert [entry.name for entry in found.entries] == ["test_resnet", "test_resnet2"]
    difference = found.differences[0]
    assert difference.interval.value == pytest.approx(0.2, abs=0.01)
    # All that one gets wrong the other gets wrong too: pairing leaves a fifth of the images to vary.
    assert difference.interval.high - difference.interval.low < 0.17
    assert found.sentences[0].startswith("test_resnet2 is better than test_resnet by 20.0 points")
    assert "not shown" not in found.sentences[0]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert found.sentences[0] in page
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["differences"][0]["name"] == "test_resnet2"


def test_a_difference_that_is_not_shown_says_so(finished_run, tmp_path):
    base = variant(finished_run, tmp_path / "base", right=0.600)
    near = variant(finished_run, tmp_path / "near", name="test_resnet2", right=0.605)
    sentence = compare_runs([base, near], speed=False).sentences[0]
    assert sentence.endswith(": not shown.")


def test_several_seeds_give_an_interval_over_seeds(finished_run, tmp_path):
    runs = []
    for seed, (a, b) in enumerate([(0.60, 0.66), (0.70, 0.74), (0.50, 0.55)]):
        runs.append(variant(finished_run, tmp_path / f"a{seed}", seed=seed, right=a))
        runs.append(variant(finished_run, tmp_path / f"b{seed}", name="other", seed=seed, right=b))
    found = compare_runs(runs, speed=False)
    assert found.entries[0].seeds == (0, 1, 2)
    by_seed = np.array(found.differences[0].by_seed)
    interval = found.differences[0].interval
    assert interval.units == "seeds"
    assert interval.value == pytest.approx(by_seed.mean())
    half = 4.302653 * by_seed.std(ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
    assert interval.high - interval.value == pytest.approx(half, rel=1e-4)


def test_equal_seeds_promise_nothing():
    found = seeds_interval(np.array([0.5, 0.5]), bounds=(0.0, 1.0))
    assert "nothing can be said" in (found.reason or "")


def test_runs_of_one_network_are_told_apart_by_their_folders(finished_run, tmp_path):
    a, b = (variant(finished_run, tmp_path / name, right=0.5) for name in ("first", "second"))
    found = compare_runs([a, b])
    assert [entry.name for entry in found.entries] == ["first", "second"]
    assert all(entry.cost.images_per_second > 0 for entry in found.entries)
    assert found.entries[0].cost.parameters == finished_run.info["model"]["parameters"]
    assert found.entries[0].cost.swing is not None


def test_what_cannot_be_paired_is_refused(finished_run, tmp_path):
    base = variant(finished_run, tmp_path / "base", right=0.6)
    with pytest.raises(RunError, match="two runs at least"):
        compare_runs([base])
    with pytest.raises(RunError, match="held out different images"):
        compare_runs([base, variant(finished_run, tmp_path / "few", name="other")], speed=False)
    with pytest.raises(RunError, match="different seeds"):
        compare_runs([base, variant(finished_run, tmp_path / "seed", name="other", seed=4, right=0.5)], speed=False)
    bare = variant(finished_run, tmp_path / "bare", name="other")
    bare.metrics_json.unlink()
    with pytest.raises(RunError, match="r2kit evaluate"):
        compare_runs([base, bare], speed=False)
    changed = variant(finished_run, tmp_path / "changed", name="other", right=0.6)
    stored = pd.read_parquet(changed.predictions("test"))
    stored.assign(label="sand").to_parquet(changed.predictions("test"))
    with pytest.raises(RunError, match="different labels"):
        compare_runs([base, changed], speed=False)


def test_the_whole_comparison_from_a_recipe(quick_recipe, tmp_path, capsys):
    recipe = {**quick_recipe, "train": {**quick_recipe["train"], "epochs": 1}}
    found = compare_models(recipe, ["test_resnet", "test_vit"], seeds=2, out=tmp_path / "out", quiet=True)
    assert [entry.seeds for entry in found.entries] == [(3, 4), (3, 4)]
    assert (tmp_path / "out" / "test_vit-seed-4" / "report.html").is_file()
    stamp = (tmp_path / "out" / "test_vit-seed-4" / "model.safetensors").stat().st_mtime_ns
    compare_models(recipe, ["test_resnet", "test_vit"], seeds=2, out=tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "test_vit-seed-4" / "model.safetensors").stat().st_mtime_ns == stamp
    runs = [str(tmp_path / "out" / f"{name}-seed-3") for name in ("test_resnet", "test_vit")]
    with pytest.raises(SystemExit):
        cli.main(["compare", *runs, "--out", str(tmp_path / "page")])
    said = capsys.readouterr().out
    assert "test_vit is" in said
    assert (tmp_path / "page" / "compare.html").is_file()


def test_a_network_that_does_not_exist_is_named_before_any_other_is_trained(quick_recipe, tmp_path):
    with pytest.raises(ModelError, match="unknown model 'test_resnett'; did you mean 'test_resnet'"):
        compare_models(quick_recipe, ["test_resnet", "test_resnett"], seeds=2, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fixture", ["finished_run", "several_run", "pond_run", "salient_run", "detection_run", "instance"]
)
def test_every_kind_is_compared_from_its_recipe(request, fixture, tmp_path, capsys):
    overrides, base = [], fixture
    if fixture == "instance":
        base = "detection_run"
        boxes = request.getfixturevalue("objects_folder") / "boxes.json"
        overrides = ["task.kind=instance", "task.model=mask_rcnn", f"data.root={boxes}", "task.regions=16"]
        overrides += ["task.width=16", "data.image_size=48"]
    recipe = request.getfixturevalue(base).recipe_file
    command = ["compare", "--recipe", str(recipe), "--models", "test_resnet,test_efficientnet", "--seeds", "2"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, *overrides, "train.epochs=1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    kind = "instance" if fixture == "instance" else Run.open(recipe.parent).recipe.task.kind
    assert found["figure"] == FIGURES[kind]
    assert [entry["name"] for entry in found["entries"]] == ["test_resnet", "test_efficientnet"]
    assert all(len(entry["by_seed"]) == 2 and entry["cost"]["images_per_second"] > 0 for entry in found["entries"])
    assert "test_efficientnet is" in " ".join(said.out.split())
    assert found["sentences"][0] in (tmp_path / "out" / "compare.html").read_text()


def test_the_command_line_refuses_contradictions(tmp_path, capsys):
    for arguments, message in (
        (["a", "--recipe", "satellite"], "not both"),
        (["--models", "a,b"], "need --recipe"),
        (["--recipe", "satellite", "--models", "resnet50"], "two different names"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["compare", *arguments])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
