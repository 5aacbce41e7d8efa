"""Any list of albumentations transforms, checked by name, argument, bands and what has to follow the image.

albumentations only warns about an argument that it does not know, reduces images with aliasing, takes floats for 0..1
and 16 bits for 0..65535. Here an unknown name or argument is an error, images are reduced as for validation unless the
recipe says otherwise, masks lie on their images, what is filled is of the mean colour, and pixels that are not 8-bit
colours pass through the transforms in a domain of 0..1 that is made for each band, so that nothing is clipped and every
band varies by its own range.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing albumentations must not ask the network for news
import albumentations as A
import cv2
from albumentations.core.type_definitions import Targets

from r2kit.data.preprocess import Preprocess
from r2kit.data.shrinking import SHRINKING
from r2kit.errors import DataError, did_you_mean

RGB_ONLY = frozenset(
    (
        *("CLAHE", "ChromaticAberration", "ColorJitter", "Equalize", "HEStain", "HueSaturationValue", "ISONoise"),
        *("PlanckianJitter", "RGBShift", "RandomFog", "RandomGravel", "RandomRain", "RandomSnow", "RandomSunFlare"),
        *("Spatter", "ToGray", "ToSepia"),
    )
)
"""Transforms that make sense of red, green and blue only."""
_COLOURS = ("red", "green", "blue")

_REFUSED = {
    **dict.fromkeys(
        ("Normalize", "ToFloat", "FromFloat", "ToTensorV2", "ToTensor3D", "ToRGB"),
        "changes what a pixel is, and the run's own preprocessing does that",
    ),
    "Lambda": "needs Python code, which a recipe does not hold",
    "TextImage": "needs texts and a font, which a recipe does not hold",
    **dict.fromkeys(
        ("Compose", "Sequential", "OneOrOther", "RandomOrder", "ReplayCompose"),
        "is a list of transforms; name them one after the other, each with its p, or choose among them with OneOf or "
        "SomeOf",
    ),
}
_CHOICES = ("OneOf", "SomeOf")
"""Transforms that choose among those that they list under `transforms`."""
Fill = float | tuple[float, ...]
"""A value for all bands, or one for each."""
_ONE_FILL = ("ChannelDropout", "CropAndPad", "MaskDropout")
"""Transforms that take a value for all bands; CropAndPad would draw one of the bands' values for it."""
_OWN_RULE = ("self", "mask_interpolation")  # masks hold classes: they are never interpolated
_DEVIATIONS = 4.0  # an ordinary band lies within this many standard deviations of its mean


