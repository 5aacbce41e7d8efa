"""Images with masks on their way to the network: what is done to an image is done to its mask.

With ``resize='tile'`` an image is never resized: training sees a window of it, drawn anew each time, and everything
else sees the whole image, which is read in overlapping tiles (`r2kit.dense.sliding`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from r2kit.data.loader import Batch, Samples
from r2kit.data.preprocess import Preprocess, missing_pixels
from r2kit.data.sources import DenseSource
from r2kit.data.targets import IGNORE
from r2kit.errors import DataError
from r2kit.recipe import AugmentSpec

_TAG_AUGMENT, _TAG_WINDOW = 4, 7  # keep the random numbers of the uses of one seed apart


class MaskSamples(Samples):
    """Reads, augments and resizes single images with their masks.

    Args:
        source: Where the images and masks are.
        labels: (N,) int64, one for each row of the manifest.
        preprocess: Size and normalisation.
        augment: What varies training images, or None for evaluation.
        seed: The recipe's seed.
        train: Whether `resize='tile'` cuts a window or leaves the image whole.
        positions: (K,) the run's position of each class of the source; None where they are the same.
    """

    source: DenseSource
    target = "mask"

    def __init__(
        self,
        source: DenseSource,
        labels: np.ndarray,
        preprocess: Preprocess,
        augment: AugmentSpec | None,
        seed: int,
        *,
        train: bool,
        positions: np.ndarray | None = None,
    ) -> None:
        super().__init__(source, labels, preprocess, augment, seed)
        self.window = train and preprocess.resize == "tile"
        # A window is cut by hand before augmentation, and what that leaves of it brought to size.
        self.fit = replace(preprocess, resize="squash") if self.window else preprocess
        self.positions = positions

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        """Return raw-unit `image` (C, h, w), `mask` (h, w) uint8 and `index` of a key of the sampler."""
        epoch, row, *copy = key
        raw = self.source.read(row)
        mask = known_mask(self.source.read_target(row).mask, raw, self.preprocess.nodata, self.positions)
        if self.window:
            margin = 1.0 if self.augment is None else self.augmentation.margin
            side = tuple(round(length * margin) for length in self.preprocess.size)
            place = np.random.default_rng([self.seed, _TAG_WINDOW, epoch, row, *copy]).random(2)
            raw, mask = cut_window(raw, mask, (side[0], side[1]), place, self.preprocess)
        if self.augment is not None:
            moved = self.augmentation.with_targets(raw, (self.seed, _TAG_AUGMENT, epoch, row, *copy), mask=mask)
            assert moved.mask is not None
            raw, mask = moved.image, moved.mask
        try:
            image = self.fit.fit(raw)
        except DataError as error:
            raise DataError(f"{self.source.manifest['path'].iloc[row]}: {error}") from error
        return {"image": image, "mask": self.fit.fit_mask(mask), "index": row}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Return `image` float32 (B, C, H, W) normalised, `mask` int64 (B, H, W), `index` int64 (B,).

        Images of different sizes are filled up to the largest at their right and lower side: with the mean colour, and
        with `IGNORE`.
        """
        height = max(sample["mask"].shape[0] for sample in samples)
        width = max(sample["mask"].shape[1] for sample in samples)

        def filled(tensor: Tensor, value: float) -> Tensor:
            h, w = tensor.shape[-2:]
            return tensor if (h, w) == (height, width) else F.pad(tensor, (0, width - w, 0, height - h), value=value)

        images = [filled(self.preprocess.normalize(sample["image"][None]), 0.0) for sample in samples]
        return {
            "image": torch.cat(images),
            "mask": torch.stack([filled(sample["mask"], IGNORE) for sample in samples]).long(),
            "index": torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
        }


def known_mask(
    mask: np.ndarray, raw: np.ndarray, nodata: float | None, positions: np.ndarray | None = None
) -> np.ndarray:
    """Return a source's mask in the run's classes, `IGNORE` also where no band of the image has a measurement.

    Args:
        mask: (H, W) uint8, positions in the source's classes.
        raw: (H, W, C), its image.
        nodata: Raw value that means "no measurement", if any.
        positions: (K,) the run's position of each class of the source; None where they are the same.
    """
    if positions is not None:
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[: len(positions)] = positions
        mask = table[mask]
    missing = missing_pixels(raw, nodata)
    return mask if missing is None else np.where(missing.all(axis=2), np.uint8(IGNORE), mask)


def cut_window(
    raw: np.ndarray, mask: np.ndarray, size: tuple[int, int], place: np.ndarray, preprocess: Preprocess
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a window out of an image and its mask; an image smaller than the window is filled up around.

    Args:
        raw: (H, W, C).
        mask: (H, W) uint8.
        size: (h, w) of the window.
        place: Where it lies, (2,) in [0, 1): 0 at the top and left.
        preprocess: Its means fill up the image; the mask is filled up with `IGNORE`.

    Returns:
        (h, w, C) and (h, w), the types they came in.
    """
    height, width = raw.shape[:2]
    top, left = (int(p * (max(0, have - want) + 1)) for p, have, want in zip(place, (height, width), size, strict=True))
    raw, mask = raw[top : top + size[0], left : left + size[1]], mask[top : top + size[0], left : left + size[1]]
    if raw.shape[:2] == size:
        return raw, mask
    colour = np.asarray(preprocess.mean) * preprocess.scale
    canvas = np.empty((*size, raw.shape[2]), dtype=raw.dtype)
    canvas[:] = np.rint(colour) if raw.dtype.kind in "iu" else colour
    around = np.full(size, IGNORE, dtype=np.uint8)
    down, right = (int(p * (want - have + 1)) for p, have, want in zip(place, raw.shape[:2], size, strict=True))
    canvas[down : down + raw.shape[0], right : right + raw.shape[1]] = raw
    around[down : down + raw.shape[0], right : right + raw.shape[1]] = mask
    return canvas, around
