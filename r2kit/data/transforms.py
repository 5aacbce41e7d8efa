"""Augmentation of raw pixels: albumentations behind one adapter that seeds every sample by itself.

Used plainly, albumentations is wrong here in three ways (seen in runs of 2.0.8): loader workers repeat each other's
draws; one seed given to a pipeline makes all of its transforms draw alike; and brightness transforms clip floats to
0..1 and take uint16 for 0..65535. Here every sample's generator comes from (seed, epoch, row), all transforms of a
pipeline draw from that one generator, and light is changed by a transform that knows no range but the pixel type's.

Transforms act on raw pixels before resizing, so an augmented image passes through exactly the preprocessing that
validation images pass through.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing albumentations must not ask the network for news
import albumentations as A
import cv2
from albumentations.augmentations.crops.transforms import BaseCrop

from r2kit.data.custom import Custom, moves_places
from r2kit.data.preprocess import Preprocess, missing_pixels
from r2kit.recipe import AugmentSpec

Preset = Literal["overhead", "natural", "none"]
_TAG_LISTED = 2**31  # keeps the draws of the listed transforms apart from those of the preset
_VEIL_SIDE = 64  # rows and columns that tell how bright an image is
_SATURATING = {
    np.dtype(name): depth for name, depth in (("uint8", cv2.CV_8U), ("uint16", cv2.CV_16U), ("int16", cv2.CV_16S))
}
_MIN_VISIBLE = 0.2  # a box of which less is left after a cut no longer shows what its label says


class RandomWindow(BaseCrop):
    """Cut out a window of random area, aspect and place: scale and translation without inventing pixels.

    Args:
        area: Smallest and largest share of the image's area.
        stretch: Largest factor by which the window's aspect differs from the image's.
        p: Probability.
    """

    def __init__(self, area: tuple[float, float], stretch: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.area = area
        self.stretch = stretch

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the corners of the window, x before y as albumentations wants them."""
        height, width = params["shape"][:2]
        area = self.py_random.uniform(*self.area)
        stretch = self.stretch ** self.py_random.uniform(-0.5, 0.5)
        h = max(1, min(height, round(height * area**0.5 * stretch)))
        w = max(1, min(width, round(width * area**0.5 / stretch)))
        top, left = self.py_random.randint(0, height - h), self.py_random.randint(0, width - w)
        return {"crop_coords": (left, top, left + w, top + h)}


