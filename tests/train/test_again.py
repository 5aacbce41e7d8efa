import shutil

import pytest
from safetensors.torch import load_file, save_file

from r2kit import cli
from r2kit.run import Run
from r2kit.train import reproduce
from r2kit.train.again import compare_runs, weights_digest

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def test_a_finished_run_is_reproduced_bit_for_bit(finished_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["reproduce", str(finished_run.path), "--out", str(tmp_path / "again")])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "reproduced: the same data gave the same bits" in said
    assert "not reproduced" not in said
    assert "2 epochs, byte for byte" in said
    again = Run.open(tmp_path / "again")
    assert weights_digest(again.weights_file) == weights_digest(finished_run.weights_file)


@pytest.fixture
def copy(finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "copy")
    return Run(tmp_path / "copy")


def found(first, second):
    return {finding.what: finding for finding in compare_runs(first, second)}


def test_what_differs_is_named(finished_run, copy):
    assert all(finding.agrees for finding in compare_runs(finished_run, copy))
    weights = load_file(copy.weights_file)
    name = next(key for key in weights if weights[key].is_floating_point())
    weights[name] += 0.25
    save_file(weights, copy.weights_file)
    copy.metrics_csv.write_text(copy.metrics_csv.read_text().replace("1,", "7,", 1))
    copy.write_info(versions={**copy.info["versions"], "timm": "9.9"}, device="another", data={"fingerprint": "f" * 64})
    copy.write_info(backed_off=[{"at": "epoch 2, batch 1", "batch_size": 4}])
    assert found(copy, copy)["memory"].said == "ran out at epoch 2, batch 1: 4 images a pass since"
    findings = found(finished_run, copy)
    assert not any(finding.agrees for finding in findings.values())
    assert "-> ffffffffffff" in findings["data"].said
    assert findings["versions"].said.endswith("-> 9.9")
    assert "largest difference 0.25" in findings["weights"].said
    assert findings["metrics.csv"].said.startswith("first in epoch")
    assert [name for name, finding in findings.items() if not finding.decides] == ["versions", "device"]


def test_a_run_that_comes_out_otherwise_ends_with_exit_code_one(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("r2kit.train.again.finetune", lambda recipe, out, quiet: finished)
    finished = Run(shutil.copytree(copy.path, tmp_path / "other"))
    finished.metrics_csv.write_text("epoch\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["reproduce", str(copy.path)])
    assert ended.value.code == 1
    assert "not reproduced: metrics.csv differ" in capsys.readouterr().out


def test_what_the_machine_decided_stays(copy, monkeypatch):
    from r2kit.recipe_file import load_recipe, to_yaml

    recipe = load_recipe(copy.recipe.model_dump(mode="json"), ["train.lr=auto", "train.batch_size=auto"])
    copy.recipe_file.write_text(to_yaml(recipe))
    copy.write_info(decided={"batch_size": 4, "accumulate": 8, "lr": 0.0125})
    given = []
    monkeypatch.setattr("r2kit.train.again.finetune", lambda recipe, out, quiet: given.append(recipe) or copy)
    reproduce(copy.path, quiet=True)
    assert (given[0].train.batch_size, given[0].train.accumulate, given[0].train.lr) == (4, 8, 0.0125)
