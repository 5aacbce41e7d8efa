"""Exports agree with PyTorch, describe themselves, and are used without torch; one that differs is not kept."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import r2kit
from r2kit import cli, export
from r2kit.data.preprocess import Preprocess
from r2kit.errors import MissingExtraError, RunError
from r2kit.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters deprecate parts of themselves in every release

PRE = Preprocess(
    ("red", "green", "blue"), (0.4,) * 3, (0.2,) * 3, 255.0, (64, 96), "squash", "bilinear", ("a", "b", "c")
)

# What a person without torch writes, from export.json alone.
WITHOUT_TORCH = """
import json, sys
import numpy as np, onnxruntime
folder = sys.argv[1]
about = json.load(open(f"{folder}/export.json"))
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
pixels, expected = np.load(f"{folder}/golden_input.npy"), np.load(f"{folder}/golden_output.npy")
probabilities = session.run(None, {"pixels": pixels})[0]
assert np.abs(probabilities - expected).max() <= about["tolerance"]
props = session.get_modelmeta().custom_metadata_map
assert json.loads(props["r2kit.classes"]) == about["classes"]
print(about["classes"][int(probabilities[0].argmax())])
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    out = tmp_path_factory.mktemp("export")
    return out, export.export(finished_run, list(export.FORMATS), out=out)


def test_every_format_agrees_on_real_images_and_other_sizes(exported):
    out, made = exported
    assert [one.format for one in made] == list(export.FORMATS)
    for one in made:
        assert (out / one.file).is_file()
        assert one.difference <= export.TOLERANCE
        assert one.megabytes > 0.1
        assert set(one.milliseconds) == {1, 8}
    about = json.loads((out / "export.json").read_text())
    assert about["classes"] == ["field", "sand", "water"]
    assert about["exports"][0]["format"] == "onnx"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_one_program_takes_any_batch_and_size():
    import torch

    net = export.Deployed(
        r2kit.create_model("res2netplus50", num_classes=3, layers=(1, 2, 1, 1), channels=(8, 8, 8, 8)), PRE
    ).eval()
    program = export._program(net, np.zeros((1, 3, 64, 96), np.float32))
    assert export._any_size(program)
    for shape in ((1, 3, 96, 64), (5, 3, 64, 128)):
        x = torch.rand(shape) * 255
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), net(x), atol=1e-5, rtol=1e-4)
    assert not export._any_size(export._program(net, np.zeros((1, 3, 32, 32), np.float32)))


def test_the_golden_pair_is_what_the_run_says_of_raw_images(exported, finished_run):
    import torch

    out, _ = exported
    pixels, expected = np.load(out / "golden_input.npy"), np.load(out / "golden_output.npy")
    assert pixels.max() > 100  # raw, not normalised
    with torch.inference_mode():
        logits = finished_run.model()(finished_run.preprocess.normalize(torch.from_numpy(pixels)))
    np.testing.assert_allclose(expected, logits.softmax(1).numpy(), atol=1e-5)


def test_onnx_runs_without_torch(exported):
    out, _ = exported
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("field", "sand", "water")


def test_an_export_that_differs_is_not_kept(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export, "_to_torch_export", lambda program, file, run: lambda pixels: np.zeros((len(pixels), 3))
    )
    with pytest.raises(RunError, match="differs from PyTorch by 0"):
        export.export(finished_run, ["torch-export"], out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_line(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run.path, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tmp_path / "run"), "--to", "torch-export"])
    assert ended.value.code == 0
    assert "largest difference" in capsys.readouterr().out
    assert (Run(tmp_path / "run").path / "export" / "model.pt2").is_file()
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tmp_path / "run"), "--to", "onx"])
    assert ended.value.code == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err


def test_a_missing_package_is_named_before_any_work(finished_run, monkeypatch):
    def missing(module, package, extra, purpose):
        raise MissingExtraError(package, extra, purpose)

    monkeypatch.setattr(export, "require", missing)
    with pytest.raises(MissingExtraError, match=r"r2kit\[export\]"):
        export.export(finished_run, ["onnx"])
