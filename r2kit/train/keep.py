"""Nothing is lost: checkpoints at any step, and a run that goes on from one as if it had never stopped."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from r2kit.callbacks import Ema, Recorder
from r2kit.data.datamodule import DataModule
from r2kit.errors import Interrupted, R2kitError, RunError
from r2kit.recipe.train import TrainSpec
from r2kit.run import Run
from r2kit.train.guard import Guard
from r2kit.train.signals import StopSignals


class Keeper(Checkpoint):
    """Saves a checkpoint after each epoch, now and then within one, and when somebody asks the run to stop.

    A checkpoint stands at a position: an epoch, and how many of its batches are done. Zero is the start of an epoch;
    all of them is the moment before its validation, which changes nothing and is simply done again. It is only taken
    where an optimiser step is complete, so that no gradient needs to be kept. What is computed from it is what the
    unbroken run computes: the order of the images, their augmentation and every random number are functions of the
    seed and the position, and everything else is in the file.

    It stands last among the callbacks, so that what the others did at the step is in the file.

    Args:
        run: The run folder.
        recorder: Knows the rows, and whether an epoch was the best.
        guard: Knows whether the loss still is a number.
        signals: Knows whether somebody asked the run to stop.
        spec: The recipe's `train` section.
        ema: The moving average, where there is one.
    """

    def __init__(
        self, run: Run, recorder: Recorder, guard: Guard, signals: StopSignals, spec: TrainSpec, ema: Ema | None
    ) -> None:
        self.run = run
        self.recorder = recorder
        self.guard = guard
        self.signals = signals
        self.ema = ema
        self.seconds, self.steps = spec.checkpoint_seconds, spec.checkpoint_steps
        self._at = (0, 0)  # the position that is being saved
        self._ended = False  # an epoch has ended and is not saved yet
        self._stopped = False  # the run that goes on had decided to train no further
        self._saved_step, self._saved_time = 0, 0.0
        self._between = True  # no batch is being worked on
        self._group: Any = None  # talks to the other processes on the CPU, without waiting for the device

    # ---------------------------------------------------------------------------------------------- going on

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the data start where the run stopped.

        Raises:
            RunError: If the run trained on another number of devices, to whose batches there is no going back.
        """
        position = checkpoint["position"]
        if position["devices"] != trainer.world_size:
            raise RunError(
                f"{self.run.path}: trained on {position['devices']} device(s), and {trainer.world_size} would make "
                f"other batches of the same images; go on with train.devices={position['devices']}"
            )
        data = trainer.datamodule
        assert isinstance(data, DataModule)
        batch, images = position["batch"], position.get("images", data.batch_size)  # the first versions did not say
        if images != data.batch_size:  # memory ran out, and a pass has fewer images since
            batches = len(data.train_dataloader())
            batch = batches if batch == position["batches"] else batch * images // data.batch_size
            set_counters(checkpoint["loops"]["fit_loop"], position["epoch"], batch, batches, position["step"])
        data.start_at(position["epoch"], batch)
        self._stopped = position["stopped"]
        self._saved_step = position["step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from Lightning; from here on there is something to save."""
        trainer.should_stop = trainer.should_stop or self._stopped
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        self._saved_time = time.monotonic()
        self.signals.take_back()
        self.signals.training = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell Lightning that it is not restarting any more.

        It would remember until the end of the epoch, and then leave out what it does between two epochs.
        """
        trainer.fit_loop._restarting = False
        self._between = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same where a run goes on with a validation."""
        trainer.fit_loop._restarting = False

    # ------------------------------------------------------------------------------------------------ saving

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, or when somebody asked the run to stop."""
        self._between = True
        if trainer.fit_loop._should_accumulate():
            return
        stop, due, lost = self._agree(
            trainer, self.signals.noted is not None, self._is_due(trainer), self.guard.problem is not None
        )
        if lost:
            raise RunError(self.guard.stop(self._kept()))
        if stop or due:
            self._save(trainer, pl_module, trainer.current_epoch, batch_idx + 1)
        if stop:
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the position before the validation when somebody asked the run to stop."""
        stop, *_ = self._agree(trainer, self.signals.noted is not None, False, False)
        if stop:
            if self.ema is not None:
                self.ema.put_back(pl_module)
            self._save(trainer, pl_module, trainer.current_epoch, trainer.fit_loop.batch_idx + 1)
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember to save; Lightning has still to move the schedules that follow a metric."""
        self._ended = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the epoch that has ended."""
        self._save_ended(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last epoch, and stop if somebody asked for it since the last step, or before there was one."""
        self._save_ended(trainer, pl_module)
        self.signals.training = False
        stop, *_ = self._agree(trainer, self.signals.noted is not None, False, False)
        if stop:
            self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save if somebody asked the run to stop and the loader processes ended before the next batch came."""
        self.signals.training = False  # a signal now stops the process at once
        loop = trainer.fit_loop
        waited = self._between and trainer.training and not loop._should_accumulate() and loop.epoch_loop.batch_idx >= 0
        if (
            self.signals.noted is None
            or isinstance(exception, R2kitError | Interrupted)
            or not waited
            or trainer.world_size > 1
        ):
            return
        self._save(trainer, pl_module, trainer.current_epoch, loop.epoch_loop.batch_idx + 1)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the position, and Lightning's own counters as they must stand for it to go on there."""
        epoch, batch = self._at
        batches = int(trainer.num_training_batches)
        checkpoint["position"] = {
            "epoch": epoch,
            "batch": batch,
            "batches": batches,
            "images": trainer.datamodule.batch_size,  # of a batch
            "step": trainer.global_step,
            "devices": trainer.world_size,
            "stopped": bool(trainer.should_stop) and batch == 0,
        }
        set_counters(checkpoint["loops"]["fit_loop"], epoch, batch, batches, trainer.global_step)

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether enough steps or seconds have gone by since the last checkpoint."""
        if self.steps is not None:
            return trainer.global_step - self._saved_step >= self.steps
        return time.monotonic() - self._saved_time >= self.seconds

    def _agree(self, trainer: L.Trainer, stop: bool, due: bool, lost: bool) -> tuple[bool, bool, bool]:
        """Return what any process wants of a stop or an end, and the first process of a checkpoint: the same in all."""
        if trainer.world_size == 1:
            return stop, due, lost
        wanted = torch.tensor([stop, due and trainer.is_global_zero, lost], dtype=torch.uint8)
        torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX, group=self._group)
        stop, due, lost = (bool(value) for value in wanted)
        return stop, due, lost

    def _save_ended(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._ended:
            return
        self._ended = False
        self._save(trainer, pl_module, trainer.current_epoch, 0, best=self.recorder.better)
        stop, *_ = self._agree(trainer, self.signals.noted is not None, False, False)
        if stop:
            self._stop(trainer)

    def _save(
        self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int, batch: int, *, best: bool = False
    ) -> None:
        """Save at a position; every process calls this, the first one writes.

        Raises:
            RunError: If the file cannot be written, or a weight is no number any more.
        """
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in pl_module.parameters()])
        if not bool(finite.all()):
            names = [name for (name, _), fine in zip(pl_module.named_parameters(), finite, strict=True) if not fine]
            raise RunError(self.guard.not_finite(names, self._kept()))
        self._at = (epoch, batch)
        files = {"previous": self.run.previous_checkpoint, "also": self.run.best_checkpoint if best else None}
        trainer.save_checkpoint(self.run.last_checkpoint, weights_only=False, storage_options=files)
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def _kept(self) -> str:
        """Say which checkpoint is the last good one."""
        if not self.run.last_checkpoint.is_file():
            return "no checkpoint was due before it"
        return f"the last good checkpoint, of step {self._saved_step}, is {self.run.last_checkpoint}"

    def _stop(self, trainer: L.Trainer) -> None:
        raise Interrupted(
            self.signals.noted,
            f"saved at step {trainer.global_step}; go on with r2kit resume {self.run.path}",
        )


def set_counters(loop: dict[str, Any], epoch: int, batch: int, batches: int, steps: int) -> None:
    """Set the counters of Lightning's training loop to a position; changes `loop`.

    Saved as they are, they go on right from some hooks and wrong from others (Lightning issues 18780 and 19764 among
    them): from the middle of a validation, for example, with the rest of it.

    Args:
        loop: The state of the loop in a checkpoint.
        epoch: Epochs that are complete.
        batch: Batches of the next one that are done; all of them stands for the moment before its validation.
        batches: Batches of an epoch.
        steps: Optimiser steps taken.
    """

    def progress(state: dict[str, Any], total: int, current: int, begun: int = 0) -> None:
        for name, done in (("total", total), ("current", current)):
            state[name] = {"ready": done + begun, "started": done + begun, "processed": done, "completed": done}

    underway = int(batch > 0)
    progress(loop["epoch_progress"], epoch, epoch, begun=underway)
    progress(loop["epoch_loop.batch_progress"], epoch * batches + batch, batch)
    loop["epoch_loop.batch_progress"]["is_last_batch"] = batch == batches
    # One batch begun and none done: Lightning then starts the validation from its first batch.
    progress(loop["epoch_loop.val_loop.batch_progress"], 0, 0, begun=int(batch == batches))
    loop["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False
    # The number that loggers write; it moves on after the validation.
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - int(batch == batches)
