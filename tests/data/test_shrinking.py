"""Listed transforms that show an image smaller: no false texture, and masks and outlines stay on their images."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch

from r2kit.data.preprocess import Preprocess
from r2kit.data.transforms import Augment
from r2kit.recipe import AugmentSpec


def augment(*listed: dict[str, Any], bands: int = 3, target: str = "class") -> Augment:
    names, scale = tuple(f"b{i}" for i in range(bands)), 255.0 if bands == 3 else 1.0
    mean, std = (0.5, 0.25) if bands == 3 else (2000.0, 500.0)
    preprocess = Preprocess(
        names, (mean,) * bands, (std,) * bands, scale, (64, 64), "squash", "bilinear", ("a", "b"), None
    )
    return Augment.of(AugmentSpec(preset="none", transforms=listed), preprocess, target)


SMALLER = [
    ({"name": "Affine", "scale": [0.4, 0.4]}, 0.4),
    ({"name": "Affine", "scale": [0.4, 0.4], "rotate": [30, 30]}, 0.4),
    ({"name": "ShiftScaleRotate", "shift_limit": 0, "scale_limit": [-0.6, -0.6], "rotate_limit": 0}, 0.4),
    ({"name": "CropAndPad", "px": 192, "keep_size": True}, 0.4),
    ({"name": "RandomSizedBBoxSafeCrop", "height": 102, "width": 102}, 0.4),
]


@pytest.mark.parametrize(("listed", "scale"), SMALLER)
@pytest.mark.parametrize("bands", [3, 13])
def test_the_texture_left_is_that_of_an_antialiased_reduction(listed: dict, scale: float, bands: int) -> None:
    low, high = (0, 255) if bands == 3 else (500, 3500)
    raw = np.random.default_rng(0).choice([low, high], (256, 256, 1)).repeat(bands, 2)
    raw = raw.astype(np.uint8 if bands == 3 else np.int16)
    made = augment({**listed, "p": 1.0}, bands=bands, target="boxes")
    whole = np.array([[0.0, 0.0, 256.0, 256.0]])  # a box that the safe crop must not cut
    small = made.with_targets(raw, (0, 0, 0), boxes=whole).image
    side = round(256 * scale)
    top = (small.shape[0] - side // 2) // 2
    shown = small[top : top + side // 2, top : top + side // 2, 0].astype(float)
    given = torch.from_numpy(raw[..., 0].astype(np.float32))[None, None]
    ideal = torch.nn.functional.interpolate(given, (side, side), mode="bilinear", antialias=True)[0, 0].numpy()
    # Read at single points, the checks would keep 0.5 to 0.7 of their contrast instead of a quarter.
    assert shown.std() == pytest.approx(ideal.std(), rel=0.2)
    assert shown.mean() == pytest.approx(ideal.mean(), rel=0.02)


@pytest.mark.parametrize(
    "listed",
    [
        {"name": "Affine", "scale": [1.5, 1.5]},
        {"name": "Affine", "rotate": [45, 45]},
        {"name": "Affine", "scale": [0.5, 0.5], "interpolation": cv2.INTER_NEAREST},
        {"name": "CropAndPad", "px": -20},
    ],
)
def test_what_keeps_its_size_or_takes_single_pixels_is_what_albumentations_makes(listed: dict) -> None:
    from r2kit.data.custom import A

    raw = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    arguments = {key: value for key, value in listed.items() if key != "name"}
    plain = A.Compose([getattr(A, listed["name"])(**arguments, fill=99, p=1.0)])(image=raw)["image"]
    np.testing.assert_array_equal(augment({**listed, "fill": 99, "p": 1.0})(raw, (0, 0, 0)), plain)


@pytest.mark.parametrize(
    "listed",
    [
        {"name": "Resize", "height": 64, "width": 64},
        {"name": "Resize", "height": 300, "width": 300},
        {"name": "RandomScale", "scale_limit": [-0.75, -0.75]},
        {"name": "RandomResizedCrop", "size": [64, 64], "scale": [1.0, 1.0], "ratio": [1.0, 1.0]},
        {"name": "RandomSizedCrop", "min_max_height": [256, 256], "size": [50, 50]},
        {"name": "SmallestMaxSize", "max_size": 50},
        {"name": "LongestMaxSize", "max_size": 50},
        {"name": "CropAndPad", "px": 60},
        {"name": "RandomSizedBBoxSafeCrop", "height": 64, "width": 64},
    ],
)
def test_masks_lie_on_their_resized_images(listed: dict) -> None:
    y, x = np.mgrid[:256, :256] + 0.5
    mask = ((x - 130) ** 2 + (y - 120) ** 2 < 70**2).astype(np.uint8)
    raw = (255 * mask[..., None]).repeat(3, 2)
    made = augment({**listed, "p": 1.0, **({"fill": 0} if "px" in listed else {})}, target="boxes")
    box = np.array([[0.0, 0.0, 256.0, 256.0]])
    got = made.with_targets(raw, (0, 0, 0), mask=mask, boxes=box, masks=mask[None].astype(bool))
    assert got.mask is not None
    assert got.masks is not None
    assert set(np.unique(got.mask)) <= {0, 1, 255}

    def middle(shown: np.ndarray) -> np.ndarray:
        return np.array([(shown * axis).sum() / shown.sum() for axis in np.indices(shown.shape)])

    image = middle(got.image[..., 0].astype(float))
    # By the corners of pixels instead of their middles, masks lie up to half a pixel off.
    np.testing.assert_allclose(middle((got.mask == 1).astype(float)), image, atol=0.2)
    np.testing.assert_allclose(middle(got.masks[0].astype(float)), image, atol=0.2)
