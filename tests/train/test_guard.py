import json

import pytest
import torch
from safetensors.torch import load_file

import r2kit
from r2kit.checkpoint import is_whole, read_checkpoint
from r2kit.errors import RunError
from r2kit.run import Run
from r2kit.tasks import ClassificationTask
from r2kit.train import resume
from tests.train.test_keep import no_more, same_training

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


@pytest.fixture
def memory(monkeypatch):
    """Memory for passes of so many images from the moment that a test says on; and what was trained: epoch, images."""
    original = ClassificationTask.training_step
    state = {"most": 99, "at": None, "seen": []}

    def step(self, batch, batch_idx):
        state["most"] = state.pop("least") if state["at"] == (self.current_epoch, batch_idx) else state["most"]
        state["at"] = state["at"] if "least" in state else None
        if len(batch["image"]) > state["most"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        state["seen"].append((self.current_epoch, self.trainer.global_step, batch["index"].tolist()))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", step)
    monkeypatch.setattr("r2kit.train.flow._finish", no_more)
    monkeypatch.setattr("r2kit.recipe.train.AUTO_BATCH", 16)
    monkeypatch.setattr("r2kit.train.choices.AUTO_BATCH", 16)

    def runs_out(at, most):
        state.update(at=at, least=most, most=99, seen=[])
        return state["seen"]

    return runs_out


AUTO = ["train.batch_size=auto", "train.epochs=3", "train.ema=true", "model.drop_rate=0.2"]


def test_a_run_that_lacks_memory_at_its_first_step_is_that_of_the_smaller_batch(quick_recipe, tmp_path, memory, capsys):
    memory((0, 0), 8)
    run = r2kit.finetune(quick_recipe, overrides=AUTO, out=tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "epoch 1, batch 1: out of memory; going on from the start with 2 x 8 images a step: a step still sees 16 "
        "images, BatchNorm sees 8"
    ) in said
    assert run.info["backed_off"] == [{"at": "epoch 1, batch 1", "batch_size": 8}]
    assert run.info["decided"]["accumulate"] == 2
    small = [*AUTO, "train.batch_size=8", "train.accumulate=2"]
    other = r2kit.finetune(quick_recipe, overrides=small, out=tmp_path / "small", quiet=True)
    same_training(run, other, other_recipe=True)


@pytest.mark.parametrize("at", [(1, 0), (1, 1)])
def test_a_run_that_lacks_memory_later_goes_on_from_the_very_step(quick_recipe, tmp_path, memory, at):
    seen = memory(at, 6)  # halved twice: 16, 8, 4
    run = r2kit.finetune(quick_recipe, overrides=[*AUTO, "train.checkpoint_every=1"], out=tmp_path / "run", quiet=True)
    assert run.info["decided"]["batch_size"] == 4
    assert [entry["batch_size"] for entry in run.info["backed_off"]] == [8, 4]
    images = {epoch: [row for e, _, rows in seen if e == epoch for row in rows] for epoch in range(3)}
    assert all(len(rows) == len(set(rows)) == len(images[0]) for rows in images.values())  # each once, none again
    assert {len(rows) for epoch, _, rows in seen if epoch == 0} == {16, 8}
    assert max(len(rows) for epoch, _, rows in seen if epoch == 2) == 4
    steps = {step: 0 for _, step, _ in seen}
    for _, step, rows in seen:
        steps[step] += len(rows)
    assert list(steps.values()) == [16, 8] * 3  # a step sees what it always saw
    last = read_checkpoint(run.last_checkpoint)
    assert last["position"]["step"] == len(steps) == 6
    assert run.metrics_csv.read_text().splitlines()[-1].startswith("2,6,")


def test_a_run_that_lacks_memory_and_is_killed_goes_on_with_the_smaller_batch(quick_recipe, tmp_path, memory):
    memory((1, 1), 8)
    whole = r2kit.finetune(quick_recipe, overrides=AUTO, out=tmp_path / "whole", quiet=True)
    memory((1, 1), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r2kit.train.flow.newest_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            r2kit.finetune(quick_recipe, overrides=AUTO, out=tmp_path / "run", quiet=True)
    run = resume(tmp_path / "run", quiet=True)
    same_training(run, whole)


def killed(*arguments):
    raise KeyboardInterrupt


def test_memory_for_not_even_two_images_is_one_line(quick_recipe, tmp_path, memory):
    memory((1, 1), 1)
    said, run = fails(quick_recipe, tmp_path / "run", *AUTO)
    assert "out of memory, though a trial step with 2 images fitted" in said
    assert "a smaller data.image_size or model.name, and --overwrite" in said
    assert is_whole(run.last_checkpoint)


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
