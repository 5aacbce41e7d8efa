"""Times forms of one computation against each other: what the benchmarks at the end of the kernels' files print."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def milliseconds(forms: Mapping[str, Callable[[], object]], rounds: int) -> str:
    """Call each form once a round, in turn, and return the medians in words, e.g. ``kernel 0.31, plain 0.59``.

    Args:
        forms: Names and what is called.
        rounds: Rounds that count; one before them warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - start)
    return ", ".join(f"{name} {statistics.median(found[1:]) * 1e3:.2f}" for name, found in seconds.items())
