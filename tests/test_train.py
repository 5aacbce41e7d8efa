import csv
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import r2kit
from r2kit import train
from r2kit.callbacks import Recorder
from r2kit.data import datamodule
from r2kit.errors import ModelError, RecipeError, RunError
from r2kit.models import build_model
from r2kit.recipe_file import load_recipe
from r2kit.train.prepare import speed_up

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def test_a_run_folder_holds_everything(finished_run, quick_recipe):
    run = finished_run
    files = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
    assert {
        "recipe.yaml",
        "run.json",
        "preprocess.json",
        "split.parquet",
        "metrics.csv",
        "metrics.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "model.safetensors",
        "predictions_test.parquet",
        "report.html",
    } <= files
    assert not [name for name in files if name.endswith(".part")]
    assert run.info["state"] == "finished"
    rows = list(csv.DictReader(run.metrics_csv.read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert run.info["best_epoch"] == max(
        range(2), key=lambda i: (float(rows[i]["val_acc"]), -float(rows[i]["val_loss"]))
    )
    assert json.loads(run.metrics_json.read_text())["split"] == "test"


def test_what_is_reported_is_the_best_epoch_of_the_network(finished_run):
    best = torch.load(finished_run.best_checkpoint, weights_only=True)["state_dict"]
    stored = load_file(finished_run.weights_file)
    rebuilt = finished_run.model().state_dict()
    assert set(rebuilt) == set(stored) == {key.removeprefix("model.") for key in best}
    for key, value in stored.items():
        assert torch.equal(value, best[f"model.{key}"])
        assert torch.equal(value, rebuilt[key])


def test_checkpoints_hold_plain_values_only(finished_run):
    for path in (finished_run.best_checkpoint, finished_run.last_checkpoint):
        checkpoint = torch.load(path, weights_only=True)
        json.dumps(checkpoint["hyper_parameters"])


def test_two_runs_of_one_seed_are_identical(finished_run, quick_recipe, tmp_path):
    again = r2kit.finetune(quick_recipe, out=tmp_path / "again", quiet=True)
    assert again.metrics_csv.read_bytes() == finished_run.metrics_csv.read_bytes()
    first, second = load_file(finished_run.weights_file), load_file(again.weights_file)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_data_are_opened_once(quick_recipe, tmp_path, monkeypatch):
    opened = []
    original = datamodule.open_source

    def count(*arguments, **named):
        opened.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(datamodule, "open_source", count)
    run = r2kit.finetune(quick_recipe, overrides=["train.epochs=1"], out=tmp_path / "run", quiet=True)
    assert len(opened) == 1  # a million files are listed once
    run.datamodule().setup()
    assert len(opened) == 2  # later they may be others


def test_another_seed_is_another_run(finished_run, quick_recipe, tmp_path):
    other = r2kit.finetune(quick_recipe, overrides=["seed=4"], out=tmp_path / "other", quiet=True)
    assert other.metrics_csv.read_bytes() != finished_run.metrics_csv.read_bytes()


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("ema", [False, True])
def test_resume_ends_where_the_unbroken_run_ends(quick_recipe, tmp_path, monkeypatch, ema):
    overrides = ["train.epochs=3", f"train.ema={str(ema).lower()}", "model.drop_path_rate=0.1"]
    whole = r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "whole", quiet=True)

    original = Recorder.on_train_epoch_end

    def stop(self, trainer, module):
        if trainer.current_epoch == 1:
            raise Killed
        original(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "on_train_epoch_end", stop)
        with pytest.raises(Killed):
            r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "broken", quiet=True)
    with pytest.raises(RunError, match="holds a run already"):
        r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "broken", quiet=True)
    broken = r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "broken", resume=True, quiet=True)
    assert broken.metrics_csv.read_bytes() == whole.metrics_csv.read_bytes()
    first, second = load_file(whole.weights_file), load_file(broken.weights_file)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_resume_of_a_finished_run_does_nothing(finished_run, quick_recipe):
    before = finished_run.metrics_csv.stat().st_mtime_ns
    assert r2kit.finetune(quick_recipe, out=finished_run.path, resume=True, quiet=True).path == finished_run.path
    assert finished_run.metrics_csv.stat().st_mtime_ns == before


