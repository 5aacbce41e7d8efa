"""Every strategy of the `train` section, through real trainings of a tiny network, and through an interruption."""

import csv
import itertools
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import r2kit
from r2kit.callbacks import Recorder
from r2kit.data.datamodule import DataModule
from r2kit.data.resize import resize_batch, scaled_size
from r2kit.errors import RecipeError
from r2kit.recipe import Recipe, TrainSpec
from r2kit.recipe_file import to_yaml
from r2kit.stopping import Patience, TimeLimit
from r2kit.tasks import ClassificationTask

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


class Killed(BaseException):
    """Stands for the end of the process."""


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def train(quick_recipe, tmp_path):
    """Train `quick_recipe` with overrides into a folder of a name; train() of the same name goes on."""

    def call(name, *overrides, resume=False, quiet=True):
        return r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / name, resume=resume, quiet=quiet)

    return call


def rows(run):
    return list(csv.DictReader(run.metrics_csv.read_text().splitlines()))


RESUMED = {
    "stages": [
        "train={freeze: backbone, unfreeze: [1, 2], lr_scales: [0.1, 0.3, 1], accumulate: 2, ema: true, epochs: 4,"
        " batch_size: 4, progressive_size: [0.5, 0.75]}",
        "model.drop_rate=0.2",
        "data.image_size=64",
    ],
    "plateau": ["train={schedule: plateau, plateau_patience: 1, warmup_epochs: 0, lr: 1.0, epochs: 4}"],
    "one_cycle": ["train={schedule: one_cycle, optimizer: sgd, layer_decay: 0.7, early_stop: 3, epochs: 4}"],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_goes_on_ends_where_the_unbroken_one_ends(train, monkeypatch, name):
    overrides = RESUMED[name]
    whole = train("whole", *overrides)
    original = Recorder.on_train_epoch_end

    def stop(self, trainer, module):
        if trainer.current_epoch == 2:
            raise Killed
        original(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "on_train_epoch_end", stop)
        with pytest.raises(Killed):
            train("broken", *overrides)
    broken = train("broken", *overrides, resume=True)
    assert broken.metrics_csv.read_bytes() == whole.metrics_csv.read_bytes()
    first, second = load_file(whole.weights_file), load_file(broken.weights_file)
    assert all(torch.equal(first[key], second[key]) for key in first)
    if name == "plateau":  # else nothing was tested
        assert len({row["lr"] for row in rows(whole)}) > 1


def test_stages_are_freed_at_their_epochs(train, monkeypatch):
    states = []
    original = Recorder.on_train_epoch_end

    def look(self, trainer, module):
        original(self, trainer, module)
        states.append({key: value.clone() for key, value in module.model.state_dict().items()})

    monkeypatch.setattr(Recorder, "on_train_epoch_end", look)
    train("run", "train.freeze=backbone", "train.unfreeze=[1, 2]", "train.epochs=3", "train.weight_decay=0.5")
    moved = [
        {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
        for before, after in itertools.pairwise(states)
    ]
    assert moved[0] == {"layer4", "fc"}
    assert moved[1] == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}


def test_what_is_frozen_and_how_it_is_trained_is_said(train, capsys):
    train(
        "run",
        "train.freeze=backbone",
        "train.unfreeze=[1]",
        "train.lr_scales=[0.1, 0.5, 1]",
        "train.schedule=step",
        "train.accumulate=2",
        "train.progressive_size=[0.5]",
        "data.image_size=64",
        quiet=False,
    )
    said = capsys.readouterr().out
    for phrase in (
        "parameters are frozen; frozen then: 0 of 5 parts from epoch 2",
        "training: adamw, 3 learning rates, from 0.1 to 1 of train.lr (0.003 at the highest), schedule step",
        "batch: 2 x 8 images a step (as the recipe says)",
        "torch.compile: off (compiling whole networks gained nothing on a CPU (measured))",
        "fused optimiser: on",
        "TF32: off",
        "channels last: on",
        "precision: 32-true (bf16 is only chosen on a GPU that has it)",
        "training images grow: 32x32 from epoch 1, 64x64 from epoch 2",
    ):
        assert phrase in said, phrase


def test_accumulation_equals_the_larger_batch(train):
    # SGD without BatchNorm's dependence on the batch: statistics of a frozen backbone stand still.
    same = ["train.freeze=backbone", "train.optimizer=sgd", "train.epochs=1", "augment.mixup=0", "augment.cutmix=0"]
    same += ["data.val_fraction=0.2", "data.test_fraction=0.13"]  # leaves 24 images
    one = train("one", "train.batch_size=8", *same)
    two = train("two", "train.batch_size=4", "train.accumulate=2", *same)
    assert rows(one)[0]["step"] == rows(two)[0]["step"] == "3"
    first, second = load_file(one.weights_file), load_file(two.weights_file)
    for key in first:
        assert torch.allclose(first[key], second[key], rtol=1e-4, atol=1e-6), key


def test_training_stops_early(train, capsys):
    run = train("run", "train.epochs=30", "train.early_stop=2", "train.lr=1e-7", quiet=False)
    assert "early stop: 2 epochs in a row without a better one" in capsys.readouterr().out
    assert run.info["best_epoch"] == len(rows(run)) - 3
    assert len(rows(run)) < 30


def test_an_early_stop_is_remembered(train, monkeypatch):
    """Killed after the checkpoint of the last epoch and before the end: the run goes on to its evaluation only."""
    from r2kit.train import flow

    overrides = ["train.epochs=30", "train.early_stop=2", "train.lr=1e-7"]

    def die(run):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(flow, "evaluate", die)
        with pytest.raises(Killed):
            train("run", *overrides)
    run = train("run", *overrides, resume=True)
    assert run.info["best_epoch"] == len(rows(run)) - 3


def test_a_plateau_lowers_the_rate():
    class Module(ClassificationTask):
        def __init__(self):
            self.reductions, self.final_form, self.recipe = 0, True, Recipe()

        def set_reductions(self, reductions):
            self.reductions = reductions

        __setattr__ = object.__setattr__

    class Trainer:
        should_stop = False

    watch, module = Patience(2, 4, Console(quiet=True)), Module()
    found = []
    for accuracy in (0.5, 0.4, 0.4, 0.6, 0.5, 0.5, 0.5):
        object.__setattr__(module, "epoch_metrics", {"val_acc": accuracy, "val_loss": 1.0})
        watch.on_train_epoch_end(Trainer, module)
        found.append(module.reductions)
    assert found == [0, 0, 1, 1, 1, 2, 2]
    assert not Trainer.should_stop
    again = Patience(2, 3, Console(quiet=True))
    again.load_state_dict(watch.state_dict())
    again.on_train_start(Trainer, module)
    assert Trainer.should_stop


def with_clock(monkeypatch, seconds_per_batch):
    """Let a batch take a fixed time, however long it takes."""
    clock = Clock()
    original = TimeLimit.__init__
    monkeypatch.setattr(TimeLimit, "__init__", lambda self, limit, console: original(self, limit, console, clock))
    step = ClassificationTask.training_step

    def slow(self, batch, batch_idx):
        clock.now += seconds_per_batch
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", slow)
    return clock


def test_training_is_deterministic_and_spares_what_a_cpu_does_not_need(train, monkeypatch):
    seen, seeds = [], []
    step, seed = ClassificationTask.training_step, torch.manual_seed

    def look(self, batch, batch_idx):
        filling = torch.utils.deterministic.fill_uninitialized_memory
        seen.append((torch.are_deterministic_algorithms_enabled(), filling, torch.initial_seed()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", look)
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(len(seen)) or seed(number))
    train("run", "train.epochs=1")
    assert {found[:2] for found in seen} == {(True, False)}
    assert len({found[2] for found in seen}) == len(seen) == 3  # each step has a seed of its own
    assert not [place for place in seeds if 0 < place < 3]  # which writes down the stack for a GPU
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_the_schedule_fits_the_time(train, monkeypatch, capsys):
    with_clock(monkeypatch, 1.0)
    run = train("run", "train.epochs=1000", "train.time_limit=10s", "train.warmup_epochs=0", quiet=False)
    said = capsys.readouterr().out
    assert "estimated training time: 10 s, the limit" in said
    assert "time limit: 10 s of training are over" in said
    found = rows(run)
    assert found[-1]["step"] == "11"  # the eleventh begins when ten are over
    assert float(found[-1]["lr"]) == pytest.approx(0.0, abs=1e-9)
    assert float(found[0]["lr"]) > 0.001
    assert run.info["best_epoch"] < len(found)


def test_the_last_share_of_the_time_is_not_mixed(train, monkeypatch):
    clock = with_clock(monkeypatch, 1.0)
    mixed = []
    original = DataModule.mix

    def mix(self, *arguments):
        mixed.append(clock.now)
        return original(self, *arguments)

    monkeypatch.setattr(DataModule, "mix", mix)
    begun = clock.now
    overrides = ["train.epochs=10", "train.time_limit=10s", "augment.mixup=1", "augment.cutmix=0"]
    train("run", *overrides, "augment.mix_off_epochs=3")
    # A batch is mixed before the clock of its step is read: the one after seven seconds still knows of six.
    # Before and after, the pages of the run show mixed images.
    assert [now - begun for now in mixed if 0 < now - begun < 11] == [1, 2, 3, 4, 5, 6, 7]


def test_the_time_used_is_remembered(train, monkeypatch):
    overrides = ["train.epochs=1000", "train.time_limit=12s", "train.ema=true"]
    clock = with_clock(monkeypatch, 1.0)
    whole = train("whole", *overrides)
    original = Recorder.on_train_epoch_end

    def stop(self, trainer, module):
        if trainer.current_epoch == 1:
            raise Killed
        original(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "on_train_epoch_end", stop)
        with pytest.raises(Killed):
            train("broken", *overrides)
    clock.now += 1e6  # the interruption itself does not count
    broken = train("broken", *overrides, resume=True)
    assert broken.metrics_csv.read_bytes() == whole.metrics_csv.read_bytes()
    first, second = load_file(whole.weights_file), load_file(broken.weights_file)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_images_grow_in_multiples_of_16_pixels():
    spec = TrainSpec(progressive_size=(0.5, 0.75), epochs=9)
    assert [scaled_size((224, 320), spec.size_share(epoch)) for epoch in (0, 2, 3, 5, 6, 8)] == [
        (112, 160),
        (112, 160),
        (160, 240),
        (160, 240),
        (224, 320),
        (224, 320),
    ]
    assert scaled_size((48, 24), 0.1) == (32, 24)


def test_masks_and_boxes_follow_the_image():
    mask = torch.zeros(2, 64, 32, dtype=torch.int64)
    mask[:, 32:] = 7
    batch = {
        "image": torch.rand(2, 3, 64, 32),
        "label": torch.tensor([0, 1]),
        "mask": mask,
        "saliency": mask[:, None].float() / 7,
        "boxes": [torch.tensor([[8.0, 16.0, 16.0, 64.0]]), torch.zeros(0, 4)],
        "masks": [mask[:1] > 0, torch.zeros(0, 64, 32, dtype=torch.bool)],
    }
    small = resize_batch(batch, (32, 16))
    assert small["image"].shape == (2, 3, 32, 16)
    assert small["mask"].dtype == torch.int64
    assert set(small["mask"][:, :16].unique().tolist()) == {0}
    assert set(small["mask"][:, 16:].unique().tolist()) == {7}
    assert small["saliency"].shape == (2, 1, 32, 16)
    assert small["boxes"][0].tolist() == [[4.0, 8.0, 8.0, 32.0]]
    assert small["masks"][0].dtype == torch.bool
    assert small["masks"][0].sum() == 16 * 16
    assert small["masks"][1].shape == (0, 32, 16)
    assert batch["image"].shape == (2, 3, 64, 32)
    assert resize_batch(batch, (64, 32)) is batch


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.time_limit=soon"], "train.time_limit: 'soon': allowed is a time such as 90s, 30m, 2h or 1h30m"),
        (["train.time_limit=0m"], "train.time_limit: '0m': allowed is a time"),
        (["train.unfreeze=[1]"], "train.unfreeze: nothing is frozen; set train.freeze=backbone"),
        (["train={freeze: backbone, unfreeze: [2, 1]}"], r"train.unfreeze: \[2, 1\] must grow"),
        (["train={freeze: backbone, unfreeze: [10]}"], "train.unfreeze: 10 is not reached in 10 epochs"),
        (["train={freeze: backbone, layer_decay: 0.5}"], "train.layer_decay: only the head is trained"),
        (["train={lr_scales: [1, 1, 1], layer_decay: 0.5}"], "train.layer_decay: both it and lr_scales"),
        (
            ["train.lr_scales=[1, 2]"],
            r"train.lr_scales: got \[1, 2\] \(a list\), allowed is a list of 3, each a number",
        ),
        (["train.unfreeze=[x]"], r"allowed is a list, each a whole number at least 1"),
        (["train.step_epochs=5"], "train.step_epochs: belongs to schedule step, and schedule is 'cosine'"),
        (["train={schedule: step, step_epochs: [5, 3]}"], r"train.step_epochs: \[5, 3\] must grow"),
        (["train={schedule: step, step_epochs: [5, 10]}"], "train.step_epochs: 10 is not reached in 10 epochs"),
        (["train.lr_factor=0.5"], "train.lr_factor: belongs to schedule step and plateau"),
        (["train.plateau_patience=9"], "train.plateau_patience: belongs to schedule plateau"),
        (["train.nesterov=false"], "train.nesterov: belongs to optimizer sgd, and optimizer is 'adamw'"),
        (["train={optimizer: sgd, momentum: 0.0}"], "train.nesterov: needs a momentum above 0"),
        (["train={optimizer: sgd, momentum: 0.8, schedule: one_cycle}"], "train.momentum: one_cycle moves it"),
        (["train.progressive_size=[0.75, 0.5]"], "train.progressive_size: the images grow"),
        (["train={progressive_size: [0.5], epochs: 1}"], "train.progressive_size: 1 smaller sizes and the full one"),
    ],
)
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        r2kit.load_recipe({}, overrides)


