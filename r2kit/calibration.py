"""Making stated confidence honest: temperature scaling, and label sets with a promised coverage.

Both are fitted on images that the network was not trained on (validation) and judged on others (test). Everything is
computed from stored probabilities: the logits are their logarithms up to a constant, which the softmax does not see.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

_TINY = float(np.finfo(np.float32).tiny)  # a probability of zero counts as this, so that its logarithm is finite
_LOG_RANGE = math.log(20.0)


def rescale(probs: ArrayLike, temperature: float) -> FloatArray:
    """Return the probabilities at another temperature.

    Args:
        probs: (N, K), rows sum to 1.
        temperature: Above 1 lowers the confidence, below 1 raises it; the order of the classes never changes.

    Source: Guo et al. 2017, arXiv:1706.04599, sec. 4.2.
    """
    logits = np.log(np.maximum(np.asarray(probs, dtype=np.float64), _TINY)) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    powers = np.exp(logits)
    scaled: FloatArray = powers / powers.sum(axis=1, keepdims=True)
    return scaled


def fit_temperature(probs: ArrayLike, label: ArrayLike) -> float:
    """Return the temperature with the smallest mean -ln(probability of the true class).

    Args:
        probs: (N, K), rows sum to 1.
        label: (N,) integers in [0, K).

    Returns:
        A number in [0.05, 20]; near an end of that range where every answer is right, or none.

    Raises:
        ValueError: If there is no image.

    Source: Guo et al. 2017, arXiv:1706.04599, sec. 4.2.
    """
    table, truth = np.asarray(probs, dtype=np.float64), np.asarray(label, dtype=np.int64)
    if not truth.size:
        raise ValueError("temperature scaling needs at least one image")
    logits = np.log(np.maximum(table, _TINY))
    own = logits[np.arange(truth.size), truth]

    def loss(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        scaled = logits * inverse
        top = scaled.max(axis=1)
        return float((top + np.log(np.exp(scaled - top[:, None]).sum(axis=1)) - own * inverse).mean())

    # The loss is convex in 1 / temperature, hence has one valley over its logarithm.
    found = scipy.optimize.minimize_scalar(
        loss, bounds=(-_LOG_RANGE, _LOG_RANGE), method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(float(found.x))


def conformal_threshold(probs: ArrayLike, label: ArrayLike, coverage: float) -> float:
    """Return the probability from which on a class belongs to the label set.

    Sets of all classes with at least this probability hold the true class of a new image with at least the stated
    probability, whatever the network, as long as the new image and those given here are exchangeable: drawn alike.

    Args:
        probs: (N, K) of images that were not trained on.
        label: (N,) integers in [0, K).
        coverage: In (0, 1).

    Returns:
        The threshold; 0 (every class) where N is too small to promise less.

    Source: Sadinle, Lei and Wasserman 2019, "Least ambiguous set-valued classifiers with bounded error levels"; Vovk et
    al. 2005, "Algorithmic learning in a random world", for the split-conformal rank.
    """
    table, truth = np.asarray(probs, dtype=np.float64), np.asarray(label, dtype=np.int64)
    score = np.sort(1.0 - table[np.arange(truth.size), truth])
    rank = math.ceil((truth.size + 1) * coverage)
    if rank > truth.size:
        return 0.0
    return float(1.0 - score[rank - 1])


def label_sets(probs: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """Return (N, K): which classes belong to the set of each image; see `conformal_threshold`."""
    table = np.asarray(probs, dtype=np.float64)
    # The scores were compared as 1 - p; the same subtraction here keeps equal probabilities equal.
    inside: NDArray[np.bool_] = (1.0 - table) <= (1.0 - threshold)
    return inside
