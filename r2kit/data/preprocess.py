"""From raw pixels to what the network sees: one object that travels with every run, checkpoint and export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from r2kit.data.targets import IGNORE
from r2kit.errors import DataError, RunError
from r2kit.recipe.base import LARGEST_SIDE

ResizeMode = Literal["squash", "crop", "pad", "tile"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocess:
    """Bands, size and normalisation of the network's input, and the classes of its output.

    A pixel becomes ``(raw / scale - mean) / std`` after resizing. Pixels without a measurement (`nodata`, NaN) and
    the border of ``resize='pad'`` become the band's mean, which is zero after normalisation.
    """

    bands: tuple[str, ...]
    """Band names in order."""
    mean: tuple[float, ...]
    """Mean of each band, in raw units divided by `scale`."""
    std: tuple[float, ...]
    """Standard deviation of each band, in raw units divided by `scale`."""
    scale: float
    """Divisor of raw pixels: 255 for uint8, 65535 for 16-bit pictures, 1 where the values are physical."""
    size: tuple[int, int]
    """(H, W) of the network's input in pixels."""
    resize: ResizeMode
    """How another shape reaches `size`: stretched; centre cut out at the same aspect; padded; or not at all (`tile`):
    `fit` then leaves images as large as they are, to be read in tiles of `size`."""
    interpolation: Interpolation
    """How resized pixels are computed; shrinking averages over all pixels it covers (antialias)."""
    classes: tuple[str, ...]
    """Class names; position is the label."""
    nodata: float | None = None
    """Raw value that means "no measurement"."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            DataError: If lengths differ, a standard deviation is not positive, or a mode is unknown.
        """
        if not len(self.bands) == len(self.mean) == len(self.std):
            raise DataError(
                f"preprocess: {len(self.bands)} bands ({', '.join(self.bands)}) with {len(self.mean)} means and "
                f"{len(self.std)} standard deviations; there must be one of each per band"
            )
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(value) and value > 0 for value in self.std):
            raise DataError(f"preprocess: mean {self.mean} must be finite and std {self.std} above zero")
        if not self.scale > 0:
            raise DataError(f"preprocess: scale {self.scale} must be above zero")
        for name, value, allowed in (
            ("resize", self.resize, ("squash", "crop", "pad", "tile")),
            ("interpolation", self.interpolation, ("nearest", "bilinear", "bicubic")),
        ):
            if value not in allowed:
                raise DataError(f"preprocess: {name} is '{value}', allowed are {', '.join(allowed)}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON primitives; `from_dict` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """Build from what `to_dict` gave.

        Raises:
            DataError: If a key is missing or unknown, or a value is none that `to_dict` gives: the file may be a
                stranger's.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(values) != fields:
            wrong = ", ".join(sorted(set(values) ^ fields))
            raise DataError(f"preprocess: missing or unknown keys: {wrong}")
        try:
            found: Preprocess = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"preprocess: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        for key, names in (("bands", found.bands), ("classes", found.classes)):
            if not names or len(set(names)) != len(names):
                raise DataError(f"preprocess: {key} must be one name or more, each once")
        if not all(1 <= side <= LARGEST_SIDE for side in found.size):
            raise DataError(f"preprocess: size is {found.size}, allowed are sides from 1 to {LARGEST_SIDE} pixels")
        return found

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Preprocess:
        """Read what `save` wrote.

        Raises:
            RunError: If the file is missing or not such a file.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, TypeError, DataError) as error:
            raise RunError(f"{path}: cannot be read as preprocessing of a run: {error}") from error

    @property
    def is_picture(self) -> bool:
        """Whether pixels are display colours in 0..1 after scaling, so that statistics of weights may apply."""
        return self.scale != 1.0

    def with_stats(
        self, mean: Sequence[float], std: Sequence[float], interpolation: Interpolation | None = None
    ) -> Preprocess:
        """Return a copy that normalises as given weights expect.

        Args:
            mean: Mean of each band, for pixels in 0..1.
            std: Standard deviation of each band, for pixels in 0..1.
            interpolation: How the weights' own preprocessing resizes; None keeps this one's.

        Raises:
            DataError: If the number of bands differs, or the pixels are physical values rather than colours.
        """
        if not self.is_picture:
            raise DataError(
                "preprocess: the statistics of pretrained weights are for colours in 0..1; these bands "
                f"({', '.join(self.bands)}) hold physical values and keep their own statistics"
            )
        if len(mean) != len(self.bands):
            raise DataError(
                f"preprocess: statistics for {len(mean)} bands, but the images have {len(self.bands)} "
                f"({', '.join(self.bands)})"
            )
        return dataclasses.replace(
            self, mean=tuple(mean), std=tuple(std), interpolation=interpolation or self.interpolation
        )

    def apply(self, raw: np.ndarray) -> Tensor:
        """Turn one image into the network's input: exactly what validation sees.

        Args:
            raw: (H, W, C) raw pixels, bands in the order of `bands`.

        Returns:
            (C, h, w) float32, normalised, (h, w) = `size`, but for ``resize='tile'`` (H, W).

        Raises:
            DataError: If the number of bands differs.
        """
        return self.normalize(self.fit(raw)[None])[0]

    def fit(self, raw: np.ndarray) -> Tensor:
        """Bring one image to `size` in raw units.

        Args:
            raw: (H, W, C) raw pixels.

        Returns:
            (C, h, w): uint8 stays uint8, everything else becomes float32.

        Raises:
            DataError: If the number of bands differs.
        """
        if raw.ndim != 3 or raw.shape[2] != len(self.bands):
            found = raw.shape[2] if raw.ndim == 3 else f"shape {raw.shape} with no"
            raise DataError(f"image with {found} bands, expected {len(self.bands)} ({', '.join(self.bands)})")
        raw = self.fill_missing(raw)
        if raw.dtype != np.uint8:
            raw = raw.astype(np.float32)
        if self.resize == "crop":
            raw = raw[centre_window(raw.shape[:2], self.size)]
        if not raw.flags.writeable:  # torch warns about sharing memory that it cannot write
            raw = raw.copy()
        elif any(stride < 0 for stride in raw.strides):
            raw = np.ascontiguousarray(raw)
        image = torch.from_numpy(raw).permute(2, 0, 1)  # (C, H, W)
        if self.resize == "tile":
            return image.contiguous()
        if self.resize == "pad":
            return self.fill_up(self._resample(image, inner_size(raw.shape[:2], self.size)))
        return self._resample(image, self.size)

    def fit_mask(self, mask: np.ndarray) -> Tensor:
        """Bring a mask to where `fit` brings its image; no values but the mask's own and `IGNORE` come out.

        Args:
            mask: (H, W) uint8.

        Returns:
            (h, w) uint8; `IGNORE` where the image is filled up.
        """
        if self.resize == "crop":
            mask = mask[centre_window(mask.shape, self.size)]
        given = torch.from_numpy(np.ascontiguousarray(mask))[None, None]  # (1, 1, H, W)
        if self.resize == "tile":
            return given[0, 0].clone()
        size = inner_size(mask.shape, self.size) if self.resize == "pad" else self.size
        fitted = given if tuple(given.shape[2:]) == size else F.interpolate(given, size, mode="nearest-exact")
        canvas = torch.full(self.size, IGNORE, dtype=torch.uint8)
        top, left = (self.size[0] - size[0]) // 2, (self.size[1] - size[1]) // 2
        canvas[top : top + size[0], left : left + size[1]] = fitted[0, 0]
        return canvas

    def unfit(self, maps: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Bring maps over the network's input back to the pixels of the original image.

        Args:
            maps: (K, h, w) float, such as logits, (h, w) as `fit` gave.
            shape: (H, W) of the original image.

        Returns:
            (K, H, W) float, resized bilinearly, and (H, W) bool: where the network saw the image. The maps are zero
            elsewhere, which is what ``resize='crop'`` cut off.
        """
        everywhere = torch.ones(shape, dtype=torch.bool, device=maps.device)
        if self.resize == "tile":
            return maps, everywhere
        if self.resize == "pad":
            height, width = inner_size(shape, self.size)
            top, left = (self.size[0] - height) // 2, (self.size[1] - width) // 2
            maps = maps[:, top : top + height, left : left + width]
        window = centre_window(shape, self.size) if self.resize == "crop" else (slice(0, shape[0]), slice(0, shape[1]))
        size = (window[0].stop - window[0].start, window[1].stop - window[1].start)
        if tuple(maps.shape[1:]) != size:
            maps = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
        whole = maps.new_zeros((len(maps), *shape))
        whole[:, window[0], window[1]] = maps
        seen = torch.zeros_like(everywhere)
        seen[window] = True
        return whole, seen

    def normalize(self, images: Tensor) -> Tensor:
        """Scale and normalise a batch.

        Args:
            images: (B, C, H, W) in raw units, any dtype.

        Returns:
            (B, C, H, W) float32, contiguous.
        """
        factor = torch.tensor([1.0 / (self.scale * std) for std in self.std], device=images.device)
        offset = torch.tensor([mean / std for mean, std in zip(self.mean, self.std, strict=True)], device=images.device)
        # One pass in place after the conversion; the same arithmetic for one image and for a batch.
        result = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return result.mul_(factor[:, None, None]).sub_(offset[:, None, None])

    def denormalize(self, images: Tensor) -> Tensor:
        """Make normalised images visible.

        Red, green and blue are shown where bands have these names, otherwise the first three bands (the first one in
        grey if there are fewer). Colours come back as they were; physical values are stretched over 2.5 standard
        deviations to both sides of the mean.

        Args:
            images: (..., C, H, W), normalised.

        Returns:
            (..., 3, H, W) in [0, 1].
        """
        names = [band.lower() for band in self.bands]
        if {"red", "green", "blue"} <= set(names):
            shown = [names.index(colour) for colour in ("red", "green", "blue")]
        else:
            shown = [0, 1, 2] if len(names) >= 3 else [0, 0, 0]
        images = images.float()[..., shown, :, :]
        if not self.is_picture:
            return (images / 5.0 + 0.5).clamp(0.0, 1.0)
        mean = torch.tensor([self.mean[i] for i in shown], device=images.device)[:, None, None]
        std = torch.tensor([self.std[i] for i in shown], device=images.device)[:, None, None]
        return (images * std + mean).clamp(0.0, 1.0)

    def fill_missing(self, raw: np.ndarray) -> np.ndarray:
        """Replace pixels (H, W, C) without a measurement by their band's mean."""
        missing = missing_pixels(raw, self.nodata)
        if missing is None or not missing.any():
            return raw
        mean = np.asarray(self.mean) * self.scale
        if raw.dtype.kind in "iu":
            mean = np.rint(mean)
        return np.where(missing, mean.astype(raw.dtype), raw)

    def _resample(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize (C, H, W) to `size`."""
        if tuple(image.shape[1:]) == size:
            return image
        if self.interpolation == "nearest":
            return F.interpolate(image[None], size, mode="nearest-exact")[0]
        return F.interpolate(image[None], size, mode=self.interpolation, antialias=True, align_corners=False)[0]

    def fill_up(self, image: Tensor) -> Tensor:
        """Put an image (C, h, w) in raw units in the middle of a canvas of `size` of the mean colour."""
        mean = torch.tensor([mean * self.scale for mean in self.mean])
        if image.dtype == torch.uint8:
            mean = mean.round().clamp(0, 255)
        height, width = image.shape[1:]
        canvas = mean.to(image.dtype)[:, None, None].repeat(1, *self.size)
        top, left = (self.size[0] - height) // 2, (self.size[1] - width) // 2
        canvas[:, top : top + height, left : left + width] = image
        return canvas


def missing_pixels(raw: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Mark pixels without a measurement: equal to `nodata`, or NaN in floating-point images.

    Args:
        raw: (H, W, C) raw pixels.
        nodata: The value that stands for no measurement, if any.

    Returns:
        (H, W, C) bool, or None when no pixel can be missing.
    """
    is_float = raw.dtype.kind == "f"
    if nodata is None or np.isnan(nodata):
        return np.isnan(raw) if is_float else None
    missing = raw == nodata
    return missing | np.isnan(raw) if is_float else missing


def centre_window(shape: Sequence[int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Largest centred window of `shape` (H, W) with the aspect ratio of `size` (H, W), at least one pixel."""
    height, width = shape[0], shape[1]
    ratio = min(height / size[0], width / size[1])
    inner = (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio)))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    return slice(top, top + inner[0]), slice(left, left + inner[1])


def inner_size(shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int]:
    """Largest (h, w) with the aspect ratio of `shape` (H, W) that fits into `size` (H, W), at least one pixel."""
    ratio = min(size[0] / shape[0], size[1] / shape[1])
    return max(1, round(shape[0] * ratio)), max(1, round(shape[1] * ratio))
