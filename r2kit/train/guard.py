"""A loss that is no number any more, or grows without bound, stops the run and leaves what is needed to see why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import Tensor

from r2kit.errors import RunError
from r2kit.run import Run, write_atomic

STEPS = 20
"""Batches whose mean loss is compared: one batch may be an accident."""


class Guard(Callback):
    """Watches the loss of every batch.

    The loss explodes when the mean of the last `STEPS` batches is more than `limit` times that of the first ones.

    Args:
        run: The run folder.
        limit: How many times; None watches for infinities and NaN only.
    """

    def __init__(self, run: Run, limit: float | None) -> None:
        self.run = run
        self.limit = limit
        self.problem: str | None = None
        self._first: list[float] = []
        self._last: list[float] = []
        self._mend = ""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss; keep the batch if something is wrong with it."""
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning has divided it
        if math.isfinite(loss):
            (self._first if len(self._first) < STEPS else self._last).append(loss)
            del self._last[:-STEPS]
        if self.problem is not None or (math.isfinite(loss) and not self._explodes()):
            return
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        what = f"the loss is {loss:g}" if not math.isfinite(loss) else self._growth()
        where = f"epoch {trainer.current_epoch + 1}, step {batch_idx + 1}"
        kept = self._keep(trainer, batch, {"epoch": trainer.current_epoch, "batch": batch_idx, "loss": str(loss)})
        broken = sum(int((~value.isfinite()).sum()) for value in batch.values() if _is_float(value))
        self.problem = f"{where}: {what}; its batch is kept in {kept}"
        self._mend = (
            f"it holds {broken} values that are no numbers, see its images in {kept.with_suffix('.json').name}"
            if broken
            else f"its pixels are numbers, so lower train.lr (now {rate:.2g}) or set train.gradient_clip=1"
        )

    def stop(self, kept: str) -> str:
        """Return the line with which training ends, given which checkpoint is the last good one."""
        if self.problem is None:  # in another process, which says more
            return f"another process of the run stopped at its loss; {kept}"
        return f"{self.problem}; {kept}; {self._mend}"

    def not_finite(self, names: list[str], kept: str) -> str:
        """Return the line with which training ends when weights are no numbers, though the loss still was one."""
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return (
            f"{names[0]}{more}: weights that are no numbers; {kept}; lower train.lr or set train.gradient_clip=1, and "
            f"start again with --overwrite"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the losses that are compared."""
        return {"first": self._first, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the losses of the interrupted run."""
        self._first, self._last = list(state_dict["first"]), list(state_dict["last"])

    def _explodes(self) -> bool:
        return self.limit is not None and len(self._last) == STEPS and self._times() > self.limit

    def _times(self) -> float:
        first = sum(map(abs, self._first)) / STEPS
        return sum(map(abs, self._last)) / STEPS / first if first > 0 else 0.0

    def _growth(self) -> str:
        return (
            f"the loss explodes: {sum(self._last) / STEPS:.3g} on average of {STEPS} batches, {self._times():.0f} "
            f"times that of the first ones (train.max_loss_growth={self.limit:g})"
        )

    def _keep(self, trainer: L.Trainer, batch: dict[str, Any], facts: dict[str, Any]) -> Path:
        """Write a batch as the network saw it, and which images it holds; return the file."""
        rank = f"-rank{trainer.global_rank}" if trainer.global_rank else ""
        file = self.run.path / f"bad_batch{rank}.safetensors"
        tensors: dict[str, Tensor] = {}
        for key, value in batch.items():
            parts = {key: value} if isinstance(value, Tensor) else {f"{key}.{i}": v for i, v in enumerate(value)}
            tensors.update({name: part.detach().cpu().contiguous().clone() for name, part in parts.items()})
        manifest = trainer.datamodule.source.manifest.iloc[batch["index"].tolist()]
        text = {
            **facts,
            "row": batch["index"].tolist(),
            "id": manifest["id"].tolist(),
            "path": manifest["path"].tolist(),
        }
        try:
            save_file(tensors, file)
        except Exception as error:  # safetensors has its own error for a full disk
            raise RunError(f"{file}: the batch at which the loss broke cannot be written: {error}") from None
        write_atomic(file.with_suffix(".json"), json.dumps(text, indent=2, default=str) + "\n")
        return file


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and torch.is_floating_point(value)
