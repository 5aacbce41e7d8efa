"""A run's network as a function of tiles, the same bits for a tile whatever stands beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from r2kit.data.preprocess import Preprocess, centre_window
from r2kit.errors import ModelError, RunError
from r2kit.inference import ORIENTATIONS, choose_device, orient, restore
from r2kit.models import memory_format
from r2kit.run import Run

AT_ONCE = 8
"""Tiles in a forward pass at most."""
_PIXELS_AT_ONCE = 2**19  # in a forward pass on a CPU: what a network takes grows with them, and speed does not

_MULTIPLE = 32  # the sides of an image that every network of the family takes
_LARGEST_TILE = 2**26  # pixels of the scene; more is an image that is resized to a thousandth, or a made-up size
SMALLEST_TILE = 32
"""Pixels of the scene that the side of a tile has at least: less is no ground to judge."""


class TileNetwork:
    """From raw tiles to probabilities.

    Args:
        run: A finished run of a classification or a segmentation.
        tile: (H, W) of a tile of the scene in pixels; None takes the ground that the run's images show.
        device: See `inference.choose_device`.
        tta: Average the probabilities over the eight orientations of each tile, at eight times the cost.

    Raises:
        RunError: If the run is of another task.
        ModelError: If a classification is given another tile.
    """

    def __init__(
        self, run: Run, tile: tuple[int, int] | None = None, device: str = "auto", *, tta: bool = False
    ) -> None:
        kind = run.recipe.task.kind
        if kind not in ("classification", "segmentation"):
            raise RunError(f"{run.path}: a map is made by a classification or a segmentation, not by a {kind}")
        self.dense = kind == "segmentation"
        """Whether every pixel gets a class, or the tile one."""
        self.classes = run.preprocess.classes
        own = tile_of(run)
        if tile is not None and tile != own and not self.dense:
            raise ModelError(
                f"--tile: a classification sees tiles of {own[0]}x{own[1]} pixels as its training images; for a finer "
                "map give --cell"
            )
        self.tile = tile or own
        """(H, W) of a tile of the scene in pixels."""
        size = run.preprocess.size
        if self.tile != own:
            size = (round(self.tile[0] * size[0] / own[0]), round(self.tile[1] * size[1] / own[1]))
        self._size = size
        self._fill = (0, 0) if self.tile == own else (-size[0] % _MULTIPLE, -size[1] % _MULTIPLE)
        self._preprocess = dataclasses.replace(run.preprocess, size=size, resize="squash")
        self.device = choose_device(device)
        self._layout = memory_format(run.recipe.train.channels_last)
        self.orientations = range(ORIENTATIONS if tta else 1)
        self._model = run.model().eval().to(self.device, torch.float32).to(memory_format=self._layout)

    @property
    def at_once(self) -> int:
        """Tiles in every forward pass, always.

        Libraries round differently for batches of different sizes, and a map should not depend on how many tiles were
        left for the last one. On a CPU large tiles go in fewer at once, so that memory depends little on `tile`.
        """
        if self.device.type != "cpu":
            return AT_ONCE
        area = (self._size[0] + self._fill[0]) * (self._size[1] + self._fill[1])
        return max(1, min(AT_ONCE, _PIXELS_AT_ONCE // area))

    def prepare(self, raw: NDArray[np.generic]) -> Tensor:
        """Return the network's input (C, h, w) of a raw tile (H, W, C), on the scale of the training images.

        A tile of another size than the run's is filled up below and to the right with its own rim, to a size that every
        network takes: resizing it to that size would show the network another scale than it learned.
        """
        image = self._preprocess.apply(raw)
        if self._fill == (0, 0):
            return image
        return F.pad(image[None], (0, self._fill[1], 0, self._fill[0]), mode="replicate")[0]

    @torch.inference_mode()
    def __call__(self, tiles: Sequence[Tensor]) -> list[NDArray[np.float32]]:
        """Return probabilities for each tile: (K,), or (K, H, W) where every pixel gets a class."""
        found: list[NDArray[np.float32]] = []
        count = self.at_once
        for first in range(0, len(tiles), count):
            some = list(tiles[first : first + count])
            batch = torch.zeros(count, *some[0].shape)
            batch[: len(some)] = torch.stack(some)
            given = batch.to(self.device)
            probs = self._probs(given, 0)
            for number in self.orientations[1:]:
                probs = probs + self._probs(given, number)
            found += list((probs / len(self.orientations))[: len(some)].cpu().numpy())
        return found

    def _probs(self, batch: Tensor, number: int) -> Tensor:
        """Probabilities of tiles seen in one of the orientations, in the places of the tiles as they are."""
        logits = self._model(orient(batch, number).contiguous(memory_format=self._layout)).float()
        if self.dense:
            logits = restore(logits, number)[..., : self._size[0], : self._size[1]]
            if tuple(logits.shape[-2:]) != self.tile:
                logits = F.interpolate(logits, self.tile, mode="bilinear", align_corners=False)
        return logits.softmax(1)


def tile_of(run: Run) -> tuple[int, int]:
    """Return (H, W) of the tile of a scene that a run sees: the ground of its training images.

    Raises:
        RunError: If the run does not say how large its images were, or says what no machine could hold.
    """
    image = run.info.get("data", {}).get("image_size")
    if image is None:
        raise RunError(f"{run.path}: does not say how large its images were (data.image_size in run.json)")
    tile = ground_tile(run.preprocess, (image[0], image[1]))
    if tile[0] * tile[1] > _LARGEST_TILE:  # run.json may be a stranger's
        raise RunError(
            f"{run.path}: its images had {image[0]} x {image[1]} pixels by its run.json; a tile of {tile[0]} x "
            f"{tile[1]} is larger than the limit of {_LARGEST_TILE} pixels"
        )
    return tile


def ground_tile(preprocess: Preprocess, image: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of the piece of an original image that reaches the network, in the image's pixels.

    Args:
        preprocess: How images reach the network's size.
        image: (H, W) of the original images.
    """
    if preprocess.resize == "squash":
        return image
    if preprocess.resize == "tile":  # never resized
        return preprocess.size
    if preprocess.resize == "crop":
        rows, columns = centre_window(image, preprocess.size)
        return rows.stop - rows.start, columns.stop - columns.start
    ratio = min(preprocess.size[0] / image[0], preprocess.size[1] / image[1])
    return round(preprocess.size[0] / ratio), round(preprocess.size[1] / ratio)
