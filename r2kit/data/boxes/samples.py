"""Images with boxes on their way to the network: what is done to an image is done to its objects.

Training sees one piece of an image at a time, and everything else the whole image in all its pieces: one piece is the
whole image, or with ``resize='tile'`` a tile of it at its own scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2kit.data.boxes.source import BoxedImages
from r2kit.data.compose import Sample, copy_paste, mosaic
from r2kit.data.loader import Samples
from r2kit.data.placement import Placement, Window, cut_boxes
from r2kit.data.preprocess import Preprocess
from r2kit.data.tiles import Piece, pieces_of, tile_windows
from r2kit.recipe import AugmentSpec, BoxSpec

_TAG_AUGMENT, _TAG_COMPOSE = 4, 8  # keep the random numbers of the uses of one seed apart


@dataclass(frozen=True)
class Unit:
    """What one training sample is cut from."""

    row: int
    """Row of the manifest."""
    window: Window
    """The part of its image."""


class BoxSamples(Samples):
    """Single images with their objects.

    Args:
        source: Where they are.
        labels: (N,) one for each row of the manifest.
        preprocess: Size and normalisation.
        augment: The `augment` part of a recipe; None for evaluation.
        boxes: The `data.boxes` part of a recipe.
        seed: The recipe's seed.
        rows: The rows of the part that is loaded: where mosaic and copy-paste take other images from.
        positions: (K,) the run's position of each class of the source; None where they are the same.
    """

    source: BoxedImages
    target = "boxes"

    def __init__(
        self,
        source: BoxedImages,
        labels: NDArray[np.int64],
        preprocess: Preprocess,
        augment: AugmentSpec | None,
        boxes: BoxSpec,
        seed: int,
        *,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(source, labels, preprocess, augment, seed)
        self.varied = augment is not None and augment.varies
        self.boxes = boxes
        self.positions = positions
        self.units = self._units(rows) if augment is not None else []

    def _units(self, rows: NDArray[np.int64]) -> list[Unit]:
        """Every tile of every image, a little larger where augmentation cuts a window out of it; else whole images."""
        units = []
        margin = self.augmentation.margin if self.varied else 1.0
        tile = [round(side * margin) for side in self.preprocess.size]
        for row in rows.tolist():
            shape = self.source.sizes[row]
            whole: list[Window] = [(0, 0, *shape)]
            tiled = self.preprocess.resize == "tile"
            units += [Unit(row, w) for w in (tile_windows(shape, tile, self.boxes.overlap) if tiled else whole)]
        return units

    def keys(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what a sampler draws from: positions of the units while training, else the rows."""
        return np.arange(len(self.units), dtype=np.int64) if self.augment is not None else rows

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        """Return one sample.

        Training, for a key (epoch, unit): raw-unit `image` (C, h, w), `boxes` (N, 4), `labels` (N,) and, with outlines,
        `masks` (N, h, w), without crowds, in pixels of the network's input. Evaluation, for (epoch, row): `image`
        (P, C, h, w) and `pieces`, P of them, and `truth` in pixels of the image. Both have `index`.
        """
        epoch, at, *copy = key
        return self._whole(at) if self.augment is None else self._part(at, (epoch, at, *copy))

    def _whole(self, row: int) -> dict[str, Any]:
        """All pieces of an image."""
        raw, target = self._read(row)
        pieces = pieces_of(self.preprocess, raw.shape[:2], self.boxes.overlap)
        return {"image": fit_pieces(self.preprocess, raw, pieces), "pieces": pieces, "truth": target, "index": row}

    def _part(self, at: int, key: tuple[int, ...]) -> dict[str, Any]:
        """One augmented piece."""
        assert self.augment is not None
        raw, target = self._unit(at)
        rng = np.random.default_rng([self.seed, _TAG_COMPOSE, *key])
        use_mosaic, use_paste = rng.random(2) < (self.augment.mosaic, self.augment.copy_paste)
        others = rng.integers(0, len(self.units), 4)
        if use_mosaic:
            fill = np.asarray(self.preprocess.mean) * self.preprocess.scale
            samples: list[Sample] = [(raw, target), *(self._unit(int(other)) for other in others[:3])]
            raw, target = mosaic(samples, fill, self.boxes.min_visible, rng)
        if use_paste:
            raw, target = copy_paste((raw, target), self._unit(int(others[3])), rng)
        if self.varied:
            moved = self.augmentation.with_targets(
                raw, (self.seed, _TAG_AUGMENT, *key), boxes=target.boxes, masks=target.masks
            )
            assert moved.boxes is not None
            raw = moved.image
            target = target.take(moved.kept, moved.boxes, moved.masks)  # type: ignore[arg-type]
        fit = self._fit_of(self.units[at].window, raw.shape)
        placement = Placement.of(fit, raw.shape[:2])
        piece = Piece((0, 0, *raw.shape[:2]), placement, raw.shape[:2])
        image = fit_pieces(fit, raw, [piece])[0]
        kept = np.flatnonzero(~target.crowd)
        target = target.take(kept)
        boxes, kept = cut_boxes(placement.into(target.boxes), (0, 0, *self.preprocess.size), self.boxes.min_visible)
        masks = None if target.masks is None else placement.masks_into(target.masks[kept])
        if masks is not None and len(masks):  # an object may have lost all its pixels to the border or to shrinking
            seen = masks.any(axis=(1, 2))
            boxes, kept, masks = boxes[seen], kept[seen], masks[seen]
        sample: dict[str, Any] = {
            "image": image,
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(target.labels[kept]),
            "index": at,
        }
        return sample if masks is None else {**sample, "masks": torch.from_numpy(masks)}

    def _fit_of(self, window: Window, shape: Sequence[int]) -> Preprocess:
        """How what augmentation left of a tile reaches the network's size.

        A tile that was cut larger for it is brought to size. An image that is smaller than a tile keeps its scale and
        is filled up around, and its shape where only one of its sides is smaller.
        """
        if self.preprocess.resize != "tile" or not self.varied:
            return self.preprocess
        size = self.preprocess.size
        if window[2] >= size[0] and window[3] >= size[1]:
            return replace(self.preprocess, resize="squash")
        return (
            self.preprocess if shape[0] <= size[0] and shape[1] <= size[1] else replace(self.preprocess, resize="pad")
        )

    def _unit(self, at: int) -> Sample:
        """The pixels and objects of a unit."""
        unit = self.units[at]
        raw, target = self._read(unit.row)
        if unit.window == (0, 0, *raw.shape[:2]):
            return raw, target
        top, left, height, width = unit.window
        boxes, kept = cut_boxes(target.boxes, unit.window, self.boxes.min_visible)
        masks = None if target.masks is None else target.masks[kept, top : top + height, left : left + width]
        return raw[top : top + height, left : left + width], target.take(kept, boxes, masks)

    def _read(self, row: int) -> Sample:
        """The pixels and objects of an image, with the labels of the run."""
        target = self.source.read_target(row)
        if self.positions is not None:
            target = replace(target, labels=self.positions[target.labels - 1] + 1)
        return self.source.read(row), target

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch.

        Training: `image` float32 (B, C, H, W) normalised, `boxes`, `labels` and `masks` as lists, `index` int64 (B,).
        Evaluation: `image` float32 (all pieces, C, H, W), `pieces` and `truth` as lists of B, `index`.
        """
        images = [sample["image"] for sample in samples]
        batch: dict[str, Any] = {key: [s[key] for s in samples] for key in samples[0] if key not in ("image", "index")}
        stacked = torch.stack(images) if self.augment is not None else torch.cat(images)
        batch["image"] = self.preprocess.normalize(stacked)
        batch["index"] = torch.tensor([sample["index"] for sample in samples], dtype=torch.int64)
        return batch


def fit_pieces(preprocess: Preprocess, raw: NDArray[Any], pieces: Sequence[Piece]) -> Tensor:
    """Bring the pieces of an image to the size of the network's input.

    Args:
        preprocess: The size.
        raw: (H, W, C) raw pixels.
        pieces: As `pieces_of` gave them.

    Returns:
        (P, C, h, w) in raw units.

    Raises:
        DataError: If the number of bands differs.
    """
    return torch.stack([_filled_up(preprocess, preprocess.fit(piece.cut(raw))) for piece in pieces])


def _filled_up(preprocess: Preprocess, image: Tensor) -> Tensor:
    """Put an image (C, h, w) that is smaller than a tile in the middle of one."""
    return image if tuple(image.shape[1:]) == preprocess.size else preprocess.fill_up(image)