class BandLight(A.ImageOnlyTransform):
    """Change brightness, contrast and the balance of the bands a little, in any pixel type and number of bands.

    Each band becomes ``((x - m) * contrast + m) * gain`` with m its mean in this image and gain the product of one
    draw for the image and one for the band. Integers are rounded and stay in their type's range; floats are not
    clipped. Pixels without a measurement keep their value.

    Args:
        brightness: Largest relative change of all bands together, e.g. 0.1: a gain from 1/1.1 to 1.1.
        contrast: Largest relative change of the contrast.
        balance: Largest relative change of one band against the others.
        nodata: Raw value that means "no measurement", if any.
        p: Probability.
    """

    def __init__(
        self, brightness: float, contrast: float, balance: float, nodata: float | None = None, p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.brightness = brightness
        self.contrast = contrast
        self.balance = balance
        self.nodata = nodata

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw one gain per band and one contrast."""
        bands = data["image"].shape[2]
        gain = (1.0 + self.brightness) ** self.py_random.uniform(-1.0, 1.0)
        balance = (1.0 + self.balance) ** self.random_generator.uniform(-1.0, 1.0, bands)
        contrast = (1.0 + self.contrast) ** self.py_random.uniform(-1.0, 1.0)
        return {"gain": gain * balance, "contrast": contrast}

    def apply(self, img: np.ndarray, gain: np.ndarray, contrast: float, **params: Any) -> np.ndarray:
        """Return the image with another light; albumentations passes its own entries in `params`."""
        missing = missing_pixels(img, self.nodata)
        if missing is None or not missing.any():
            missing, mean = None, band_means(img)
        else:
            count = np.maximum((~missing).sum(axis=(0, 1)), 1)
            mean = np.where(missing, 0, img).sum(axis=(0, 1), dtype=np.float64) / count
        slope, shift = contrast * gain, (1.0 - contrast) * mean * gain
        if img.dtype == np.uint8:  # a table of 256 values a band instead of arithmetic on every pixel
            values = np.arange(256.0)[:, None] * slope + shift  # (256, C)
            table = np.clip(np.rint(values), 0, 255).astype(np.uint8)
            result = cv2.LUT(np.ascontiguousarray(img), table[None]).reshape(img.shape)
        else:
            # Whole rows at once: loops over the few bands of a pixel would cost several times as much.
            height, width, bands = img.shape
            rows = np.ascontiguousarray(img).reshape(height, width * bands)
            result = rows * np.tile(slope.astype(np.float32), width)
            result += np.tile(shift.astype(np.float32), width)
            result = _as_type(result, img.dtype).reshape(img.shape)
        return result if missing is None else np.where(missing, img, result)


def band_means(img: np.ndarray) -> np.ndarray:
    """Mean of each band of (H, W, C), (C,) float64, in a fraction of NumPy's time."""
    if img.dtype not in (np.uint8, np.uint16, np.int16, np.float32, np.float64):
        return img.mean(axis=(0, 1), dtype=np.float64)
    height, width, bands = img.shape
    rows = cv2.reduce(np.ascontiguousarray(img).reshape(height, width * bands), 0, cv2.REDUCE_SUM, dtype=cv2.CV_64F)
    return rows.reshape(width, bands).sum(axis=0) / (height * width)


def _as_type(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Cast floats (H, W), which are changed in place; integers are rounded and stay in their type's range."""
    if dtype in _SATURATING:  # all of it in one pass
        return cv2.add(values, 0, dtype=_SATURATING[dtype])
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        np.rint(values, out=values)
        np.clip(values, limits.min, limits.max, out=values)
    return values.astype(dtype, copy=False)


class Haze(A.ImageOnlyTransform):
    """Lay a thin veil of uneven density over the image, in any pixel type and number of bands.

    Each pixel becomes ``x * (1 - t) + veil * t``: what light from the ground and light scattered by the air add up to.
    The veil is as bright as the band's mean plus two standard deviations in this image; t runs smoothly between four
    draws at the corners. Pixels without a measurement keep their value.

    Args:
        density: Largest t, below 1.
        nodata: Raw value that means "no measurement", if any.
        p: Probability.
    """

    def __init__(self, density: float, nodata: float | None = None, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.density = density
        self.nodata = nodata

    def get_params(self) -> dict[str, Any]:
        """Draw t at the corners."""
        return {"corners": self.random_generator.uniform(0.0, self.density, (2, 2)).astype(np.float32)}

    def apply(self, img: np.ndarray, corners: np.ndarray, **params: Any) -> np.ndarray:
        """Return the hazy image; albumentations passes its own entries in `params`."""
        height, width, bands = img.shape
        missing = missing_pixels(img, self.nodata)
        places = (slice(None, None, max(1, height // _VEIL_SIDE)), slice(None, None, max(1, width // _VEIL_SIDE)))
        sample = img[places].astype(np.float64)
        if missing is not None:
            sample[missing[places]] = np.nan
            if np.isnan(sample).all(axis=(0, 1)).any():
                return img  # a band without a measurement has no brightness to speak of
        veil = np.nanmean(sample, axis=(0, 1)) + 2.0 * np.nanstd(sample, axis=(0, 1))
        y = np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None]
        x = np.linspace(0.0, 1.0, width, dtype=np.float32)[None]
        top, bottom = corners[0, 0] * (1 - x) + corners[0, 1] * x, corners[1, 0] * (1 - x) + corners[1, 1] * x
        t = np.repeat(top * (1 - y) + bottom * y, bands, axis=1)  # (H, W * C): whole rows at once, as in BandLight
        result: np.ndarray = np.ascontiguousarray(img).reshape(height, width * bands).astype(np.float32)
        result += t * (np.tile(veil.astype(np.float32), width) - result)
        result = _as_type(result, img.dtype).reshape(img.shape)
        return result if missing is None else np.where(missing, img, result)


@dataclass(frozen=True)
class Augmented:
    """An augmented image with what belongs to its places."""

    image: np.ndarray
    """(h, w, C), the type it came in."""
    mask: np.ndarray | None
    """(h, w), the type it came in; None where none was given."""
    boxes: np.ndarray | None
    """(M, 4) float32, x1 y1 x2 y2 in pixels, of the boxes that are still seen; None where none were given."""
    kept: np.ndarray | None
    """(M,) int64, which of the given boxes these are: for their labels."""
    masks: np.ndarray | None
    """(M, h, w), one mask for each box that is still seen; None where none were given."""


class Augment:
    """A preset of transforms, and then any listed ones, as a pure function of an image and a key.

    Args:
        preset: `overhead`: all eight orientations, mild scale, light and haze. `natural`: left-right flips, more scale
            and light. `none`: images stay as they are.
        nodata: Raw value that means "no measurement", if any.
        custom: What the recipe lists beyond the preset.
    """

    def __init__(self, preset: Preset, nodata: float | None = None, custom: Custom | None = None) -> None:
        self._preset = _Stage(lambda: _steps(preset, nodata))
        windows = [step for step in _steps(preset, nodata) if isinstance(step, RandomWindow)]
        self.margin = windows[0].area[0] ** -0.25 if windows else 1.0
        """Side of an image over the side of the tile it becomes, for which the tile is as often enlarged as reduced."""
        self._custom = custom
        self._listed = None if custom is None else _Stage(custom.build)

    @classmethod
    def of(cls, spec: AugmentSpec, preprocess: Preprocess, target: str = "class", fill_mask: int = 255) -> Augment:
        """Build what a recipe asks for.

        Args:
            spec: The `augment` part of a recipe.
            preprocess: Bands, units and statistics of the images.
            target: What follows the image: `class`, `classes`, `mask` or `boxes`.
            fill_mask: Value of a mask at places from outside the image; 255 is left out of losses and metrics.

        Raises:
            DataError: If a listed transform is wrong or does not suit these images.
        """
        custom = Custom(spec.transforms, preprocess, target, fill_mask) if spec.transforms else None
        return cls(spec.preset, preprocess.nodata, custom)

    def __call__(self, raw: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
        """Augment one image.

        Args:
            raw: (H, W, C) raw pixels of any real type; not changed.
            key: Non-negative integers, e.g. (seed, epoch, row); the result is a pure function of image and key.

        Returns:
            (h, w, C), same type.
        """
        return self._run({"image": raw}, key)["image"]

    def with_targets(
        self,
        raw: np.ndarray,
        key: tuple[int, ...],
        *,
        mask: np.ndarray | None = None,
        boxes: np.ndarray | None = None,
        masks: np.ndarray | None = None,
    ) -> Augmented:
        """Augment one image as `__call__` does, and move what belongs to its places with it.

        Args:
            raw: (H, W, C) raw pixels of any real type; not changed.
            key: As of `__call__`; the image is the same as there.
            mask: (H, W) of any real type; its values stay what they are.
            boxes: (N, 4), x1 y1 x2 y2 in pixels. A box of which less than a fifth is still seen is left out, the others
                end at the border, and after listed transforms where their mask ends, if they have one: around a box
                that was turned there is more room than around the object in it.
            masks: (N, H, W) bool, one for each box: no object reaches outside the image.
        """
        if masks is not None and (boxes is None or len(masks) != len(boxes) or masks.dtype != bool):
            raise ValueError("masks: one for each box is needed, of type bool")
        data: dict[str, Any] = {"image": raw}
        if mask is not None:
            data["mask"] = mask
        if boxes is not None:
            data |= {"bboxes": np.asarray(boxes, np.float32).reshape(-1, 4), "position": np.arange(len(boxes))}
        if masks is not None and len(masks):
            data["masks"] = masks.view(np.uint8)
        result = self._run(data, key)
        kept = None if boxes is None else np.asarray(result["position"], dtype=np.int64)
        if masks is not None:
            shape = result["image"].shape[:2]
            moved = np.asarray(result["masks"]) if len(masks) else np.zeros((0, *shape), np.uint8)
            masks = moved[kept] == 1  # what is filled is of another value
        places = None if boxes is None else np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
        if masks is not None and places is not None and self._listed is not None and self._listed.moves:
            places = _within(places, masks)
        return Augmented(result["image"], result.get("mask"), places, kept, masks)

    def _run(self, data: dict[str, Any], key: tuple[int, ...]) -> dict[str, Any]:
        """The preset in raw units, then the listed transforms in the domain that they understand."""
        data = self._preset.run(data, key)
        if self._custom is None or self._listed is None:
            return data
        image, back = self._custom.enter(data["image"])
        data = self._listed.run({**data, "image": image}, (*key, _TAG_LISTED))
        return {**data, "image": back(data["image"])}


def _within(boxes: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Let boxes (N, 4) end where their masks (N, H, W) end; a box without a pixel of its mask stays."""
    tight = boxes.copy()
    for box, mask in zip(tight, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            box[:2] = np.maximum(box[:2], (columns[0], rows[0]))
            box[2:] = np.minimum(box[2:], (columns[-1] + 1, rows[-1] + 1))
    return tight


class _Stage:
    """Some transforms as a pipeline for images, and one for images with boxes.

    Args:
        build: Makes the transforms, new ones at each call: a pipeline writes into its transforms.
    """

    def __init__(self, build: Callable[[], list[Any]]) -> None:
        self.plain = A.Compose(build())
        self.moves = any(moves_places(step) for step in self.plain.transforms)
        boxes = A.BboxParams(format="pascal_voc", label_fields=["position"], clip=True, min_visibility=_MIN_VISIBLE)
        self.boxed = A.Compose(build(), bbox_params=boxes) if self.moves else self.plain

    def run(self, data: dict[str, Any], key: tuple[int, ...]) -> dict[str, Any]:
        """Transform one image with all that is given, drawing from the key alone."""
        if not self.plain.transforms:
            return data
        given = data if self.moves else {"image": data["image"]}  # no place changes
        pipeline = self.boxed if "bboxes" in given else self.plain
        words = np.random.SeedSequence(key).generate_state(3, np.uint64)
        # One generator for the whole pipeline: set_random_seed would start every transform from the same state.
        pipeline.set_random_state(np.random.default_rng(words[:2]), random.Random(int(words[2])))
        return {**data, **pipeline(**given)}


def _steps(preset: Preset, nodata: float | None) -> list[Any]:
    """The transforms of a preset, new ones at each call: a pipeline writes into its transforms."""
    if preset == "overhead":
        return [
            RandomWindow(area=(0.7, 1.0), stretch=1.1, p=0.8),
            A.D4(p=1.0),
            Haze(density=0.3, nodata=nodata, p=0.15),
            BandLight(brightness=0.1, contrast=0.1, balance=0.03, nodata=nodata, p=0.8),
        ]
    if preset == "natural":
        return [
            RandomWindow(area=(0.4, 1.0), stretch=1.33, p=1.0),
            A.HorizontalFlip(p=0.5),
            BandLight(brightness=0.25, contrast=0.25, balance=0.05, nodata=nodata, p=0.8),
        ]
    return []
