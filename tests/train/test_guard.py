import json

import pytest
import torch
from safetensors.torch import load_file

import r2kit
from r2kit.checkpoint import is_whole
from r2kit.errors import RunError
from r2kit.run import Run
from r2kit.tasks import ClassificationTask
from r2kit.train import resume

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def fails(quick_recipe, out, *overrides):
    with pytest.raises(RunError) as caught:
        r2kit.finetune(quick_recipe, overrides=[*overrides], out=out, quiet=True)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value), Run(out)


def test_a_loss_that_is_no_number_stops_with_its_batch_and_the_last_good_checkpoint(
    quick_recipe, tmp_path, monkeypatch
):
    original = ClassificationTask.training_step

    def broken(self, batch, batch_idx):
        if self.trainer.current_epoch == 1 and batch_idx == 1:
            batch["image"][0, 0, 0, :3] = float("nan")  # as a file with holes may have
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", broken)
    said, run = fails(quick_recipe, tmp_path / "run", "augment.mixup=0", "augment.cutmix=0")
    assert said.startswith("epoch 2, step 2: the loss is nan; its batch is kept in ")
    assert "holds 3 values that are no numbers" in said
    assert f"the last good checkpoint, of step 3, is {run.last_checkpoint}" in said
    assert is_whole(run.last_checkpoint)
    kept = load_file(run.path / "bad_batch.safetensors")
    assert int(kept["image"].isnan().sum()) == 3
    facts = json.loads((run.path / "bad_batch.json").read_text())
    assert facts["row"] == kept["index"].tolist()
    assert len(facts["id"]) == len(facts["path"]) == len(kept["image"])
    assert (facts["epoch"], facts["batch"], facts["loss"]) == (1, 1, "nan")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("cannot allocate")]
)
def test_memory_that_runs_out_in_training_is_one_line_and_the_run_goes_on(quick_recipe, tmp_path, monkeypatch, error):
    original = ClassificationTask.training_step

    def too_much(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 1:
            raise error
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(ClassificationTask, "training_step", too_much)
        said, run = fails(quick_recipe, tmp_path / "run")
    assert said == (
        "epoch 2, batch 2: out of memory, though a trial step with 8 images fitted; if something else took the memory, "
        f"free it and go on from its last checkpoint with r2kit resume {run.path}; else start again with "
        "train.batch_size=4 train.accumulate=2 --overwrite"
    )
    assert resume(run.path, quiet=True).info["state"] == "finished"


def test_a_loader_process_that_was_killed_is_one_line(quick_recipe, tmp_path, monkeypatch):
    def killed(self, batch, batch_idx):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")

    monkeypatch.setattr(ClassificationTask, "training_step", killed)
    said, _ = fails(quick_recipe, tmp_path / "run")
    assert said.startswith("DataLoader worker (pid 7) is killed by signal: Killed; most often memory is out: go on ")


def test_a_loss_that_explodes_stops(quick_recipe, tmp_path, monkeypatch):
    original = ClassificationTask.training_step

    def grows(self, batch, batch_idx):
        return original(self, batch, batch_idx) * 1.6**self.trainer.global_step

    monkeypatch.setattr(ClassificationTask, "training_step", grows)
    overrides = ["train.epochs=30", "train.lr=1e-30", "train.max_loss_growth=50"]
    said, run = fails(quick_recipe, tmp_path / "run", *overrides)
    assert "the loss explodes: " in said
    assert "(train.max_loss_growth=50)" in said
    assert "lower train.lr (now " in said
    assert is_whole(run.last_checkpoint)


def test_weights_that_are_no_numbers_are_never_saved(quick_recipe, tmp_path, monkeypatch):
    def broken(self):
        if self.trainer.current_epoch == 1:
            with torch.no_grad():
                next(self.model.parameters())[0] = float("inf")
        return original(self)

    original = ClassificationTask.on_train_epoch_end
    monkeypatch.setattr(ClassificationTask, "on_train_epoch_end", broken)
    said, run = fails(quick_recipe, tmp_path / "run")
    assert "weights that are no numbers; the last good checkpoint, of step 3, is" in said
    state = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
