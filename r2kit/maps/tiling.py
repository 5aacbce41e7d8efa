"""Where tiles lie, and how overlapping ones become one map: pure arithmetic.

The tiles of a scene lie on one grid that depends on nothing but the scene's size, the tile and the overlap, and every
pixel sums its tiles in one order. So a map does not depend on how the work was divided, by memory or by interruptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles start along one side of a scene.

    Args:
        length: Of the side, in pixels.
        tile: Side of a tile.
        overlap: Pixels that neighbours share, less than `tile`.

    Returns:
        Ascending positions from 0; the last tile is moved back so that it ends with the scene. A scene shorter than a
        tile has one tile that reaches beyond it.
    """
    if length <= tile:
        return [0]
    step = tile - overlap
    return [*range(0, length - tile, step), length - tile]


def hann(tile: tuple[int, int]) -> FloatArray:
    """Return the weight of each pixel of a tile (H, W): one in the middle, nearly zero at the rim, never zero.

    Sums of weighted tiles are divided by the sum of the weights, so that a map is smooth across the rims of its tiles.
    """
    sides = [np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in tile]
    weights: FloatArray = np.outer(*sides).astype(np.float32)
    return weights


@dataclass(frozen=True)
class Grid:
    """The tiles of one scene.

    Attributes:
        scene: (H, W) of the scene in pixels.
        tile: (H, W) of a tile.
        overlap: Pixels that neighbouring tiles share.
    """

    scene: tuple[int, int]
    tile: tuple[int, int]
    overlap: int

    @property
    def tops(self) -> list[int]:
        """First row of each row of tiles."""
        return starts(self.scene[0], self.tile[0], self.overlap)

    @property
    def lefts(self) -> list[int]:
        """First column of each column of tiles."""
        return starts(self.scene[1], self.tile[1], self.overlap)

    def bands(self, classes: int, budget: int) -> list[tuple[int, int]]:
        """Divide the scene's columns so that the sums over one row of tiles fit into memory.

        Args:
            classes: K numbers are summed for each pixel.
            budget: Bytes.

        Returns:
            (first, last + 1) column of each part, each starting where a tile does.
        """
        widest = max(self.tile[1], budget // (4 * (classes + 1) * self.tile[0]))
        edges, lefts = [0], self.lefts
        for left in lefts[1:]:
            if left - edges[-1] >= widest:
                edges.append(left)
        return list(zip(edges, [*edges[1:], self.scene[1]], strict=True))


class Blend:
    """Sums of weighted tiles over one row of tiles and a range of columns.

    Args:
        classes: K.
        height: Of a tile.
        columns: (first, last + 1) of the range.
    """

    def __init__(self, classes: int, height: int, columns: tuple[int, int]) -> None:
        self.columns = columns
        self._sums = np.zeros((classes, height, columns[1] - columns[0]), dtype=np.float32)
        self._weights = np.zeros((height, columns[1] - columns[0]), dtype=np.float32)

    def add(self, values: FloatArray, weights: FloatArray, left: int) -> None:
        """Add a tile (K, H, W) that starts at column `left` of the scene, with weights (H, W)."""
        first, last = max(left, self.columns[0]), min(left + values.shape[2], self.columns[1])
        own, there = slice(first - left, last - left), slice(first - self.columns[0], last - self.columns[0])
        self._sums[:, :, there] += values[:, :, own] * weights[:, own]
        self._weights[:, there] += weights[:, own]

    def take(self, rows: int) -> FloatArray:
        """Return the means (K, rows, W) of the first rows, which no later tile touches, and move on below them.

        A pixel that no tile covered is NaN.
        """
        sums, weights = self._sums[:, :rows], self._weights[:rows]
        means: FloatArray = np.divide(sums, weights, out=np.full_like(sums, np.nan), where=weights > 0)
        self.skip(rows)
        return means

    def skip(self, rows: int) -> None:
        """Move on below the first rows."""
        height = self._weights.shape[0]
        for array in (self._sums, self._weights):
            kept = array[..., rows:, :].copy()
            array[..., : height - rows, :] = kept
            array[..., height - rows :, :] = 0.0
