import inspect
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import r2kit
from r2kit.errors import Interrupted, RunError
from r2kit.run import Run
from r2kit.tasks import TASKS, ClassificationTask

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    # The sampler of r2kit starts where the run stopped.
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*"),
]


def same_training(run, unbroken, *, other_recipe=False):
    """Whether two runs trained the same bits: the record of the epochs, and everything in the checkpoints."""
    assert run.metrics_csv.read_bytes() == unbroken.metrics_csv.read_bytes()
    for name in ("last_checkpoint", "best_checkpoint"):
        one, two = (torch.load(getattr(each, name), weights_only=True) for each in (run, unbroken))
        assert one.keys() == two.keys() >= {"state_dict", "optimizer_states", "lr_schedulers", "loops", "position"}
        for state in (one, two):
            for kept in state["callbacks"].values():
                for clock in ("seconds", "share", "validation"):  # what a watch says is never the same twice
                    kept.pop(clock, None)
        for key in one.keys() - ({"hyper_parameters"} if other_recipe else set()):
            assert equal(one[key], two[key]), (name, key)


def same_result(run, unbroken):
    """Whether two runs ended with the same bits, the network that is kept included."""
    same_training(run, unbroken)
    assert equal(load_file(run.weights_file), load_file(unbroken.weights_file))
    assert run.predictions("test").read_bytes() == unbroken.predictions("test").read_bytes()


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two or (one != one and two != two)  # a metric without an image is no number


def interrupt(attempts, recipe_file, out, *, seed, kills, span, names):
    """End a run by signals at random moments, then let it go on to its end; return the attempts."""
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(kills):
        name = str(rng.choice(names))
        plan = {"signal": name, "after": float(rng.uniform(0.0, span))}
        if name == "SIGINT" or (name == "SIGTERM" and rng.random() < 0.5):
            plan["group"] = True  # the loader processes as well
        if rng.random() < 0.75:  # the others end while the run begins, or is about to go on
            plan["once"] = str(out / "plots" / "batch.png")
        (out / "plots" / "batch.png").unlink(missing_ok=True)  # written again right before the training
        known = (out / "run.json").exists()
        again = ["resume", out] if known and rng.random() < 0.5 else None
        done = attempts.run(*(again or ["finetune", recipe_file, "--out", out, "--resume", "auto"]), **plan)
        seen.append((name, done["status"], done["seconds"]))
        # -15: before Python has come so far as to handle the signal; a shell says 143 to that as well.
        allowed = {"SIGKILL": [-9], "SIGINT": [130, -2], "SIGTERM": [143, -15]}[name]
        assert done["status"] in [*allowed, 0], done["said"]
    done = attempts.run("finetune", recipe_file, "--out", out, "--resume", "auto")
    assert done["status"] == 0, done["said"]
    return seen


