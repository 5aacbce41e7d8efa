"""Anchors: the boxes that a detector starts from, chosen for the size of objects or measured on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from r2kit.errors import DataError

LEVELS = {
    "faster_rcnn": (4, 8, 16, 32, 64),
    "mask_rcnn": (4, 8, 16, 32, 64),
    "retinanet": (8, 16, 32, 64, 128),
    "fcos": (8, 16, 32, 64, 128),
}
"""Reductions of the pyramid's levels for each detector."""
RATIOS = (0.5, 1.0, 2.0)
FEWEST = 50
"""Boxes below which anchors measured on them would be chance."""


@dataclass(frozen=True)
class Anchors:
    """Sizes and shapes of the anchors of every level."""

    sizes: tuple[tuple[float, ...], ...]
    """For each level, finest first, the square roots of the areas in pixels of the network's input."""
    ratios: tuple[float, ...]
    """Heights over widths, the same for all levels."""

    @property
    def boxes(self) -> NDArray[np.float64]:
        """(A, 2) width and height of all anchors."""
        high = np.sqrt(np.array(self.ratios))
        sides = np.array([size for level in self.sizes for size in level])[:, None]
        return np.stack([(sides / high).ravel(), (sides * high).ravel()], axis=1)


def standard_anchors(kind: str, preset: Literal["small", "natural"]) -> Anchors:
    """Anchors by rule.

    `natural` has those of torchvision: 32 to 512 pixels. `small` has sides a quarter (Faster and Mask R-CNN) or half
    (RetinaNet) of those: from 8 pixels at stride 4, from 16 pixels at stride 8; for objects seen from above.

    Args:
        kind: A detector of `LEVELS` other than FCOS.
        preset: Which.
    """
    if kind == "retinanet":
        base = [4 * level if preset == "natural" else 2 * level for level in LEVELS[kind]]
        return Anchors(tuple(tuple(side * 2 ** (i / 3) for i in range(3)) for side in base), RATIOS)
    return Anchors(tuple((float(8 * level if preset == "natural" else 2 * level),) for level in LEVELS[kind]), RATIOS)


def fit_anchors(kind: str, sides: NDArray[np.floating[Any]]) -> Anchors:
    """Measure anchors on boxes: k-means of their sizes and of their shapes, both by logarithm.

    The sizes are shared out over the levels from the finest on; RetinaNet has three neighbouring ones a level. As many
    anchors as with `standard_anchors`, so that the networks have the same parameters. Where the boxes have fewer
    different sizes than that, the rest follow at a factor of 1.26 (a third of an octave).

    Args:
        kind: A detector of `LEVELS` other than FCOS.
        sides: (N, 2) width and height of the training boxes in pixels of the network's input.

    Raises:
        DataError: If there are too few boxes.
    """
    if len(sides) < FEWEST:
        raise DataError(
            f"task.anchors: auto measures at least {FEWEST} training boxes, and there are {len(sides)}; use small or "
            "natural"
        )
    sides = np.maximum(np.asarray(sides, dtype=np.float64), 1.0)
    per_level = 3 if kind == "retinanet" else 1
    levels = len(LEVELS[kind])
    sizes = _clusters(0.5 * np.log(sides.prod(axis=1)), levels * per_level, np.log(2.0) / 3)
    ratios = _clusters(np.log(sides[:, 1] / sides[:, 0]), len(RATIOS), np.log(2.0) / 3)
    grouped = np.exp(sizes).reshape(levels, per_level)
    return Anchors(tuple(tuple(float(s) for s in level) for level in grouped), tuple(float(r) for r in np.exp(ratios)))


def _clusters(values: NDArray[np.float64], count: int, step: float) -> NDArray[np.float64]:
    """Centres of `count` clusters, ascending, at least a little apart; always the same for the same values."""
    distinct = len(np.unique(np.round(values, 6)))
    found = KMeans(min(count, distinct), n_init=4, random_state=0).fit(values[:, None]).cluster_centers_.ravel()
    centres = np.sort(found)
    while len(centres) < count:
        centres = np.append(centres, centres[-1] + step)
    return centres
