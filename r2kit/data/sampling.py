"""How often each training image comes in an epoch: once, or so that rare classes are seen more often."""

from __future__ import annotations

from typing import Literal

import numpy as np

SamplerKind = Literal["shuffle", "square_root", "balanced"]
_POWER = {"shuffle": 1.0, "square_root": 0.5, "balanced": 0.0}


def expected_draws(labels: np.ndarray, kind: SamplerKind) -> np.ndarray:
    """Return how often each image is drawn in an epoch, on average.

    Args:
        labels: (N,) classes, or (N, K) zeros and ones where an image has several labels.
        kind: A class of n images is drawn in proportion to n (`shuffle`), to its square root, or to one (`balanced`).
            An image with several labels is drawn as often as its rarest label asks; one without any, as the
            most frequent label.

    Returns:
        (N,) positive numbers that sum to N: an epoch has as many draws as there are images.

    Source: Kang et al. 2020, arXiv:1910.09217, sec. 3, eq. 1; for several labels the maximum over the labels, as in
    Gupta et al. 2019, arXiv:1908.03195, sec. 4.
    """
    several = labels.ndim == 2
    counts = (labels > 0).sum(axis=0) if several else np.bincount(labels)
    each = np.maximum(counts, 1.0) ** (_POWER[kind] - 1.0)
    if several:
        weight = np.where(labels > 0, each, 0.0).max(axis=1)
        weight = np.where(weight > 0, weight, each.min())
    else:
        weight = each[labels]
    return weight * (len(weight) / weight.sum())


def images_of_class(labels: np.ndarray, num_classes: int, weight: np.ndarray | None = None) -> np.ndarray:
    """Return the number of images of each class, or the sum of their weights, (K,).

    Args:
        labels: (N,) classes, or (N, K) zeros and ones where an image has several labels.
        num_classes: K.
        weight: (N,), or None for one each.
    """
    if labels.ndim == 2:
        counts: np.ndarray = (labels > 0).sum(axis=0) if weight is None else weight @ (labels > 0)
        return counts
    return np.bincount(labels, weight, minlength=num_classes)


def draw_epoch(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the images of an epoch, each floor(e) or floor(e) + 1 times, e times on average, in random order.

    Args:
        expected: (N,) from `expected_draws`.
        rng: Where the epoch's random numbers come from.

    Returns:
        (N,) positions in `expected`.

    Source: systematic resampling, Kitagawa 1996, "Monte Carlo filter and smoother", appendix; images of one weight lie
    together there, so that their number varies by one at most.
    """
    shuffled = rng.permutation(len(expected))
    order = shuffled[np.argsort(expected[shuffled], kind="stable")]
    ends = np.cumsum(expected[order])
    ends *= len(expected) / ends[-1]  # the rounding of the sum must not lose the last draw
    drawn = order[np.searchsorted(ends, np.arange(len(expected)) + rng.random(), side="right").clip(max=len(order) - 1)]
    return rng.permutation(drawn)
