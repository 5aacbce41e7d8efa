import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import r2kit
from r2kit.checkpoint import read_checkpoint
from r2kit.errors import ModelError, RecipeError, RunError
from r2kit.recipe import Recipe
from r2kit.recipe.train import TrainSpec
from r2kit.recipe_file import load_recipe, to_yaml
from r2kit.run import Run
from r2kit.schedules import lr_factor
from r2kit.train.again import weights_digest
from r2kit.train.choices import choose_sync_batchnorm
from r2kit.train.ranks import layout
from r2kit.train.watch import Watch

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
CLI = [sys.executable, "-m", "r2kit"]
# The weights do not move, so that what is validated is the same network for any number of processes.
STILL = ["train.freeze=backbone", "train.lr=1e-30", "train.batch_size=4", "train.epochs=1"]


@pytest.fixture(scope="module")
def quick_file(quick_recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(to_yaml(load_recipe(quick_recipe)))
    return path


def validated(run):
    (row,) = csv.DictReader(run.metrics_csv.read_text().splitlines())
    return {key: value for key, value in row.items() if key.startswith("val_")}


def train(recipe, out, *overrides, launcher=CLI):
    done = subprocess.run(
        [*launcher, "finetune", str(recipe), "--out", str(out), *overrides],
        capture_output=True,
        text=True,
        timeout=400,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one_process(quick_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train(quick_file, out, *STILL)
    return Run.open(out)


@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_metrics_do_not_depend_on_the_number_of_processes(quick_file, one_process, tmp_path, devices):
    # 6 images for validation with batches of 4: 4 + 2 in one process, 3 in each of two, 2 in each of three.
    said = train(quick_file, tmp_path / "run", *STILL, f"train.devices={devices}", "augment.preset=none")
    run = Run.open(tmp_path / "run")
    assert validated(run) == validated(one_process)  # every digit
    assert run.predictions("test").read_bytes() == one_process.predictions("test").read_bytes()
    assert said.count("epoch 1/1") == said.count("device: CPU") == 1  # only the first process speaks
    assert f"a step sees {devices} x 4 images" in said
    assert read_checkpoint(run.last_checkpoint)["position"]["devices"] == devices
    assert not list(run.path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # fifteen starts of Python on a busy machine
@pytest.mark.parametrize("kind", ["multilabel", "segmentation", "saliency", "detection"])
def test_metrics_of_every_kind_of_task_do_not_depend_on_the_number_of_processes(request, tmp_path, kind):
    names = {"multilabel": "several_run", "segmentation": "pond_run", "saliency": "salient_run"}
    if kind in names:
        run = request.getfixturevalue(names[kind])
    else:  # long enough that it finds something
        recipe = request.getfixturevalue("detection_recipe")
        run = r2kit.finetune(recipe, overrides=["train.epochs=4"], out=tmp_path / "run", quiet=True)
    found = [validate(run, devices) for devices in (1, 2, 3)]
    assert found[0] == found[1] == found[2]  # every digit
    assert any(float(value) > 0 for value in found[0]["metrics"].values())
    assert any(found[0]["images"] % devices for devices in (2, 3))  # else nothing was tested


def validate(run, devices):
    """What a validation of a run's network on so many processes gives."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("validate.py")), str(run.path), str(devices)],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_torchrun_starts_the_processes(quick_file, one_process, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "r2kit"]
    said = train(quick_file, tmp_path / "run", *STILL, "augment.preset=none", launcher=torchrun)
    assert said.count("epoch 1/1") == 1
    assert validated(Run.open(tmp_path / "run")) == validated(one_process)


def start(recipe, out, *overrides):
    """Start a training of two processes that would take long, and return it and the other process when it trains."""
    process = subprocess.Popen(
        [*CLI, "finetune", str(recipe), "--out", str(out), "train.devices=2", "train.epochs=3000", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    until = time.monotonic() + 240
    while not (out / "metrics.csv").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (other,) = [int(pid) for pid in children if "finetune" in command_line(pid)]
    return process, other


def command_line(pid):
    """The command line of a process; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", ["other", "first"])
def test_a_process_that_dies_takes_the_job_down(quick_file, tmp_path, victim):
    process, other = start(quick_file, tmp_path / "run")
    killed, left = (other, process.pid) if victim == "other" else (process.pid, other)
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    if victim == "other":
        assert process.wait(timeout=60) == 2
        line = process.stderr.read().strip().splitlines()[-1]
        assert line.startswith(f"error: process 1 of the run (pid {other}) was ended by SIGKILL; what was saved")
        assert line.endswith(f"go on with r2kit resume {tmp_path / 'run'}")
    while command_line(left):
        assert time.monotonic() - began < 60
        time.sleep(0.2)
    process.wait()
    print(f"\n{victim}: the job ended after {time.monotonic() - began:.1f} s")
    process.stderr.close()


@pytest.mark.slow
def test_several_processes_stop_together_and_go_on(quick_file, tmp_path):
    process, _ = start(quick_file, tmp_path / "run")
    process.send_signal(signal.SIGTERM)  # only the first process gets it
    assert process.wait(timeout=60) == 143
    assert "stopped by SIGTERM: saved at step" in process.stderr.read()
    process.stderr.close()
    before = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["position"]
    process = subprocess.Popen([*CLI, "resume", str(tmp_path / "run")], stdout=subprocess.DEVNULL, env=ENV)
    while read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["position"]["step"] <= before["step"]:
        assert process.poll() is None
        time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


def step_of(checkpoint):
    """The step of a checkpoint; 0 while there is none, as at the moment in which the new one takes its name."""
    try:
        return read_checkpoint(checkpoint)["position"]["step"]
    except (RunError, FileNotFoundError):
        return 0


@pytest.mark.slow
def test_two_processes_that_were_ended_twice_reach_the_bits_of_those_that_were_not(quick_recipe, tmp_path):
    overrides = ["train.devices=2", "train.batch_size=4", "train.epochs=30", "train.checkpoint_every=2"]
    overrides += ["train.ema=true", "data.workers=2", "model.drop_rate=0.1", "augment.mixup=0.4", "augment.cutmix=0.4"]
    recipe = tmp_path / "hard.yaml"
    recipe.write_text(to_yaml(load_recipe(quick_recipe, overrides)))
    train(recipe, tmp_path / "whole")

    broken, steps = tmp_path / "broken", []
    for words, number in (("finetune", signal.SIGTERM), ("resume", signal.SIGKILL)):
        place = [str(recipe), "--out", str(broken)] if words == "finetune" else [str(broken)]
        process = subprocess.Popen(
            [*CLI, words, *place], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV
        )
        last, until = broken / "checkpoints" / "last.ckpt", time.monotonic() + 600
        while step_of(last) <= sum(steps[-1:]) + 3 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number], process.stderr.read()
        process.stderr.close()
        steps.append(step_of(last))
    assert 0 < steps[0] < steps[1] < 30 * 3
    done = subprocess.run([*CLI, "resume", str(broken)], capture_output=True, text=True, timeout=400, env=ENV)
    assert done.returncode == 0, done.stderr
    one, two = Run.open(tmp_path / "whole"), Run.open(broken)
    assert one.metrics_csv.read_bytes() == two.metrics_csv.read_bytes()
    assert weights_digest(one.weights_file) == weights_digest(two.weights_file)
    assert one.predictions("test").read_bytes() == two.predictions("test").read_bytes()


# --------------------------------------------------------------------------------------------------- what is decided


def test_the_learning_rate_grows_with_the_devices():
    assert lr_factor("sgd", 4) == 4
    assert lr_factor("adamw", 4) == 2
    assert lr_factor("sgd", 1) == lr_factor("adamw", 1) == 1


@pytest.mark.parametrize(
    ("train", "device", "world", "on", "why"),
    [
        ({"batch_size": 8}, "cuda", 2, True, "8 images, fewer than 16"),
        ({"batch_size": 16}, "cuda", 2, False, "16 images or more"),
        ({"batch_size": 8}, "cuda", 1, False, "one device"),
        ({"batch_size": 8}, "cpu", 2, False, "GPUs only"),
        ({"batch_size": 8, "freeze": "backbone"}, "cuda", 2, False, "stand still"),
        ({"sync_batchnorm": True}, "cuda", 2, True, "as the recipe says"),
        ({"sync_batchnorm": False, "batch_size": 8}, "cuda", 2, False, "as the recipe says"),
    ],
)
def test_batchnorm_is_shared_where_each_device_has_few_images(train, device, world, on, why):
    chosen, reason = choose_sync_batchnorm(Recipe(train=TrainSpec(**train)), torch.device(device), world)
    assert chosen == on
    assert why in reason


def test_shared_batchnorm_on_a_cpu_is_refused():
    with pytest.raises(RecipeError, match=r"train\.sync_batchnorm: torch has it for GPUs only"):
        choose_sync_batchnorm(Recipe(train=TrainSpec(sync_batchnorm=True)), torch.device("cpu"), 2)


def test_slurm_and_torchrun_say_how_many_devices_there_are(monkeypatch):
    assert layout(TrainSpec(), False) == (1, 1)
    assert layout(TrainSpec(devices=3), False) == (3, 1)
    for name, value in {
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_NNODES": "2",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NAME": "train",
    }.items():
        monkeypatch.setenv(name, value)
    assert layout(TrainSpec(), True) == (4, 2)
    with pytest.raises(RecipeError, match=r"train\.devices: 2 asked for, but 4 process\(es\) were started"):
        layout(TrainSpec(devices=2), True)


def test_what_takes_no_part_in_the_loss_is_named():
    module = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
    module["used"](torch.ones(1, 2)).sum().backward()
    Watch().on_after_backward(SimpleNamespace(world_size=1), module)  # harmless on one device
    with pytest.raises(
        ModelError, match=r"idle\.weight, idle\.bias: trained, but no part of the loss.*train\.devices=1"
    ):
        Watch().on_after_backward(SimpleNamespace(world_size=2), module)
