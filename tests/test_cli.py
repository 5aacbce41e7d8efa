import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from r2kit import __version__, doctor
from r2kit.cli import main
from r2kit.recipe_file import load_recipe, packaged_recipes


def run(capsys, *arguments):
    """Return (exit code, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "r2kit", "--help"], check=True, capture_output=True)
        after = os.times()
        # Time of the processor, not of the clock: other processes may hold the cores.
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(seconds) < 0.5


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"r2kit {__version__}\n")


def test_every_command_has_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("finetune", "evaluate", "predict", "report", "models", "doctor", "recipe", "data"):
        assert command in out
        assert run(capsys, command, "--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["finetune", "satelite"],
            "error: satelite: is neither a file nor a packaged recipe; did you mean 'satellite'?",
        ),
        (
            ["finetune", "satellite", "train.epoch=3"],
            "error: command line: train.epoch: unknown key; did you mean 'train.epochs'?",
        ),
        (
            ["finetune", "satellite", "train.epochs=many"],
            "error: command line: train.epochs: got many (text), allowed is a whole number at least 1",
        ),
        (["finetune", "satellite", "data.root=no/such/folder"], "no/such/folder"),
        (["finetune", "satellite", "--resume", "yes"], "error: --resume: got 'yes', allowed is auto"),
        (["finetune", "satellite", "--resume", "auto", "--overwrite"], "contradict each other"),
        (["finetune", "satellite", "--resume", "auto"], "--resume auto needs the folder of the run"),
        (["evaluate", "runs/none"], "error: runs/none: no such run folder"),
        (["recipe", "copy", "satelite"], "did you mean 'satellite'?"),
        (["recipe", "check", "no.yaml"], "neither a file nor a packaged recipe"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_unknown_model_names_the_nearest(capsys, quick_recipe, image_folder):
    code, _, err = run(capsys, "finetune", "satellite", f"data.root={image_folder}", "model.name=res2netplus5")
    assert code == 2
    assert "res2netplus50" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", ["empty class", "unreadable image"])
def test_bad_data_is_one_line(capsys, tmp_path, image_folder, kind):
    import shutil

    folder = shutil.copytree(image_folder, tmp_path / "tiles")
    if kind == "empty class":
        (folder / "zzz").mkdir()
        named = "zzz"
    else:
        (folder / "sand" / "003.png").write_bytes(b"\x89PNG broken")
        named = "003.png"
    code, _, err = run(capsys, "finetune", "satellite", f"data.root={folder}", "model.name=test_resnet")
    assert code == 2
    assert named in err
    assert len(err.strip().splitlines()) == 1


def test_unknown_command_and_option_name_the_nearest(capsys):
    code, _, err = run(capsys, "finetun")
    assert (code, "Did you mean 'finetune'" in err) == (2, True)
    code, _, err = run(capsys, "finetune", "satellite", "--overwrit")
    assert (code, "--overwrite" in err) == (2, True)


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(Exception, match="no such run folder"):
        main(["evaluate", "runs/none", "--debug"])


def test_recipe_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "recipe", "copy", "satellite")[0] == 0
    assert Path("satellite.yaml").read_text() == packaged_recipes()["satellite"].read_text()
    assert "exists already" in run(capsys, "recipe", "copy", "satellite")[2]
    assert run(capsys, "recipe", "check", "satellite.yaml", "seed=3")[1] == "satellite.yaml: ok\n"
    _, out, _ = run(capsys, "recipe", "show", "satellite.yaml", "seed=3")
    Path("shown.yaml").write_text(out)
    assert load_recipe("shown.yaml") == load_recipe("satellite", ["seed=3"])
    assert json.loads(run(capsys, "recipe", "schema")[1])["title"] == "r2kit recipe"
    assert run(capsys, "recipe", "new", "fresh.yaml")[0] == 0
    assert run(capsys, "recipe", "check", "fresh.yaml")[0] == 0


def test_models_lists_the_family(capsys):
    code, out, _ = run(capsys, "models", "res2netplus*")
    assert code == 0
    assert "res2netplus50" in out
    assert "25.75" in out
    assert "scalenet50" not in out
    code, _, err = run(capsys, "models", "res2netplus5O")
    assert code == 2
    assert "no network of the family matches 'res2netplus5O'; did you mean 'res2netplus50'?" in err


def test_doctor_names_versions_and_device(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("python ", "torch ", "CPU", "torch.compile", "cache:"):
        assert word in out


def test_doctor_names_every_extra_that_is_missing(monkeypatch):
    file = Path(__file__).parent.parent / "pyproject.toml"
    extras = set(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["optional-dependencies"])
    monkeypatch.setattr(doctor, "_importable", lambda module: False)
    said = [line for line in doctor.examine() if line.startswith("missing: ")]
    assert {line.split('"r2kit[')[1].rstrip(']"') for line in said} == extras - {"all", "dev", "docs"}
    monkeypatch.setattr(doctor, "_importable", lambda module: True)
    assert "every optional part is installed" in list(doctor.examine())


def test_evaluate_and_predict(capsys, finished_run, image_folder, tmp_path):
    code, out, _ = run(capsys, "evaluate", finished_run.path)
    assert code == 0
    assert "95 % interval" in out
    code, out, _ = run(capsys, "predict", finished_run.path, image_folder / "sand", "--out", tmp_path / "found.csv")
    assert code == 0
    table = pd.read_csv(tmp_path / "found.csv")
    assert len(table) == len(pd.read_parquet(tmp_path / "found.parquet")) == 12
    assert {"path", "class", "confidence", "prob_sand", "prob_field", "prob_water"} <= set(table.columns)


def test_data_stats_and_split(capsys, image_folder, tmp_path):
    code, out, _ = run(capsys, "data", "stats", image_folder, "--out", tmp_path / "bands.csv")
    assert code == 0
    assert "percentiles: exact" in out
    assert pd.read_csv(tmp_path / "bands.csv")["band"].tolist() == ["red", "green", "blue"]
    assert run(capsys, "data", "stats", image_folder, "--out", tmp_path / "bands.txt")[0] == 2

    code, out, _ = run(capsys, "data", "split", image_folder, "--folds", 3, "--out", tmp_path / "s.csv", "seed=5")
    assert code == 0
    assert f"data.split_file={tmp_path / 's-2.csv'}" in out
    frame = pd.read_csv(tmp_path / "s-2.csv")
    assert list(frame.columns) == ["id", "path", "split", "fold"]
    assert ((frame["fold"] == 2) == (frame["split"] == "test")).all()
    code, _, err = run(capsys, "data", "split", image_folder, "--by", "grup", "--out", tmp_path / "s.csv")
    assert (code, "did you mean 'group'?" in err) == (2, True)


def test_data_check_is_a_verdict_with_an_exit_code(capsys, image_folder, tmp_path):
    import shutil

    code, out, _ = run(capsys, "data", "check", image_folder, "--out", tmp_path / "fine")
    assert (code, "nothing found that would make" in out) == (0, True)
    assert (tmp_path / "fine" / "check.html").is_file()
    folder = Path(shutil.copytree(image_folder, tmp_path / "tiles"))
    (folder / "sand" / "003.png").write_bytes(b"")
    code, out, _ = run(capsys, "data", "check", folder, "--recipe", "satellite", "--out", tmp_path / "bad")
    assert code == 1
    assert "untrue: files: 1 image(s) cannot be used" in out
    assert run(capsys, "data", "check", folder, "data.on_bad_file=skip", "--out", tmp_path / "bad")[0] == 0
    assert run(capsys, "data", "check", tmp_path / "none")[0] == 2
