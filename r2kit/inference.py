"""A trained network at work: which device, images from files to tensors, logits to probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from r2kit.data.preprocess import Preprocess
from r2kit.dense.sliding import sliding_logits
from r2kit.errors import DataError, ModelError

Reader = Callable[[Any], NDArray[Any]]
Prepare = Callable[[NDArray[Any]], tuple[Tensor, ...]]


def choose_device(device: str = "auto") -> torch.device:
    """Return the device that a word names: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        ModelError: If the word is none, or this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"device: '{device}' is no device; use auto, cpu, cuda, cuda:1 or mps") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(chosen.type, False):
        raise ModelError(f"device: '{device}' asked for, and this machine has none; use auto or cpu")
    return chosen


ORIENTATIONS = 8
"""Ways to lay a square on the table: four quarter turns, each seen from both sides."""


def orient(images: Tensor, number: int) -> Tensor:
    """Turn, and from 4 on first transpose, the last two axes of a tensor.

    Args:
        images: (..., H, W).
        number: 0 (as it is) to 7.

    Returns:
        (..., H, W), or (..., W, H) for half of the numbers.
    """
    turned = images.transpose(-2, -1) if number >= 4 else images
    return turned.rot90(number % 4, (-2, -1))


def restore(maps: Tensor, number: int) -> Tensor:
    """Undo `orient`: bring maps of an oriented image back to the places of the image itself."""
    turned = maps.rot90(-(number % 4), (-2, -1))
    return turned.transpose(-2, -1) if number >= 4 else turned


class Classifier:
    """A network on its device, from a batch of images to probabilities, always in float32 arithmetic.

    Args:
        model: (B, C, H, W) -> logits (B, K).
        device: Where to run, see `choose_device`.
        channels_last: Layout of the images in memory.
        several: Whether the labels are independent (sigmoid) in place of one of K (softmax).
        tta: Average the probabilities over the eight orientations of each image, at eight times the cost.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str = "auto",
        *,
        channels_last: bool = True,
        several: bool = False,
        tta: bool = False,
    ) -> None:
        self.several = several
        self.orientations = range(ORIENTATIONS if tta else 1)
        self.device = choose_device(device)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.eval().to(self.device, torch.float32).to(memory_format=self.layout)

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> NDArray[np.float64]:
        """Return the probabilities (B, K) of normalised images (B, C, H, W); rows sum to 1 unless `several`."""
        image = image.to(self.device, torch.float32)
        total = torch.zeros((), dtype=torch.float64)
        for number in self.orientations:
            # On the CPU from here: Apple's GPUs have no float64.
            logits = self.model(orient(image, number).contiguous(memory_format=self.layout)).cpu().double()
            total = total + (logits.sigmoid() if self.several else logits.softmax(1))
        probs: NDArray[np.float64] = (total / len(self.orientations)).numpy()
        return probs


class PixelClassifier:
    """A network on its device, from images of any size to probabilities of their own pixels.

    Args:
        model: (B, C, h, w) -> logits (B, K, h, w).
        preprocess: That of the run; with ``resize='tile'`` images are read in tiles of its size.
        overlap: Share of a tile in common with its neighbour.
        device: Where to run, see `choose_device`.
        channels_last: Layout of the images in memory.
        batch_size: Images, or tiles of one image, at once.
        tta: Average the probabilities over the eight orientations of each input, at eight times the cost.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        overlap: float,
        device: str = "auto",
        *,
        channels_last: bool = True,
        batch_size: int = 64,
        tta: bool = False,
    ) -> None:
        self.orientations = range(ORIENTATIONS if tta else 1)
        self.device = choose_device(device)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.eval().to(self.device, torch.float32).to(memory_format=self.layout)
        self.preprocess = preprocess
        self.overlap = overlap
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Tensor], shapes: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Yield the probabilities of each image.

        Args:
            images: (C, h, w) each, as `preprocess.apply` gives them.
            shapes: (H, W) of each original image.

        Yields:
            (K, H, W), sums over K are 1, and (H, W): where the network saw the image.
        """
        if self.preprocess.resize == "tile":
            maps = (self._tiles(image) for image in images)
        else:
            stacks = (
                torch.stack(list(images[i : i + self.batch_size])) for i in range(0, len(images), self.batch_size)
            )
            maps = (one for stack in stacks for one in self._logits(stack.to(self.device, torch.float32)))
        for one, shape in zip(maps, shapes, strict=True):
            logits, seen = self.preprocess.unfit(one.float(), shape)
            yield logits.softmax(0).cpu().numpy(), seen.cpu().numpy()

    def _tiles(self, image: Tensor) -> Tensor:
        """Logits (K, H, W) of one image of any size."""
        given = image[None].to(self.device, torch.float32)
        return sliding_logits(self._logits, given, self.preprocess.size, self.overlap, self.batch_size)[0]

    def _logits(self, image: Tensor) -> Tensor:
        """What the network says; the logarithm of the mean probabilities where there are several orientations."""
        if len(self.orientations) == 1:
            logits: Tensor = self.model(image.contiguous(memory_format=self.layout))
            return logits
        total = torch.zeros((), device=self.device)
        for number in self.orientations:
            turned = self.model(orient(image, number).contiguous(memory_format=self.layout))
            total = total + restore(turned.float().softmax(1), number)
        return (total / len(self.orientations)).clamp_min(1e-12).log()


@dataclass(frozen=True)
class Loaded:
    """Some images, read and prepared.

    Attributes:
        index: Positions in the list of keys of the images that could be read.
        tensors: What `prepare` made of them, each stacked along a new first axis; empty when none could be read.
        failed: (position, reason) of each image that could not be read.
    """

    index: list[int]
    tensors: tuple[Tensor, ...]
    failed: list[tuple[int, str]]


def load_images(
    read: Reader,
    keys: Sequence[Any],
    prepare: Prepare,
    *,
    batch_size: int = 64,
    workers: int = 0,
    start_method: str | None = "spawn",
) -> Iterator[Loaded]:
    """Read and prepare images in the order of their keys.

    Args:
        read: From a key to the raw image (H, W, C); raises DataError for an image that cannot be used. Must be
            picklable when there are workers.
        keys: What `read` takes, one an image.
        prepare: From the raw image to tensors of one shape for all images; may raise DataError too. Picklable.
        batch_size: Images at once.
        workers: Processes that read; 0 reads in this one. The result does not depend on it.
        start_method: How those processes start; ``spawn`` is the one that is safe with GDAL, which holds locks that a
            fork would copy in whatever state they are. None for the platform's default.
    """
    loader = DataLoader(
        _Images(read, keys, prepare),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_stack,
        multiprocessing_context=start_method if workers else None,
    )
    yield from loader


@dataclass(frozen=True)
class _Images(Dataset[tuple[int, tuple[Tensor, ...] | None, str]]):
    """Images by position, with the reason in place of one that cannot be read."""

    read: Reader
    keys: Sequence[Any]
    prepare: Prepare

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> tuple[int, tuple[Tensor, ...] | None, str]:
        try:
            return position, self.prepare(self.read(self.keys[position])), ""
        except DataError as error:
            return position, None, str(error)


def _stack(items: list[tuple[int, tuple[Tensor, ...] | None, str]]) -> Loaded:
    """Collate the readable images and list the others."""
    good = [(position, tensors) for position, tensors, _ in items if tensors is not None]
    failed = [(position, reason) for position, tensors, reason in items if tensors is None]
    columns = zip(*(tensors for _, tensors in good), strict=True)
    return Loaded([position for position, _ in good], tuple(torch.stack(column) for column in columns), failed)
