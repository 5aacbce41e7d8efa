"""Images larger than the tile that a network was trained on: read in overlapping tiles, blended where they overlap."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles begin along one side, so that they cover it and none reaches over its end.

    Args:
        length: Of the side, in pixels; a side shorter than the tile has one tile, at 0.
        tile: Side of a tile.
        overlap: Smallest share of a tile in common with its neighbour, in [0, 1).
    """
    if length <= tile:
        return [0]
    step = max(1, math.floor(tile * (1.0 - overlap)))
    count = math.ceil((length - tile) / step) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def blend_window(size: tuple[int, int]) -> Tensor:
    """Return the weight of each pixel of a tile (h, w): a Hann window, never quite zero, largest in the middle."""
    rows, columns = (torch.sin(math.pi * (torch.arange(n) + 0.5) / n) ** 2 + 1e-3 for n in size)
    return rows[:, None] * columns[None, :]


def sliding_logits(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    tile: tuple[int, int],
    overlap: float = 0.25,
    batch_size: int = 16,
) -> Tensor:
    """Return the logits of images of any size from a network that sees tiles.

    Args:
        network: (B, C, h, w) -> (B, K, h, w).
        image: (B, C, H, W), normalised. A side shorter than the tile is filled up with zeros, the mean colour.
        tile: (h, w).
        overlap: Smallest share of a tile in common with its neighbour, in [0, 1).
        batch_size: Tiles at once, at least those of the same place of all images.

    Returns:
        (B, K, H, W): where tiles overlap, the mean weighed by `blend_window`.
    """
    height, width = image.shape[-2:]
    if height < tile[0] or width < tile[1]:
        image = F.pad(image, (0, max(0, tile[1] - width), 0, max(0, tile[0] - height)))
    tops, lefts = (tile_starts(n, t, overlap) for n, t in zip(image.shape[-2:], tile, strict=True))
    if len(tops) == len(lefts) == 1:
        return network(image)[..., :height, :width]
    weight = blend_window(tile).to(image.device)
    total: Tensor | None = None
    norm = torch.zeros(image.shape[-2:], device=image.device)
    windows = [(..., slice(y, y + tile[0]), slice(x, x + tile[1])) for y in tops for x in lefts]
    each = max(1, batch_size // len(image))
    for first in range(0, len(windows), each):
        chosen = windows[first : first + each]
        logits = network(torch.cat([image[window] for window in chosen])).float()
        for window, part in zip(chosen, logits.split(len(image)), strict=True):
            if total is None:
                total = part.new_zeros((*part.shape[:2], *image.shape[-2:]))
            total[window] += part * weight
            norm[window[1:]] += weight
    assert total is not None
    return (total / norm)[..., :height, :width]