def test_resume_of_another_recipe_names_the_difference(finished_run, quick_recipe):
    with pytest.raises(RunError, match=r"another recipe, different in train\.lr"):
        r2kit.finetune(quick_recipe, overrides=["train.lr=1"], out=finished_run.path, resume=True, quiet=True)
    with pytest.raises(RunError, match="--resume auto needs the folder"):
        r2kit.finetune(quick_recipe, resume=True, quiet=True)


def test_frozen_backbone_stands_still(quick_recipe, tmp_path):
    overrides = ["train.freeze=backbone", "train.epochs=1"]
    run = r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "frozen", quiet=True)
    start = build_model(
        run.recipe.model, num_classes=3, bands=("red", "green", "blue")
    )  # other weights, same statistics
    trained = load_file(run.weights_file)
    for key, value in start.state_dict().items():
        if "running_" in key or "num_batches" in key:
            assert torch.equal(trained[key], value), key


def test_dry_run_keeps_nothing(quick_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.dry_run(quick_recipe)
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert "two training steps" in said
    assert "test_resnet" in said


def test_before_training_everything_is_said(quick_recipe, tmp_path, capsys):
    r2kit.finetune(quick_recipe, overrides=["train.epochs=1"], out=tmp_path / "run")
    said = capsys.readouterr().out
    for phrase in (
        "torch ",
        "device: CPU",
        "water",
        "red",
        "parameters",
        "GMACs",
        "images/s measured here",
        "nothing is frozen",
        "estimated training time",
        "best epoch: 1 of 1",
        "95 % interval",
        "majority class",
        "logistic regression",
        "run folder:",
        f"r2kit evaluate {tmp_path / 'run'}",
    ):
        assert phrase in said, phrase


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("model.name=res2netplus5", ModelError, "res2netplus50"),
        ("train.precision=fp16", RecipeError, "fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_folder_is_made(quick_recipe, tmp_path, override, error, message):
    if torch.cuda.is_available() and "fp16" in override:
        pytest.skip("this machine has a GPU, where fp16 is allowed")
    with pytest.raises(error, match=message):
        r2kit.finetune(quick_recipe, overrides=[override], out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_one_run(quick_recipe, tmp_path):
    recipe = r2kit.load_recipe(quick_recipe)
    from r2kit.recipe_file import to_yaml

    (tmp_path / "quick.yaml").write_text(to_yaml(recipe))
    command = [sys.executable, "-m", "r2kit", "finetune", str(tmp_path / "quick.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "train.devices=2", "train.strategy=ddp"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert r2kit.Run.open(tmp_path / "run").info["state"] == "finished"


def test_weights_of_another_run_bring_their_normalisation(finished_run, quick_recipe, tmp_path, capsys):
    overrides = [f"model.pretrained={finished_run.path}", "train.epochs=1", "seed=9"]
    run = r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "run")
    said = capsys.readouterr().out
    assert f"weights of {finished_run.path}" in said
    assert "normalisation: that of the weights" in said
    assert run.preprocess.mean == pytest.approx(finished_run.preprocess.mean)


def test_weights_for_other_bands_keep_the_normalisation_of_the_images(finished_run):
    from dataclasses import replace

    from r2kit.models import fit_preprocess

    model = r2kit.create_model("test_resnet", pretrained=finished_run.path, num_classes=3, in_chans=5)
    five = replace(finished_run.preprocess, bands=("a", "b", "c", "d", "e"), mean=(0.5,) * 5, std=(0.2,) * 5)
    kept, line = fit_preprocess(five, model.load_report)
    assert kept == five
    assert "other bands" in line
    assert fit_preprocess(five, None) == (five, None)


def test_published_weights_without_a_network_are_one_line(quick_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match=r"model\.pretrained") as caught:
        r2kit.finetune(
            quick_recipe,
            overrides=["model.pretrained=true", "model.name=res2net50d"],
            out=tmp_path / "run",
            quiet=True,
        )
    assert len(str(caught.value).splitlines()) == 1
    assert "model.pretrained=" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_warm_start_ends_as_a_plain_res2netplus(quick_recipe, tmp_path, capsys):
    from torch import nn

    from r2kit.backbones.mish import MishBeta
    from r2kit.backbones.weights import save_weights

    torch.manual_seed(0)
    save_weights(r2kit.create_model("res2net50d", num_classes=3), tmp_path / "twin.safetensors")
    overrides = [
        "model.name=res2netplus50d",
        f"model.pretrained={tmp_path / 'twin.safetensors'}",
        "model.warm_start=true",
        "train.ema=true",
        "train.epochs=3",
        "data.limit=20",
    ]
    run = r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "run")
    assert "converted from res2net50d" in capsys.readouterr().out
    assert run.info["best_epoch"] >= 1  # half of training changes the activation
    model = run.model()
    assert not [module for module in model.modules() if isinstance(module, MishBeta)]
    assert [module for module in model.modules() if isinstance(module, nn.Mish)]
    assert set(load_file(run.weights_file)) == set(r2kit.create_model("res2netplus50d", num_classes=3).state_dict())
    # The stored weights score what the best epoch scored: they were validated as plain Mish.
    row = list(csv.DictReader(run.metrics_csv.read_text().splitlines()))[run.info["best_epoch"]]
    from r2kit.evaluate import evaluate

    assert evaluate(run, split="val")["accuracy"]["value"] == pytest.approx(float(row["val_acc"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.warm_start=true"], "model.warm_start: needs weights to start from"),
        (
            ["model.warm_start=true", "model.pretrained=true", "train.freeze=backbone"],
            "train.freeze: a warm start changes the activation",
        ),
    ],
)
def test_a_warm_start_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        r2kit.load_recipe({}, overrides)


def test_rare_classes_drawn_more_often_or_weighed_more(tmp_path, capsys):
    rng, root = np.random.default_rng(0), tmp_path / "tiles"
    for name, count in (("many", 24), ("few", 6)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    recipe = {
        "data": {"root": str(root), "image_size": 16, "workers": 0, "test_fraction": 0.0},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 1, "batch_size": 8},
    }
    for overrides, said in (
        (["data.sampler=balanced"], "drawn an epoch"),
        (["task.class_weights=effective_number", "task.loss=focal"], "class weights in the loss: few 2.49, many 0.627"),
    ):
        run = r2kit.finetune(recipe, overrides=overrides, out=tmp_path / said[:5])
        assert said in " ".join(capsys.readouterr().out.split())
        assert run.info["state"] == "finished"
        assert np.isfinite(pd.read_csv(run.metrics_csv)["train_loss"]).all()


def test_the_fast_form_trains_the_plain_network(quick_recipe, tmp_path, capsys):
    runs = {}
    for optimize in ("auto", "off"):
        recipe = {**quick_recipe, "train": {**quick_recipe["train"], "optimize": optimize}}
        runs[optimize] = r2kit.finetune(recipe, out=tmp_path / optimize)
        line = "optimize: off: train.optimize=off" if optimize == "off" else "optimize: on: 1 fused units, "
        assert line in capsys.readouterr().out
    states = {key: load_file(run.weights_file) for key, run in runs.items()}
    assert list(states["auto"]) == list(states["off"])
    for name, value in states["off"].items():
        torch.testing.assert_close(states["auto"][name], value, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("train", "device", "why"),
    [
        ({"optimize": "off"}, "cpu", "off: train.optimize=off"),
        ({}, "cuda", "off: the form for a GPU was never measured; r2kit.optimize has it"),
        ({"precision": "bf16"}, "cpu", "off: the kernels are for 32-bit floats, and the precision is bf16-mixed"),
    ],
)
def test_the_fast_form_is_off_with_a_reason(train, device, why):
    net = torch.nn.Conv2d(3, 3, 1)
    spec = load_recipe({"train": train}).train
    precision = "bf16-mixed" if spec.precision == "bf16" else "32-true"
    assert speed_up(net, spec, torch.device(device), precision) == why
    assert type(net) is torch.nn.Conv2d
