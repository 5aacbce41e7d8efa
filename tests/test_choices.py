"""What a recipe leaves to the machine, each with its reason, and what a run that goes on keeps of it."""

import csv
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import r2kit
from r2kit.errors import MissingExtraError, ModelError, RecipeError
from r2kit.recipe import Recipe, TrainSpec
from r2kit.train import prepare
from r2kit.train.choices import Batch, choose_compile, choose_tf32, fitting_batch

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]
CPU = torch.device("cpu")


def room_for(most, tried):
    def attempt(images):
        tried.append(images)
        if images > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return f"measured with {images}"

    return attempt


def test_the_batch_is_halved_until_it_fits_and_the_step_keeps_its_images():
    tried = []
    found = fitting_batch(TrainSpec(batch_size="auto", accumulate=4), room_for(40, tried))
    assert tried == [128, 64, 32]
    assert found == (Batch(32, 4), "measured with 32")
    assert fitting_batch(TrainSpec(batch_size="auto"), room_for(99, tried))[0] == Batch(32, 1)


def test_what_was_decided_stays():
    tried = []
    assert fitting_batch(TrainSpec(batch_size="auto"), room_for(99, tried), Batch(8, 4))[0] == Batch(8, 4)
    assert tried == [8]


def test_memory_that_never_suffices_is_one_line():
    with pytest.raises(ModelError, match=r"train\.batch_size: auto: a training step with 2 images is out of memory"):
        fitting_batch(TrainSpec(batch_size="auto"), room_for(1, []))
    with pytest.raises(ModelError, match=r"with 32 images is out of memory; give less .* or train\.batch_size=auto"):
        fitting_batch(TrainSpec(), room_for(1, []))

    def broken(images):
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        fitting_batch(TrainSpec(batch_size="auto"), broken)


def test_a_run_backs_off_says_so_and_finds_a_rate(quick_recipe, tmp_path, monkeypatch, capsys):
    measure = prepare.measure_throughput

    def small(model, shape, images, **options):
        if images > 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return measure(model, shape, images, **options)

    monkeypatch.setattr(prepare, "measure_throughput", small)
    overrides = ["train.batch_size=auto", "train.lr=auto", "train.epochs=2"]
    run = r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "run")
    said = capsys.readouterr().out
    assert "batch: 4 x 8 images a step (more did not fit into memory; a step still sees 32 images" in said
    decided = run.info["decided"]
    assert decided["batch_size"] == 8
    assert decided["accumulate"] == 4
    assert 1e-6 <= decided["lr"] <= 0.1
    assert f"learning rate: {decided['lr']:g} (a tenth of that of the lowest loss)" in said
    assert (run.plots / "lr_finder.png").is_file()
    assert [row["step"] for row in csv.DictReader(run.metrics_csv.read_text().splitlines())] == ["1", "2"]

    # What was decided is used, not decided anew: with the same values written out the run is the same.
    same = [f"train.lr={decided['lr']}", "train.batch_size=8", "train.accumulate=4", "train.epochs=2"]
    again = r2kit.finetune(quick_recipe, overrides=same, out=tmp_path / "again", quiet=True)
    first, second = load_file(run.weights_file), load_file(again.weights_file)
    assert all(torch.equal(first[key], second[key]) for key in first)

    def must_not(*arguments):
        raise AssertionError("the rate was looked for again")

    monkeypatch.setattr(prepare, "find_lr", must_not)
    kept = prepare.prepare(run.recipe, r2kit.console.make_console(quiet=True), decided)
    assert kept.task.lr == decided["lr"]
    assert kept.batch == Batch(8, 4)


