"""What happens when somebody asks a run to stop: Ctrl-C, a scheduler's SIGTERM, SLURM's SIGUSR1 or SIGUSR2."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from r2kit.errors import Interrupted

AGAIN = 1.0
"""Seconds after which a signal to stop at once is repeated where the exception did not arrive."""

_KEPT = "nothing was saved now; what was saved before stays"
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # Windows has the first two


class StopSignals:
    """While entered, a signal to stop is noted in training, which stops after the step, and stops all else at once.

    A second signal in training stops at once too: what was saved last stays. What stops at once is an exception. Python
    loses it where the signal meets a callback of the interpreter itself, so it is raised again until it has arrived;
    and an error that comes before that, such as of a loader process that the same signal has ended, gives way to it.

    A process forked from this one, such as a loader, leaves Ctrl-C to this one, whose last step may need its images; at
    the other signals it ends as if nobody handled them.

    Attributes:
        training: Whether there is something to save; the training loop says so.
        noted: The signal that came while training; None if none did.
    """

    def __init__(self) -> None:
        self.training = False
        self.noted: int | None = None
        self._before: dict[int, Any] = {}
        self._again: threading.Timer | None = None
        self._raised: int | None = None  # the signal of an exception that was raised
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            for number in _numbers():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._again is not None:
            self._again.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._raised is not None and isinstance(error, Exception):
            raise Interrupted(self._raised, _KEPT) from error

    def take_back(self) -> None:
        """Put the handlers back in place where a library has put its own."""
        for number in _numbers():
            if number in self._before:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not self.training or self.noted is not None:
            if self._again is not None:
                self._again.cancel()
            self._again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
            self._again.daemon = True
            self._again.start()
            self._raised = number
            raise Interrupted(number, _KEPT)
        self.noted = number
        if hasattr(signal, "SIGCHLD"):
            # A signal to the whole group ends the loader processes, of which torch would make an error in the middle of
            # this step. The step has its images, and is the last.
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _no_more)
        if number == signal.SIGINT:
            print("stopping after this step; Ctrl-C again stops at once, without saving", flush=True)


def _no_more(number: int, frame: FrameType | None) -> None:
    """Let child processes end."""


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
