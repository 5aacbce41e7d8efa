"""Exports agree with PyTorch, describe themselves, and are used without torch; one that differs is not kept."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import r2kit
from r2kit import cli, export
from r2kit.data.preprocess import Preprocess
from r2kit.errors import MissingExtraError, RunError
from r2kit.export import formats
from r2kit.export.accuracy import Loss, measure_losses
from r2kit.export.network import Deployed, any_size, fold_batch_norm, trace
from r2kit.predict import predict
from r2kit.result.paired import judge, stored_predictions
from r2kit.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters deprecate parts of themselves in every release

PRE = Preprocess(
    ("red", "green", "blue"), (0.4,) * 3, (0.2,) * 3, 255.0, (64, 96), "squash", "bilinear", ("a", "b", "c")
)

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "onnx_runtime.py"

# The example in a process in which torch cannot be imported.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    out = tmp_path_factory.mktemp("export")
    made = export.export(finished_run, ["onnx", "torch-export"], ["fp32", "fp16"], out=out)
    made += export.export(finished_run, ["onnx"], ["int8"], out=out)
    return out, made + export.export(finished_run, ["openvino", "onnx"], out=out)


def test_every_format_agrees_on_real_images_and_other_sizes(exported):
    out, made = exported
    assert {(one.format, one.precision) for one in made} >= {
        (form, precision) for form in ("onnx", "torch-export") for precision in ("fp32", "fp16")
    }
    for one in made:
        assert (out / one.file).is_file()
        assert one.difference <= export.TOLERANCE.get(one.precision, 0.5)
        assert one.megabytes > 0.1
        assert set(one.milliseconds) == {1, 8}
    about = json.loads((out / "export.json").read_text())
    assert about["classes"] == ["field", "sand", "water"]
    assert about["exports"][0]["format"] == "openvino"
    assert about["batch_norm"]["folded"] > 0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_less_precision_is_smaller_and_says_what_it_loses(exported, finished_run):
    _, made = exported
    by = {(one.format, one.precision): one for one in made}
    for form in ("onnx", "torch-export"):
        assert by[form, "fp16"].megabytes < 0.7 * by[form, "fp32"].megabytes
        assert 0 < by[form, "fp16"].difference < 0.02
        assert by[form, "fp32"].loss is None
    assert by["onnx", "int8"].megabytes < 0.6 * by["onnx", "fp32"].megabytes
    result = json.loads(finished_run.metrics_json.read_text())
    for one in made:
        if one.precision != "fp32":
            assert one.loss.figure == "accuracy"
            assert (one.loss.split, one.loss.images) == (result["split"], result["images"])
            assert one.loss.pytorch == pytest.approx(result["accuracy"]["value"])
            assert one.loss.low <= one.loss.value <= one.loss.high
            assert "points" in one.loss.words()


def test_batch_norm_is_folded_where_it_follows_a_convolution():
    import torch

    shape = (3, 64, 64)
    small = {"num_classes": 3, "layers": (1, 2, 1, 1), "channels": (8, 8, 8, 8)}
    x = torch.randn(2, *shape)
    for name, left in (("res2net50d", False), ("res2netplus50", True)):
        net = r2kit.create_model(name, **small).eval()
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(norm.running_mean, -1, 1)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        count = sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
        folded, done, rest = fold_batch_norm(net, shape)
        assert done + rest == count
        assert done >= 5  # at least the last of each of the five units
        assert (rest > 0) == left
        assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules()) == rest
        with torch.no_grad():
            torch.testing.assert_close(folded(x), net(x), atol=1e-4, rtol=1e-4)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_one_program_takes_any_batch_and_size():
    import torch

    net = Deployed(
        r2kit.create_model("res2netplus50", num_classes=3, layers=(1, 2, 1, 1), channels=(8, 8, 8, 8)), PRE
    ).eval()
    program = trace(net, np.zeros((1, 3, 64, 96), np.float32))
    assert any_size(program)
    for shape in ((1, 3, 96, 64), (5, 3, 64, 128)):
        x = torch.rand(shape) * 255
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), net(x), atol=1e-5, rtol=1e-4)
    assert not any_size(trace(net, np.zeros((1, 3, 32, 32), np.float32)))


def test_the_golden_pair_is_what_the_run_says_of_raw_images(exported, finished_run):
    import torch

    out, _ = exported
    pixels, expected = np.load(out / "golden_input.npy"), np.load(out / "golden_output.npy")
    assert pixels.max() > 100  # raw, not normalised
    with torch.inference_mode():
        logits = finished_run.model()(finished_run.preprocess.normalize(torch.from_numpy(pixels)))
    np.testing.assert_allclose(expected, logits.softmax(1).numpy(), atol=1e-5)


def test_onnx_runs_without_torch(exported, finished_run, image_folder):
    out, _ = exported
    image = next((image_folder / "water").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(EXAMPLE), str(out), str(image)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "golden pair: differs by" in done.stdout
    row = predict(finished_run, image).iloc[0]
    assert done.stdout.split()[-2] == row["class"]
    assert float(done.stdout.split()[-1]) == pytest.approx(
        row["confidence"], abs=0.02
    )  # Pillow resizes to whole values


@pytest.mark.parametrize("wrong", [0.5, np.nan])
def test_an_export_that_differs_is_not_kept(finished_run, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(
        formats, "to_torch_export", lambda program, file, facts: lambda pixels: np.full((len(pixels), 3), wrong)
    )
    with pytest.raises(RunError, match="differs from PyTorch by"):
        export.export(finished_run, ["torch-export"], out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_that_loses_too_much_is_not_kept(finished_run, tmp_path, monkeypatch):
    lost = Loss("accuracy", "test", 600, 0.9, -0.2, -0.25, -0.15)
    monkeypatch.setattr(export, "measure_losses", lambda run, module, plain, answers: dict.fromkeys(answers, lost))
    with pytest.raises(RunError, match=r"model_fp16.pt2 loses -20.0 points \(-25.0 to -15.0\) of accuracy on 600 test"):
        export.export(finished_run, ["torch-export"], ["fp16"], out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_exported_is_refused(finished_run, monkeypatch):
    for to, precisions, message in (
        (["onx"], ["fp32"], "did you mean 'onnx'"),
        (["onnx"], ["fp61"], "did you mean 'fp16'"),
        (["torch-export"], ["int8"], "torch-export has no int8 here, only fp32, fp16"),
    ):
        with pytest.raises(RunError, match=message):
            export.export(finished_run, to, precisions)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    monkeypatch.setattr(formats, "require", missing)
    with pytest.raises(MissingExtraError, match="pip install coremltools"):
        export.export(finished_run, ["coreml"])


def missing(module, package, extra, purpose):
    raise MissingExtraError(package, extra, purpose)


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
    monkeypatch.setattr(formats, "require", missing)
    with pytest.raises(MissingExtraError, match=r"r2kit\[export\]"):
        export.export(finished_run, ["onnx"])


@pytest.mark.parametrize("kind", ["pond_run", "salient_run", "finished_run"])
def test_what_an_export_loses_is_measured_as_the_run_was_evaluated(kind, request):
    run = request.getfixturevalue(kind)
    module = run.datamodule()
    module.setup()
    plain = export._plain(Deployed(run.model(), run.preprocess).eval())
    half = measure_losses(run, module, plain, {"same": plain, "flat": lambda pixels: 0 * plain(pixels) + 0.5})
    stored = judge(run.recipe.task.kind, stored_predictions(run), run.preprocess.classes)
    assert half["same"].value == 0.0
    # Whole images, in the tiles and with the overlap of the evaluation; rounding may turn a pixel.
    assert half["same"].pytorch == pytest.approx(stored.value, abs=2e-3)
    assert half["flat"].value < 0.0