def test_a_trial_of_rates_without_memory_is_one_line(quick_recipe, tmp_path, monkeypatch):
    def lacks(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(prepare, "find_lr", lacks)
    with pytest.raises(ModelError, match=r"train\.lr: auto: its trial with 8 images is out of memory; give train\.lr="):
        r2kit.finetune(quick_recipe, overrides=["train.lr=auto"], out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_compile_and_tf32():
    assert choose_compile(Recipe(), CPU) == (False, "compiling whole networks gained nothing on a CPU (measured)")
    assert choose_compile(Recipe(), torch.device("cuda"))[0]
    growing = Recipe.model_validate({"train": {"progressive_size": [0.5]}})
    assert not choose_compile(growing, torch.device("cuda"))[0]
    assert choose_compile(Recipe.model_validate({"train": {"compile": True}}), CPU)[0]
    assert choose_tf32(TrainSpec(), CPU) == (False, "the device has none")
    with pytest.raises(RecipeError, match=r"train\.tf32: this device has no TF32"):
        choose_tf32(TrainSpec(tf32=True), CPU)


def test_the_network_is_compiled_where_the_recipe_says_so(quick_recipe, tmp_path, monkeypatch):
    compiled = []
    original = torch.nn.Module.compile

    def eager(self, *arguments, **options):
        compiled.append(type(self).__name__)
        original(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    run = r2kit.finetune(
        quick_recipe, overrides=["train.compile=true", "train.epochs=1"], out=tmp_path / "run", quiet=True
    )
    assert compiled == ["ResNet"]
    assert not [key for key in load_file(run.weights_file) if "_orig_mod" in key]


def test_loggers_get_every_epoch(quick_recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = r2kit.finetune(quick_recipe, overrides=["train.loggers=[tensorboard]"], out=tmp_path / "run", quiet=True)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    rows = list(csv.DictReader(run.metrics_csv.read_text().splitlines()))
    for key in ("val_acc", "train_loss", "lr"):
        assert [event.value for event in events.Scalars(key)] == pytest.approx([float(row[key]) for row in rows])
    assert [event.step for event in events.Scalars("val_acc")] == [int(row["step"]) for row in rows]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*")  # mlflow's own use of SQLAlchemy
def test_mlflow_keeps_every_epoch_in_the_run_folder(quick_recipe, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = r2kit.finetune(quick_recipe, overrides=["train.loggers=[mlflow]"], out=tmp_path / "run", quiet=True)
    client = mlflow.tracking.MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    rows = list(csv.DictReader(run.metrics_csv.read_text().splitlines()))
    for key in ("val_acc", "train_loss", "lr"):
        found = client.get_metric_history(run.info["mlflow_run_id"], key)
        assert [metric.value for metric in found] == pytest.approx([float(row[key]) for row in rows])
        assert [metric.step for metric in found] == [int(row["step"]) for row in rows]


def offline_records(path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB of pieces with a head of 7 bytes each."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the last piece of a record
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_keeps_every_epoch_offline(quick_recipe, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = r2kit.finetune(quick_recipe, overrides=["train.loggers=[wandb]"], out=tmp_path / "run", quiet=True)
    wandb.finish()
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in offline_records(file):
        record = Record.FromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "val_acc" in items:
            found.append(items)
    rows = list(csv.DictReader(run.metrics_csv.read_text().splitlines()))
    for key in ("val_acc", "train_loss", "lr"):
        assert [float(items[key]) for items in found] == pytest.approx([float(row[key]) for row in rows])


def test_a_missing_logger_is_one_line(monkeypatch):
    from r2kit import errors, loggers

    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        with pytest.raises(MissingExtraError, match=rf'needs {package}, .*: pip install "r2kit\[{name}\]"'):
            loggers.check_loggers([name])


def test_output_holds_no_adverts(quick_recipe, tmp_path):
    from r2kit.recipe_file import load_recipe, to_yaml

    file = tmp_path / "quick.yaml"
    file.write_text(to_yaml(load_recipe(quick_recipe, ["train.epochs=1"])))
    command = [sys.executable, "-m", "r2kit", "finetune", str(file), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = (done.stdout + done.stderr).lower()
    for word in ("litlogger", "tip:", "💡", "lightning.ai", "http", "\x1b["):
        assert word not in said, word
    assert done.stderr == ""