def test_a_run_killed_at_random_moments_ends_as_the_unbroken_one(attempts, recipe_file, unbroken, tmp_path):
    out = tmp_path / "run"
    seen = interrupt(attempts, recipe_file, out, seed=1, kills=3, span=0.8, names=["SIGKILL"])
    assert any(status == -9 for _, status, _ in seen)
    same_result(Run.open(out), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_twenty_times_ends_as_the_unbroken_one(attempts, long_recipe_file, long_unbroken, tmp_path, seed):
    out = tmp_path / "run"
    names = ["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"]
    seen = interrupt(attempts, long_recipe_file, out, seed=100 + seed, kills=20, span=0.9, names=names)
    print("\n", *(f"{name} {status} {seconds} s;" for name, status, seconds in seen))  # None: it ended before
    assert sum(status != 0 for _, status, _ in seen) >= 10  # on a busy machine it may come to its end before the last
    same_result(Run.open(out), long_unbroken)


@pytest.mark.parametrize("kind", TASKS)
def test_every_kind_of_task_keeps_its_sums_where_the_checkpoints_find_them(kind):
    source = inspect.getsource(TASKS[kind])
    assert "self.train_sums +=" in source
    assert "self.all_train_sums()" in source
    assert "_train_sums =" not in source.replace("self.train_sums =", "")


# ------------------------------------------------------------------------------------- at a moment of our choice

MOMENTS = {
    "first batch": ("training_step", 0, 0),
    "middle of an epoch": ("training_step", 1, 3),
    "last batch of an epoch": ("training_step", 1, 5),
    "last batch of all": ("training_step", 2, 5),
    "first batch of a validation": ("validation_step", 0, 0),
    "last batch of a validation": ("validation_step", 1, 1),
    "end of an epoch": ("on_train_epoch_end", 1, None),
    "end of the last epoch": ("on_train_epoch_end", 2, None),
}


def no_more(job, run, console, recorder, started):
    """Stands for evaluation and report, which take longer than these trainings."""


@pytest.fixture
def only_training(monkeypatch):
    monkeypatch.setattr("r2kit.train.flow._finish", no_more)


@pytest.fixture(scope="module", params=["ema", pytest.param("plain", marks=pytest.mark.slow)])
def pair(request, quick_recipe, tmp_path_factory):
    """Overrides, and the run that nobody interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r2kit.train.flow._finish", no_more)
        return _pair(request, quick_recipe, tmp_path_factory)  # no longer patched: other runs are made in between


def _pair(request, quick_recipe, tmp_path_factory):
    overrides = ["train.epochs=3", "train.batch_size=4", "model.drop_path_rate=0.1"]
    overrides += ["train.ema=true"] if request.param == "ema" else ["train.optimizer=sgd", "model.drop_rate=0.2"]
    out = tmp_path_factory.mktemp("whole") / "run"
    return overrides, r2kit.finetune(quick_recipe, overrides=overrides, out=out, quiet=True)


@pytest.mark.usefixtures("only_training")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_asked_to_stop_ends_as_the_unbroken_one(quick_recipe, pair, tmp_path, monkeypatch, moment):
    overrides, whole = pair
    hook, epoch, batch = MOMENTS[moment]
    original = getattr(ClassificationTask, hook)

    def asked(self, *args):
        if self.trainer.current_epoch == epoch and batch in (None, *args[1:]):
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(ClassificationTask, hook, asked)
        with pytest.raises(
            Interrupted, match=r"stopped by SIGTERM: saved at step .*; go on with r2kit resume"
        ) as caught:
            r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 143
    position = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["position"]
    done = {
        "training_step": (epoch, (batch or 0) + 1),
        "validation_step": (epoch, 6),
        "on_train_epoch_end": (epoch + 1, 0),
    }
    assert (position["epoch"], position["batch"]) == done[hook]  # at once, not some steps later
    from r2kit.train import resume

    same_training(resume(tmp_path / "run", quiet=True), whole)


def test_what_cannot_go_on_is_refused(quick_recipe, finished_run, tmp_path):
    from r2kit.train import resume

    with pytest.raises(RunError, match="no such run folder"):
        resume(tmp_path / "none")
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    Run(folder).write_info(state="training", data={"fingerprint": "0123456789abcdef"})
    with pytest.raises(
        RunError, match=r"data have changed since it began: fingerprint 0123456789ab, now .*--overwrite"
    ):
        resume(folder, quiet=True)


def test_a_run_of_other_devices_is_refused(quick_recipe, finished_run, tmp_path):
    from r2kit.checkpoint import read_checkpoint, write_checkpoint
    from r2kit.train import resume

    run = Run(tmp_path / "run")
    shutil.copytree(finished_run.path, run.path)
    run.write_info(state="training")
    state = read_checkpoint(run.last_checkpoint)
    state["position"]["devices"] = 4
    write_checkpoint(state, run.last_checkpoint)
    with pytest.raises(RunError, match=r"trained on 4 device\(s\).*train\.devices=4"):
        resume(run.path, quiet=True)


@pytest.mark.usefixtures("only_training")
def test_a_run_asked_to_stop_after_its_last_look_stops_and_is_not_evaluated(quick_recipe, pair, tmp_path, monkeypatch):
    from r2kit.train import resume
    from r2kit.train.keep import Keeper

    overrides, whole = pair
    original = Keeper._save_ended

    def asked(self, trainer, pl_module):
        original(self, trainer, pl_module)
        if trainer.current_epoch == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Keeper, "_save_ended", asked)
        with pytest.raises(Interrupted, match=r"stopped by SIGINT: saved at step 18; go on with r2kit resume"):
            r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "run", quiet=True)
    same_training(resume(tmp_path / "run", quiet=True), whole)


@pytest.mark.usefixtures("only_training")
def test_a_damaged_checkpoint_is_never_picked_up(quick_recipe, pair, tmp_path, monkeypatch, capsys):
    overrides, whole = pair
    original = ClassificationTask.training_step

    def asked(self, batch, batch_idx):
        if self.trainer.current_epoch == 2 and batch_idx == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(ClassificationTask, "training_step", asked)
        with pytest.raises(Interrupted):
            r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "run", quiet=True)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    from r2kit.train import resume

    same_training(resume(tmp_path / "run"), whole)
    assert f"note: {last} is damaged" in capsys.readouterr().out


@pytest.mark.usefixtures("only_training")
def test_a_new_version_of_a_package_is_named(quick_recipe, pair, tmp_path, monkeypatch, capsys):
    overrides, _ = pair
    original = ClassificationTask.training_step

    def asked(self, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(ClassificationTask, "training_step", asked)
        with pytest.raises(Interrupted) as caught:
            r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 130
    assert "Ctrl-C again stops at once" in capsys.readouterr().out
    run = Run(tmp_path / "run")
    run.write_info(versions={**run.info["versions"], "timm": "1.0.0"})
    from r2kit.train import resume

    resume(run.path)
    assert "note: timm was 1.0.0, is " in capsys.readouterr().out
