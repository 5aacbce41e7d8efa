"""When training ends before its last epoch, and when it slows down: a time limit, and epochs without a better one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from r2kit.console import duration
from r2kit.schedules import reductions, since_best
from r2kit.tasks import Task


class TimeLimit(Callback):
    """Lets the schedule run its course within a time, and ends training with a last validation when it is over.

    The seconds used are part of the checkpoint: a run that goes on has what the interrupted one left. With several
    processes the clock of the first one counts for all.

    Args:
        limit: Seconds of training.
        console: Where the end is announced.
        clock: Returns seconds.
    """

    def __init__(self, limit: float, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.console = console
        self.clock = clock
        self._earlier = 0.0
        self._share = 0.0
        self._validation = 0.0  # seconds that the last one took: the next one has to fit in too
        self._started = self._validation_started = clock()

    @property
    def seconds(self) -> float:
        """Seconds used, those before an interruption included."""
        return self._earlier + self.clock() - self._started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; the schedule stands where it stood."""
        assert isinstance(pl_module, Task)
        self._started = self.clock()
        pl_module.time_share = trainer.datamodule.time_share = self._share
        pl_module.seconds_left = self.limit - self._earlier

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the schedule and the mixing the time."""
        assert isinstance(pl_module, Task)
        seconds = self.seconds
        if trainer.world_size > 1:
            shared = torch.tensor(seconds, dtype=torch.float64, device=pl_module.device)
            torch.distributed.broadcast(shared, 0)
            seconds = float(shared)
        self._share = max(self._share, min(1.0, (seconds + self._validation) / self.limit))
        pl_module.time_share = trainer.datamodule.time_share = self._share
        pl_module.seconds_left = max(0.0, self.limit - seconds)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End training when the time is over."""
        if self._share >= 1.0 and not trainer.should_stop:
            trainer.should_stop = True
            self.console.print(f"time limit: {duration(self.limit)} of training are over; a last validation follows")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self._validation_started = self.clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember how long it took."""
        self._validation = self.clock() - self._validation_started

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds used and where the schedule stands."""
        return {"seconds": self.seconds, "share": self._share, "validation": self._validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what is left."""
        self._earlier = state_dict["seconds"]
        self._share = state_dict["share"]
        self._validation = state_dict["validation"]


class Patience(Callback):
    """Counts epochs without a better one: lowers the learning rate at a plateau, ends training early.

    Both are functions of what the epochs reached, which is part of the checkpoint. Every process holds the same metrics
    and decides alike.

    Args:
        plateau: Epochs without a better one before the learning rate is reduced; None for never.
        early_stop: Epochs without a better one before training ends; None for never.
        console: Where both are announced.
    """

    def __init__(self, plateau: int | None, early_stop: int | None, console: Console) -> None:
        self.plateau = plateau
        self.early_stop = early_stop
        self.console = console
        self.scores: list[tuple[float, ...]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stand where the interrupted run stood."""
        self._apply(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what the epoch reached; this runs before the checkpoint of the epoch is written."""
        assert isinstance(pl_module, Task)
        if pl_module.final_form:
            self.scores.append(tuple(pl_module.score(pl_module.epoch_metrics)))
            self._apply(trainer, pl_module)

    def _apply(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if self.plateau is not None:
            count = reductions(self.scores, self.plateau)
            if count > pl_module.reductions:
                self.console.print(f"plateau: {self.plateau} epochs without a better one, the learning rate is reduced")
            pl_module.set_reductions(count)
        if self.early_stop is not None and since_best(self.scores) >= self.early_stop:
            trainer.should_stop = True
            self.console.print(f"early stop: {self.early_stop} epochs in a row without a better one")

    def state_dict(self) -> dict[str, Any]:
        """Return what each epoch reached; plain values only."""
        return {"scores": [list(score) for score in self.scores]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what the epochs of the interrupted run reached."""
        self.scores = [tuple(score) for score in state_dict["scores"]]