class Custom:
    """The transforms that a recipe lists, and the domain of pixels in which they work.

    Args:
        listed: Each with `name` and arguments.
        preprocess: Bands, units and statistics of the images.
        target: What follows the image: `class`, `classes`, `mask` or `boxes`.
        fill_mask: Value of a mask at places from outside the image, unless a transform says otherwise.

    Raises:
        DataError: If a name, an argument or a value is wrong, the bands do not suit, or the target cannot follow.
    """

    def __init__(
        self, listed: Sequence[Mapping[str, Any]], preprocess: Preprocess, target: str = "class", fill_mask: int = 255
    ) -> None:
        self._listed = listed
        self._preprocess = preprocess
        self._fill_mask = fill_mask
        for where, transform in named_leaves(listed, self.build(), "augment.transforms"):
            _check_fit(where, transform, type(transform).__name__, preprocess, target)

    def build(self) -> list[Any]:
        """Make the transforms, new ones at each call."""
        return make_transforms(self._listed, self._fill_mask, _mean_colour(self._preprocess))

    def enter(self, raw: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """Bring an image into the domain of the transforms.

        8-bit colours are in it already. Other colours are divided by their type's largest value. Physical values go by
        each band's own range, without clipping any: four standard deviations to both sides of its mean over the
        training images, widened on both sides where this image goes beyond it, so that the mean is always 0.5. Pixels
        without a measurement become the band's mean, as the network will see them, so that nothing blends with them.

        Args:
            raw: (H, W, C) raw pixels.

        Returns:
            (H, W, C) uint8, or float32 in 0..1; and the way back to the type and units of `raw`.
        """
        preprocess = self._preprocess
        raw = preprocess.fill_missing(raw)
        if preprocess.scale == 255.0 and raw.dtype != np.uint8:  # 8 bits with pixels that were missing
            raw = np.clip(np.rint(raw), 0, 255).astype(np.uint8)
        if raw.dtype == np.uint8:
            return raw, lambda image: image
        low, width = np.zeros(raw.shape[2]), np.full(raw.shape[2], preprocess.scale)
        if not preprocess.is_picture:
            mean, std = (np.asarray(values) * preprocess.scale for values in (preprocess.mean, preprocess.std))
            beyond = np.maximum(raw.max(axis=(0, 1)) - mean, mean - raw.min(axis=(0, 1)))
            reach = np.maximum(_DEVIATIONS * std, beyond)
            low, width = mean - reach, 2.0 * reach
        domain = ((raw - low) / width).astype(np.float32)
        return np.clip(domain, 0.0, 1.0, out=domain), functools.partial(_leave, low=low, width=width, dtype=raw.dtype)


def _mean_colour(preprocess: Preprocess) -> Fill:
    """What stands in for pixels from outside the image, in the domain of the transforms: zero for the network."""
    if not preprocess.is_picture:
        return 0.5
    mean = np.asarray(preprocess.mean)
    if preprocess.scale == 255.0:
        mean = np.rint(mean * 255.0)
    # OpenCV takes a value for each of up to four bands, or one for all.
    return tuple(mean.tolist()) if 2 <= len(mean) <= 4 else float(mean.mean())


def make_transforms(listed: Sequence[Mapping[str, Any]], fill_mask: int = 255, fill: Fill = 0.0) -> list[Any]:
    """Make listed transforms, whatever the images; see `Custom`.

    Args:
        listed: Each with `name` and arguments.
        fill_mask: Value of a mask at places from outside the image, unless a transform says otherwise.
        fill: The same for the image, in the domain of the transforms.

    Raises:
        DataError: If a name, an argument or a value is wrong.
    """
    return _make_all("augment.transforms", listed, {"fill_mask": fill_mask, "fill": fill})


def named_leaves(listed: Sequence[Mapping[str, Any]], made: Sequence[Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yield each transform that changes an image, those among which another one chooses included, with its place."""
    for position, (values, transform) in enumerate(zip(listed, made, strict=True)):
        place = f"{where}[{position}]"
        if values["name"] in _CHOICES:
            yield from named_leaves(values["transforms"], transform.transforms, f"{place}.transforms")
        else:
            yield f"{place}: {values['name']}", transform


def moves_places(transform: Any) -> bool:
    """Whether a transform, or one among which it chooses, moves pixels to other places."""
    return isinstance(transform, A.DualTransform) or any(
        moves_places(inner) for inner in getattr(transform, "transforms", ())
    )


def _make_all(where: str, listed: Sequence[Mapping[str, Any]], fills: Mapping[str, Fill]) -> list[Any]:
    """Construct the transforms of a list."""
    made = []
    for position, values in enumerate(listed):
        name = str(values["name"])
        arguments = {key: value for key, value in values.items() if key != "name"}
        place = f"{where}[{position}]"
        if name in _CHOICES:
            inner = arguments.get("transforms")
            named = isinstance(inner, Sequence) and all(
                isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in inner
            )
            if not named or not inner:
                raise DataError(
                    f"{place}: {name}: needs transforms, a list of those to choose from, e.g. {{name: {name}, "
                    "transforms: [{name: Blur}, {name: GaussNoise}], p: 0.5}"
                )
            arguments["transforms"] = _make_all(f"{place}.transforms", inner, fills)
        made.append(_make(f"{place}: {name}", name, arguments, fills))
    return made


def _leave(image: np.ndarray, *, low: np.ndarray, width: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """From 0..1 back to raw units; integers are rounded and stay in their type's range."""
    raw = image.astype(np.float64) * width + low
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        raw = np.clip(np.rint(raw), limits.min, limits.max)
    return raw.astype(dtype)


def known_transforms() -> tuple[str, ...]:
    """Names of the transforms that a recipe may list."""
    found = []
    for name, kind in vars(A).items():
        if inspect.isclass(kind) and issubclass(kind, A.DualTransform | A.ImageOnlyTransform) and name not in _REFUSED:
            abstract = name in ("DualTransform", "ImageOnlyTransform", "Transform3D")
            if not abstract and not issubclass(kind, A.Transform3D):
                found.append(name)
    return tuple(sorted(found))


def _make(where: str, name: str, arguments: dict[str, Any], fills: Mapping[str, Fill]) -> Any:
    """Construct one transform, every name and value checked."""
    if name in _REFUSED:
        raise DataError(f"{where}: {_REFUSED[name]}")
    known = (*known_transforms(), *_CHOICES)
    if name not in known:
        hint = (
            did_you_mean(name, known) or "; albumentations' own names are known, e.g. GaussNoise, Affine, CoarseDropout"
        )
        raise DataError(f"{where}: no such transform{hint}")
    # Whoever says how to reduce an image means albumentations' own way.
    kind = getattr(A, name) if "area_for_downscale" in arguments else SHRINKING.get(name, getattr(A, name))
    allowed = [key for key in inspect.signature(kind.__init__).parameters if key not in _OWN_RULE]
    for key in arguments:
        if key not in allowed:
            hint = did_you_mean(key, allowed)
            raise DataError(f"{where}: unknown argument '{key}'; it takes {', '.join(allowed)}{hint}")
    if name in _ONE_FILL:
        fills = {key: float(np.mean(value)) for key, value in fills.items()}
    arguments = {**{key: value for key, value in fills.items() if key in allowed}, **arguments}
    if name == "Perspective" and isinstance(arguments["fill"], int | float):
        arguments["fill"] = (arguments["fill"],) * 4  # one value would fill the first band and leave the others black
    if "area_for_downscale" in allowed or name in ("CropAndPad", "RandomSizedBBoxSafeCrop"):
        # What is nearest to a pixel's middle: OpenCV's default goes by its corner, up to half a pixel off the image.
        arguments = {**arguments, "mask_interpolation": cv2.INTER_NEAREST_EXACT}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to use other transforms; unknown arguments are refused above
            return kind(**arguments)
    except (ValueError, TypeError, ZeroDivisionError) as error:  # pydantic's error is a ValueError; all p are 0
        raise DataError(f"{where}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What albumentations or pydantic says, in one line."""
    details = getattr(error.__context__, "errors", None)  # albumentations raises its own error from pydantic's
    if callable(details):
        return "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {str(one['msg']).removeprefix('Value error, ')}"
            for one in details()
        )
    return " ".join(str(error).split()) or type(error).__name__


def _check_fit(where: str, transform: Any, name: str, preprocess: Preprocess, target: str) -> None:
    """Refuse a transform that these images or their targets cannot go through, by trying it on a made-up image."""
    bands = preprocess.bands
    if name in RGB_ONLY and not (preprocess.is_picture and len(bands) in (1, 3)):
        what = f"{len(bands)} band(s) ({', '.join(bands)})"
        units = "" if preprocess.is_picture else " of physical values"
        raise DataError(f"{where}: is for colours in red, green and blue, and these images have {what}{units}")
    named = tuple(band.lower() for band in bands)
    if name in RGB_ONLY and len(bands) == 3 and named != _COLOURS and set(named) & set(_COLOURS):
        raise DataError(f"{where}: is for red, green and blue in this order, and the bands are {', '.join(bands)}")
    if "BBox" in name and target != "boxes":
        raise DataError(f"{where}: needs boxes, and the data has none")
    needs = set(transform.targets_as_params) - {"mask", "bboxes"}
    if needs:
        raise DataError(f"{where}: needs other images ({', '.join(sorted(needs))}), which a recipe cannot give")
    given = {"mask": {"mask"}, "boxes": {"bboxes"}}.get(target, set())
    if lacking := set(transform.targets_as_params) - given:
        raise DataError(f"{where}: needs {' and '.join(sorted(lacking))}, and the data has none")
    wanted = {"mask": Targets.MASK, "boxes": Targets.BBOXES}.get(target)
    if isinstance(transform, A.DualTransform) and wanted is not None and wanted not in transform._targets:
        raise DataError(f"{where}: moves pixels, and {target} cannot follow it")
    side = max(64, *preprocess.size)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (side, side, len(bands)), dtype=np.uint8)
    if preprocess.scale != 255.0:  # not 8 bits
        image = (image / np.float32(255)).astype(np.float32)
    data: dict[str, Any] = {"image": image}
    moves = isinstance(transform, A.DualTransform)
    if target == "mask" and moves:
        data["mask"] = np.ones((side, side), np.uint8)
    box = A.BboxParams(format="pascal_voc", label_fields=["position"]) if target == "boxes" and moves else None
    if box is not None:
        data |= {"bboxes": np.array([[8.0, 8.0, 40.0, 40.0]]), "position": np.arange(1)}
    applied, transform.p = transform.p, 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # albumentations warns where it does nothing
            result = A.Compose([transform], bbox_params=box)(**data)["image"]
    except Exception as error:  # whatever it is, training would meet it too
        raise DataError(f"{where}: cannot be used on {len(bands)} band(s): {_reason(error)}") from None
    finally:
        transform.p = applied
    if result.ndim != 3 or result.shape[2] != len(bands) or result.dtype != image.dtype:
        raise DataError(f"{where}: {_REFUSED['Normalize']}")
