import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from r2kit.callbacks import Ema, Progress, Recorder
from r2kit.recipe import Recipe
from r2kit.run import Run


def test_ema_forgets_the_random_start_of_a_short_run():
    average = Ema(0.999)._kwargs["avg_fn"]
    value = torch.tensor(100.0)  # the random start
    for count in range(1, 30):
        value = average(value, torch.tensor(1.0), count)
    assert value.item() == pytest.approx(1.0, abs=0.02)  # a fixed decay of 0.999 would still stand at 97
    late = average(torch.tensor(0.0), torch.tensor(1.0), 10**6)
    assert late.item() == pytest.approx(1 - 0.999)


def test_recorder_gives_its_rows_back(tmp_path):
    recorder = Recorder(Run.create(Recipe(), tmp_path / "run"), Console(file=io.StringIO()))
    recorder.rows = [{"epoch": 0, "step": 3, "lr": 0.1 + 0.2}]
    recorder.best_epoch = 0
    other = Recorder(recorder.run, recorder.console)
    other.load_state_dict(recorder.state_dict())
    assert other.rows == recorder.rows
    assert other.best_epoch == 0
    assert other.earlier_seconds > 0


def test_progress_speaks_seldom_where_there_is_no_terminal():
    console = Console(file=io.StringIO(), width=100)
    trainer = SimpleNamespace(current_epoch=0, max_epochs=2, num_training_batches=50)
    progress = Progress(console, every=0.0)
    progress.on_train_epoch_start(trainer, None)
    progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.25)}, None, 9)
    assert console.file.getvalue() == "epoch 1/2  step 10/50  loss 1.250\n"
    patient = Progress(Console(file=io.StringIO()), every=1000.0)
    patient.on_train_epoch_start(trainer, None)
    patient.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.25)}, None, 9)
    assert patient.console.file.getvalue() == ""


def test_the_bar_goes_away_when_training_fails():
    console = Console(file=io.StringIO(), force_terminal=True)
    trainer = SimpleNamespace(current_epoch=0, max_epochs=2, num_training_batches=50)
    progress = Progress(console)
    progress.on_train_epoch_start(trainer, None)
    assert progress._bar is not None
    progress.on_exception(trainer, None, RuntimeError())
    assert progress._bar is None


def test_the_share_of_waiting_is_said(monkeypatch):
    clock = iter([0.0, 3.0, 4.0, 4.0, 5.0, 100.0, 100.0, 103.0])
    monkeypatch.setattr("r2kit.callbacks.time.perf_counter", lambda: next(clock))
    console = Console(file=io.StringIO(), width=100)
    progress = Progress(console, every=1000.0)
    trainer = SimpleNamespace(current_epoch=0, max_epochs=2, num_training_batches=2)
    progress.on_train_epoch_start(trainer, None)  # at 0
    for index in range(2):  # waits for 3, works for 1; waits for 0, works for 1
        progress.on_train_batch_start(trainer, None, None, index)
        progress.on_train_batch_end(trainer, None, None, None, index)
    progress.on_train_epoch_start(trainer, None)  # at 100: what happened between epochs does not count
    progress.on_train_batch_start(trainer, None, None, 0)
    progress.on_train_batch_end(trainer, None, None, None, 0)
    assert progress.waiting == 3 / 8
    progress.on_train_end(trainer, None)
    assert "waiting for images: 38 % of the training steps" in console.file.getvalue()
