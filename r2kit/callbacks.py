"""What happens around training: the epoch record, the checkpoints, the moving average, the progress lines."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EMAWeightAveraging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from r2kit.backbones.warmstart import anneal_beta, set_beta
from r2kit.console import duration
from r2kit.run import Run, write_atomic
from r2kit.tasks import Task


class Recorder(Checkpoint):
    """Writes `metrics.csv` at the end of each epoch, and knows which was the best.

    The rows are part of the checkpoint, so that a run that is continued writes the file that the unbroken run would
    have written. Times are not among them: two runs of one seed give identical files.

    Args:
        run: The run folder.
        console: Where the line of the epoch is printed.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.run = run
        self.console = console
        self.rows: list[dict[str, float]] = []
        self.best_epoch = -1
        self.better = False  # whether the epoch that ended last is the best
        self.earlier_seconds = 0.0
        self._earlier_rows = 0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.earlier_seconds + time.perf_counter() - self._started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of the epoch; `Checkpoint` callbacks come after the module's own hook."""
        assert isinstance(pl_module, Task)
        found = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            **pl_module.epoch_metrics,
        }
        self.rows.append({column: found[column] for column in ("epoch", "step", "lr", *pl_module.columns)})
        self.better = pl_module.final_form and (
            self.best_epoch < 0 or pl_module.score(self.rows[-1]) > pl_module.score(self.rows[self.best_epoch])
        )
        if self.better:
            self.best_epoch = len(self.rows) - 1
        if trainer.is_global_zero:
            write_atomic(self.run.metrics_csv, epochs_csv(self.rows))
        self._print(trainer, pl_module.seconds_left)

    def _print(self, trainer: L.Trainer, seconds_left: float | None) -> None:
        row = self.rows[-1]
        here = (self.seconds - self.earlier_seconds) / (len(self.rows) - self._earlier_rows)
        left = here * ((trainer.max_epochs or 0) - len(self.rows))
        left = left if seconds_left is None else min(left, seconds_left)
        self.console.print(
            f"epoch {len(self.rows)}/{trainer.max_epochs}  "
            f"{_words(row, 'train')}  {_words(row, 'val')}  "
            f"lr {row['lr']:.2g}  {duration(left)} left{'  (best)' if self.better else ''}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far; plain values only."""
        return {"rows": self.rows, "best_epoch": self.best_epoch, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of the interrupted run."""
        self.rows = list(state_dict["rows"])
        self._earlier_rows = len(self.rows)
        self.best_epoch = state_dict["best_epoch"]
        self.earlier_seconds = state_dict["seconds"]


def epochs_csv(rows: Sequence[dict[str, float]]) -> str:
    """Return the text of `metrics.csv`: a header and a row for each epoch."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: value if isinstance(value, int) else f"{value:.9g}" for key, value in row.items()})
    return out.getvalue()


def _words(row: dict[str, float], stage: str) -> str:
    """The metrics of one stage of an epoch, for example ``train loss 0.512 acc 0.800``."""
    found = {key.removeprefix(f"{stage}_"): value for key, value in row.items() if key.startswith(f"{stage}_")}
    return " ".join([stage, *(f"{key} {value:.3f}" for key, value in found.items())])


class Ema(EMAWeightAveraging):
    """Lightning's moving average with a decay that starts low.

    A decay of 0.999 remembers about a thousand steps; in a short run most of its weight would rest on the random
    start. The decay of step n is therefore at most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage.

    Args:
        decay: Largest decay, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)

        def average(mean: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            ramped = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
            return mean + (1.0 - ramped) * (current - mean)

        self._kwargs["avg_fn"] = average
        self._swapped = False  # the network holds the average while it is validated

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the network."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights that are trained back."""
        self.put_back(pl_module)

    def put_back(self, pl_module: L.LightningModule) -> None:
        """Put the weights that are trained back, if a validation has them out."""
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False


class AnnealBeta(Callback):
    """Turns the activation of a warm-started Res2NetPlus from ReLU into Mish while it trains.

    Beta is a function of the step, so that a continued run needs nothing stored. It stands behind `Ema` in the list of
    callbacks: the average of many betas is none, so the network that is validated gets the beta of the step.

    Args:
        until: Share of training after which beta is 1.
    """

    def __init__(self, until: float) -> None:
        self.until = until

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set beta for the step."""
        self._set(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set beta for the validation, and say whether the network is in its final form."""
        assert isinstance(pl_module, Task)
        pl_module.final_form = self._set(trainer, pl_module) == 1.0

    def _set(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float:
        assert isinstance(pl_module, Task)
        beta = anneal_beta(pl_module.progress, until=self.until)
        set_beta(pl_module, beta)
        return beta


class Progress(Callback):
    """A bar on a terminal; elsewhere a line now and then within a long epoch. At the end, the share spent on waiting.

    A step waits for its images from the end of the step before it, or the start of the epoch.

    Args:
        console: Where to print.
        every: Seconds between two lines within an epoch, where there is no terminal.
    """

    def __init__(self, console: Console, every: float = 30.0) -> None:
        self.console = console
        self.every = every
        self._bar: Bar | None = None
        self._said = 0.0
        self._idle_since = 0.0
        self._step_since = 0.0
        self._waited = 0.0
        self._worked = 0.0

    @property
    def waiting(self) -> float:
        """Share of the training steps so far that was spent on waiting for images."""
        return self._waited / max(self._waited + self._worked, 1e-9)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the bar of an epoch."""
        self._said = self._idle_since = time.perf_counter()
        self._start(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the bar of an epoch of which a part is done, and which does not start again."""
        if trainer.fit_loop.restarted_mid_epoch:
            self.on_train_epoch_start(trainer, pl_module)

    def _start(self, trainer: L.Trainer) -> None:
        if self.console.is_terminal and not self.console.quiet:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=self.console,
                transient=True,
            )
            self._bar.add_task(self._epoch(trainer), total=trainer.num_training_batches, loss="")
            self._bar.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time since the last step: the batch is here."""
        self._step_since = time.perf_counter()
        self._waited += self._step_since - self._idle_since

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how long the device had nothing to do."""
        if self._worked:
            self.console.print(f"waiting for images: {100 * self.waiting:.0f} % of the training steps")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line when the last one is long ago."""
        now = self._idle_since = time.perf_counter()
        self._worked += now - self._step_since
        if self._bar is None and now - self._said < self.every:
            return
        loss = float(torch.as_tensor(outputs["loss"]).detach()) if isinstance(outputs, dict) else float("nan")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=batch_idx + 1, loss=f"loss {loss:.3f}")
        else:
            self._said = now
            step, steps = batch_idx + 1, trainer.num_training_batches
            self.console.print(f"{self._epoch(trainer)}  step {step}/{steps}  loss {loss:.3f}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the bar away, so that the error stands alone."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _epoch(self, trainer: L.Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
