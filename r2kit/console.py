"""What a person sees: one console, tables that degrade to plain lines, and no adverts from libraries."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

_Step = TypeVar("_Step")


def make_console(*, quiet: bool = False) -> Console:
    """Return the console on standard output; `quiet` prints nothing."""
    # In a file or a pipe nothing limits the width, and a folded name could not be searched for.
    return Console(quiet=quiet, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 180)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers_from: int = 1) -> Table:
    """Return a table whose columns from `numbers_from` on are aligned to the right."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(
            column, justify="right" if index >= numbers_from else "left", no_wrap=index == 0, overflow="fold"
        )
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 42 s, 6 min 10 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def progress(steps: Sequence[_Step], label: str, console: Console, every: float = 30.0) -> Iterator[_Step]:
    """Yield steps, with a bar and the time left on a terminal, and elsewhere with a line now and then.

    Args:
        steps: What is worked through.
        label: What a person calls the whole.
        console: Where to print.
        every: Seconds between two lines, where there is no terminal.
    """
    if console.is_terminal and not console.quiet:
        yield from track(steps, description=label, console=console, transient=True)
        return
    started = said = time.perf_counter()
    for number, step in enumerate(steps):
        now = time.perf_counter()
        if number and now - said >= every:
            left = (now - started) / number * (len(steps) - number)
            console.print(f"{label}: {100 * number / len(steps):.0f} %, {duration(left)} left")
            said = now
        yield step


def quiet_libraries() -> None:
    """Silence what Lightning prints about itself, and warnings that a user of r2kit cannot act on."""
    lightning = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    for name in (*lightning, "torch.utils.cpp_extension"):  # which warns of a missing GPU where nobody asked for one
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",  # r2kit chooses the number of workers itself
        ".*in eval mode at the start of training.*",  # frozen norms, on purpose
        ".*number of training batches.*smaller than the logging interval.*",  # r2kit writes its own log
        ".*isinstance.treespec, LeafSpec.*",  # Lightning against the newest torch
        ".*ended before the epoch ended and your dataloader is not resumable.*",  # the sampler starts where it stopped
        ".*torch.distributed.nn.functional.all_gather is deprecated.*",  # Lightning's own call
        ".*It is recommended to use .self.log.*sync_dist=True.*",  # every process has computed the same numbers
        ".*Checkpoint directory .* exists and is not empty.*",  # the run folder is made by r2kit
    ):
        warnings.filterwarnings("ignore", message=message)


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number and its noun: ``1 class``, ``1,200 objects``; `many` where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def sentence(text: str) -> str:
    """Return text with a capital at its beginning."""
    return text[:1].upper() + text[1:]
