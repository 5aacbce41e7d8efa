"""Learning rates as functions of the step: nothing here has a memory, so a run that goes on needs nothing stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cosine", "one_cycle", "step", "plateau", "constant"]

_CYCLE_START, _CYCLE_END = 1 / 25, 1e-4 / 25  # of the highest rate
_CYCLE_MOMENTA = (0.95, 0.85)


@dataclass(frozen=True)
class Plan:
    """All that a learning rate depends on beside the step.

    Attributes:
        kind: Shape of the schedule.
        warmup: Steps in which the rate grows.
        total: All steps.
        epochs: All epochs.
        every: Epochs between two reductions of the kind `step`, or the epochs after which it reduces.
        factor: What a reduction multiplies the rate by.
    """

    kind: Kind
    warmup: int
    total: int
    epochs: int
    every: int | tuple[int, ...] = 30
    factor: float = 0.1

    def share(self, step: int, time_share: float = 0.0, reductions: int = 0) -> float:
        """Return the share of the highest learning rate at a step.

        Args:
            step: Optimiser steps taken, from 0.
            time_share: Share of the time limit that is used up; the schedule runs by it where it is ahead of the steps.
            reductions: How often a plateau was met.
        """
        if step < self.warmup:
            if self.kind == "one_cycle":
                return _cosine(_CYCLE_START, 1.0, step / self.warmup)
            return (step + 1) / (self.warmup + 1)
        at = max(step, math.floor(time_share * self.total))
        rest = min(1.0, (at - self.warmup) / max(1, self.total - self.warmup))
        if self.kind == "cosine":
            return _cosine(1.0, 0.0, rest)
        if self.kind == "one_cycle":
            return _cosine(1.0, _CYCLE_END, rest)
        if self.kind == "step":
            epoch = min(at, self.total - 1) * self.epochs // self.total
            met = epoch // self.every if isinstance(self.every, int) else sum(epoch >= one for one in self.every)
            return float(self.factor**met)
        return float(self.factor**reductions)  # plateau; constant has no reductions

    def momentum(self, step: int, time_share: float = 0.0) -> float | None:
        """Return the momentum at a step, which mirrors the rate of one cycle; None where it stays as it is."""
        if self.kind != "one_cycle":
            return None
        high, low = _CYCLE_MOMENTA
        if step < self.warmup:
            return _cosine(high, low, step / self.warmup)
        at = max(step, math.floor(time_share * self.total))
        return _cosine(low, high, min(1.0, (at - self.warmup) / max(1, self.total - self.warmup)))

    def progress(self, step: int, time_share: float = 0.0) -> float:
        """Return the share of training that is done, in [0, 1]."""
        return min(1.0, max(step / self.total, time_share))


def lr_factor(optimizer: str, world: int) -> float:
    """Return by how much the learning rate grows on several devices, whose steps see as many times the images.

    Args:
        optimizer: `sgd` (the number of devices) or `adamw` (its square root).
        world: Number of devices.

    Source: Goyal et al. 2017, arXiv:1706.02677, sec. 2.1; Malladi et al. 2022, arXiv:2205.10287, sec. 4.
    """
    return float(world) if optimizer == "sgd" else math.sqrt(world)


def _cosine(start: float, end: float, share: float) -> float:
    """Return the value on half a cosine from start to end.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5 with one cycle; one cycle with momentum in counterphase
    from Smith and Topin 2017, arXiv:1708.07120, with the shares of fastai and torch's OneCycleLR; linear warm-up from
    Goyal et al. 2017, arXiv:1706.02677, sec. 2.2.
    """
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def since_best(scores: Sequence[tuple[float, ...]]) -> int:
    """Return how many epochs ago the best one was, 0 where it is the last; the first of equals is the best."""
    if not scores:
        return 0
    return len(scores) - 1 - max(range(len(scores)), key=lambda index: scores[index])


def reductions(scores: Sequence[tuple[float, ...]], patience: int) -> int:
    """Return how often the learning rate was reduced: each time that `patience` epochs in a row were not better.

    Args:
        scores: What each epoch reached; larger is better.
        patience: Epochs without a better one before a reduction.
    """
    count, waited = 0, 0
    best: tuple[float, ...] | None = None
    for score in scores:
        if best is None or score > best:
            best, waited = score, 0
            continue
        waited += 1
        if waited == patience:
            count, waited = count + 1, 0
    return count
