import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from r2kit.backbones.timm_script import main
from tests.conftest import make_images

SCRIPT = """
import argparse
import timm
import neighbour

parser = argparse.ArgumentParser()
parser.add_argument("--model")
args = parser.parse_args()
if __name__ == "__main__":
    model = timm.create_model(args.model, device="meta", num_classes=neighbour.CLASSES)
    print(type(model).__name__, model.num_classes)
"""


def test_a_script_sees_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("CLASSES = 7\n")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    main([str(tmp_path / "train.py"), "--model", "res2netplus50"])
    assert capsys.readouterr().out == "Res2Net 7\n"


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "name a script"), (["no/train.py"], "no such file: no/train.py")]
)
def test_a_missing_script_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.slow
@pytest.mark.network
def test_timms_own_train_and_validate(timm_scripts: Path, tmp_path: Path) -> None:
    """timm's scripts themselves: an epoch of three steps, and its checkpoint validates as it did in training."""
    for split, per_class in (("train", 4), ("validation", 2)):
        make_images(tmp_path / "data" / split, per_class)

    def run(script: str, *options: str) -> None:
        shared = ["--model", "res2netplus50", "--data-dir", str(tmp_path / "data"), "--num-classes", "3"]
        shared += ["--img-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
        command = [sys.executable, "-m", "r2kit.backbones.timm_script", str(timm_scripts / script), *shared, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    fit = ["--epochs", "1", "--warmup-epochs", "0", "--opt", "sgd", "--lr", "0.001", "--no-aug", "--drop-path", "0.1"]
    run("train.py", *fit, "--grad-checkpointing", "--output", str(tmp_path), "--experiment", "run")
    (epoch,) = csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines())
    assert math.isfinite(float(epoch["train_loss"]))
    checkpoint, results = tmp_path / "run" / "model_best.pth.tar", tmp_path / "results.json"
    run("validate.py", "--checkpoint", str(checkpoint), "--results-file", str(results), "--results-format", "json")
    found = json.loads(results.read_text())
    assert found["model"] == "res2netplus50"
    assert found["top1"] == pytest.approx(float(epoch["eval_top1"]), abs=1e-3)
