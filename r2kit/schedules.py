"""Learning rates as functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the share of the highest learning rate at a step.

    Args:
        step: Optimiser steps taken, from 0.
        warmup: Steps in which the rate grows linearly to 1.
        total: All steps; the rate reaches zero there.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5 with one cycle; warm-up from Goyal et al. 2017,
    arXiv:1706.02677, sec. 2.2.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
