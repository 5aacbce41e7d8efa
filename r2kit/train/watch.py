"""A process of a run that dies takes the others with it, with a sentence instead of a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.distributed import DistError

from r2kit.errors import ModelError
from r2kit.train.ranks import launcher as launched_from_outside

GRACE = 15.0
"""Seconds in which a process that waits for a dead one may notice by itself; then it is ended."""


class Watch(Callback):
    """Watches the processes that Lightning started, in the first one, and the first one in the others.

    Collective operations notice by themselves on a CPU. On GPUs they wait, deaf to signals, until a timeout of many
    minutes. Processes that torchrun or SLURM started are watched by these.
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self._children: list[subprocess.Popen[Any]] = []
        self._parent: int | None = None
        self._over = threading.Event()
        self._checked = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start to watch, once Lightning has started the processes."""
        launcher = trainer.strategy.launcher
        if trainer.world_size == 1 or launched_from_outside() is not None:
            return
        if trainer.global_rank == 0:
            self._children = list(getattr(launcher, "procs", []))
            for thread in threading.enumerate():
                if thread.name == "child-process-observer":  # Lightning's, which would kill this process without a word
                    thread._child_processes = []  # type: ignore[attr-defined]
        else:
            self._parent = os.getppid()
        threading.Thread(target=self._watch, name="r2kit-watch", daemon=True).start()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Name the parameters that several processes would wait for in vain.

        Raises:
            ModelError: If a trained parameter takes no part in the loss.
        """
        if self._checked or trainer.world_size == 1:
            return
        self._checked = True
        unused = [name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise ModelError(
                f"{', '.join(unused[:3])}{more}: trained, but no part of the loss, which several devices "
                "do not allow; freeze what is not used, or train on one device with train.devices=1"
            )

    def end(self) -> None:
        """Stop watching."""
        self._over.set()

    def said(self, error: BaseException) -> str | None:
        """Return what became of another process, if an error comes from its loss; None if it comes from elsewhere."""
        text = str(error).lower()
        if not isinstance(error, DistError) and not any(word in text for word in ("gloo", "nccl", "by peer")):
            return None
        if self.lost is None:
            self._over.wait(timeout=2.0)  # the watch looks twice a second
        return self.lost or "lost contact with another process of the run"

    def kill_children(self) -> None:
        """End the processes that are left."""
        for child in self._children:
            if child.poll() is None:
                child.kill()

    def _watch(self) -> None:
        noticed: float | None = None
        while not self._over.wait(timeout=0.5):
            if self.lost is None:
                self.lost = self._look()
            elif noticed is None:
                noticed = time.monotonic()
            elif time.monotonic() - noticed > GRACE:
                print(f"error: {self.lost}; this process waited for it in vain", file=sys.stderr, flush=True)
                self.kill_children()
                os._exit(2)

    def _look(self) -> str | None:
        """Return what became of another process; None where all live or have ended well."""
        if self._parent is not None:
            return "the first process of the run died" if os.getppid() != self._parent else None
        for rank, child in enumerate(self._children, start=1):
            code = child.poll()
            if code:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"process {rank} of the run (pid {child.pid}) {how}"
        return None