def test_times_are_read():
    assert [TrainSpec(time_limit=text).time_limit_seconds for text in ("90s", "30m", "1h30m", "2d", "1h 5m")] == [
        90,
        1800,
        5400,
        172800,
        3900,
    ]


def test_the_warm_up_of_each_schedule():
    warmup = {kind: TrainSpec(schedule=kind).warmup for kind in ("cosine", "one_cycle", "step", "plateau", "constant")}
    assert warmup == {"cosine": 0.5, "one_cycle": 3.0, "step": 0.0, "plateau": 0.5, "constant": 0.5}
    assert TrainSpec(schedule="step", warmup_epochs=2.0).warmup == 2.0


_TWO = """
import sys, torch
import r2kit
from r2kit.callbacks import Recorder
from r2kit.data.datamodule import DataModule
original = Recorder.on_train_epoch_end
sums = []
def look(self, trainer, module):
    mine = torch.stack([p.detach().double().sum() for p in module.model.parameters()])
    every = [torch.zeros_like(mine) for _ in range(2)]
    torch.distributed.all_gather(every, mine)
    assert torch.equal(every[0], every[1]), trainer.current_epoch
    sums.append(mine)
    original(self, trainer, module)
Recorder.on_train_epoch_end = look
r2kit.finetune(sys.argv[1], out=sys.argv[2], quiet=True)
moved = [int((a != b).sum()) for a, b in zip(sums, sums[1:])]
assert moved[0] > 2 and moved[1] == len(sums[0]), moved
print("in step")
"""


@pytest.mark.slow
def test_processes_stay_in_step_when_stages_are_freed(quick_recipe, tmp_path):
    """A stage freed behind DistributedDataParallel's back would have its own gradients in each process."""
    overrides = ["train={freeze: backbone, unfreeze: [1, 2], epochs: 3, batch_size: 4, strategy: ddp}"]
    (tmp_path / "quick.yaml").write_text(to_yaml(r2kit.load_recipe(quick_recipe, overrides)))
    (tmp_path / "two.py").write_text(_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tmp_path / "two.py"), str(tmp_path / "quick.yaml"), str(tmp_path / "run")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("in step") == 2
