"""Listed albumentations transforms: what is refused, in which domain they work, and that places follow."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from r2kit.data.custom import RGB_ONLY, A, Custom, known_transforms, make_transforms
from r2kit.data.preprocess import Preprocess
from r2kit.data.transforms import Augment
from r2kit.errors import DataError, RecipeError
from r2kit.recipe import AugmentSpec
from r2kit.recipe_file import load_recipe

RGB = ("red", "green", "blue")
NEEDED: dict[str, dict[str, Any]] = {  # arguments without which a transform cannot be made
    "CenterCrop": {"height": 32, "width": 32},
    "RandomCrop": {"height": 32, "width": 32},
    "AtLeastOneBBoxRandomCrop": {"height": 32, "width": 32},
    "CropNonEmptyMaskIfExists": {"height": 32, "width": 32},
    "RandomSizedBBoxSafeCrop": {"height": 32, "width": 32},
    "Crop": {"x_max": 20, "y_max": 20},
    "CropAndPad": {"px": 4},
    "GridElasticDeform": {"num_grid_xy": [4, 4], "magnitude": 5},
    "LongestMaxSize": {"max_size": 32},
    "SmallestMaxSize": {"max_size": 32},
    "RandomResizedCrop": {"size": [32, 32]},
    "RandomSizedCrop": {"min_max_height": [16, 32], "size": [32, 32]},
    "Resize": {"height": 32, "width": 32},
}


def prep(bands: int = 3, scale: float = 255.0, mean: float | None = None, nodata: float | None = None) -> Preprocess:
    names = RGB if bands == 3 else tuple(f"b{i}" for i in range(bands))
    mean = (0.5 if scale != 1.0 else 2000.0) if mean is None else mean
    std = 0.25 if scale != 1.0 else 500.0
    return Preprocess(
        names, (mean,) * bands, (std,) * bands, scale, (64, 64), "squash", "bilinear", ("a", "b"), nodata=nodata
    )


def augment(*listed: dict[str, Any], preprocess: Preprocess | None = None, target: str = "class") -> Augment:
    return Augment.of(AugmentSpec(preset="none", transforms=listed), preprocess or prep(), target)


def noise(bands: int = 3, dtype=np.uint8, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (64, 64, bands)).astype(dtype)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"name": "GausNoise"}, r"augment.transforms\[0\]: GausNoise: no such transform; did you mean 'GaussNoise'\?"),
        ({"name": "Zzz"}, "Zzz: no such transform; albumentations' own names are known, e.g. GaussNoise"),
        (
            {"name": "GaussNoise", "var_limit": [1, 2]},
            r"GaussNoise: unknown argument 'var_limit'; it takes std_range, mean_range, .*, p$",
        ),
        ({"name": "GaussNoise", "std_rang": [0, 1]}, "unknown argument 'std_rang'; .*; did you mean 'std_range'"),
        ({"name": "CoarseDropout", "max_holes": 3}, "unknown argument 'max_holes'"),
        ({"name": "GaussNoise", "std_range": [3, 1]}, r"GaussNoise: std_range: All values in \(3.0, 1.0\) must be"),
        ({"name": "RandomCrop"}, "RandomCrop: height: Field required; width: Field required"),
        ({"name": "Rotate", "mask_interpolation": 1}, "unknown argument 'mask_interpolation'"),
        ({"name": "Normalize"}, "Normalize: changes what a pixel is, and the run's own preprocessing does that"),
        ({"name": "ToTensorV2"}, "ToTensorV2: changes what a pixel is"),
        ({"name": "Lambda"}, "Lambda: needs Python code"),
        ({"name": "Compose"}, "Compose: is a list of transforms; .* or choose among them with OneOf or SomeOf"),
        ({"name": "OneOf"}, r"OneOf: needs transforms, a list of those to choose from, e.g. \{name: OneOf, transforms"),
        ({"name": "OneOf", "transforms": []}, "OneOf: needs transforms"),
        ({"name": "SomeOf", "transforms": [{"p": 1}]}, "SomeOf: needs transforms"),
        ({"name": "SomeOf", "transforms": [{"name": "Blur"}], "m": 1}, "SomeOf: unknown argument 'm'; it takes "),
        ({"name": "OneOf", "transforms": [{"name": "Blur", "p": 0}]}, "OneOf: float division by zero|OneOf: "),
        (
            {"name": "OneOf", "transforms": [{"name": "Blur"}, {"name": "SomeOf", "transforms": [{"name": "FDA"}]}]},
            r"augment.transforms\[0\].transforms\[1\].transforms\[0\]: FDA: needs other images",
        ),
        ({"name": "Pad3D"}, "Pad3D: no such transform"),
        ({"name": "FDA"}, r"FDA: needs other images \(fda_metadata\), which a recipe cannot give"),
        ({"name": "MaskDropout"}, "MaskDropout: needs mask, and the data has none"),
        ({"name": "Crop", "x_max": 900, "y_max": 900}, r"Crop: cannot be used on 3 band\(s\): "),
    ],
)
def test_what_is_refused(listed, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        augment(listed)
    assert "\n" not in str(caught.value)


def test_a_choice_takes_one_of_its_transforms_and_masks_follow() -> None:
    turns = [{"name": "HorizontalFlip"}, {"name": "VerticalFlip"}, {"name": "Transpose"}]
    one = augment({"name": "OneOf", "transforms": turns, "p": 1.0}, target="mask")
    raw = noise()
    wanted = [raw[:, ::-1], raw[::-1], raw.transpose(1, 0, 2)]
    seen = set()
    for row in range(30):
        found = one.with_targets(raw, (0, 0, row), mask=raw[..., 0])
        (which,) = [i for i, image in enumerate(wanted) if np.array_equal(image, found.image)]
        np.testing.assert_array_equal(found.mask, found.image[..., 0])
        np.testing.assert_array_equal(one(raw, (0, 0, row)), found.image)
        seen.add(which)
    assert seen == {0, 1, 2}
    certain = [{**turn, "p": 1.0} for turn in turns[:2]]
    both = augment({"name": "SomeOf", "transforms": certain, "n": 2})
    np.testing.assert_array_equal(both(raw, (0, 0, 0)), raw[::-1, ::-1])


def test_the_place_in_the_list_is_named() -> None:
    with pytest.raises(DataError, match=r"augment.transforms\[1\]: Blurr: no such transform; did you mean 'Blur'"):
        augment({"name": "Blur"}, {"name": "Blurr"})


def test_the_recipe_wants_a_name() -> None:
    with pytest.raises(RecipeError, match=r"augment.transforms: entry 0 has no name; one is written \{name: Gauss"):
        load_recipe({"augment": {"transforms": [{"p": 1.0}]}})
    with pytest.raises(RecipeError, match=r"augment.transforms: got .* allowed is a list"):
        load_recipe({"augment": {"transforms": "Blur"}})
    recipe = load_recipe({}, ["augment.transforms=[{name: GaussNoise, std_range: [0.01, 0.05], p: 0.3}]"])
    assert make_transforms(recipe.augment.transforms)[0].std_range == (0.01, 0.05)


@pytest.mark.parametrize("name", sorted(RGB_ONLY))
def test_colour_transforms_want_colours(name: str) -> None:
    for preprocess, what in ((prep(13), r"13 band\(s\)"), (prep(3, scale=1.0), "of physical values")):
        with pytest.raises(DataError, match=f"{name}: is for colours in red, green and blue, and these .* {what}"):
            augment({"name": name}, preprocess=preprocess)


@pytest.mark.parametrize("bands", [("nir", "red", "green"), ("Blue", "Green", "Red")])
def test_colour_transforms_want_colours_in_their_order(bands: tuple[str, ...]) -> None:
    # Their hues, greys and tints would be those of other bands.
    three = replace(prep(), bands=bands)
    with pytest.raises(DataError, match=f"ToGray: is for red, green and blue in this order, .* are {', '.join(bands)}"):
        augment({"name": "ToGray"}, preprocess=three)
    augment({"name": "ToGray"}, preprocess=replace(prep(), bands=("band1", "band2", "band3")))  # may be colours
    augment({"name": "GaussNoise"}, preprocess=three)


def test_every_transform_is_either_right_on_any_bands_or_refused() -> None:
    # The list of colour transforms is albumentations' own: those that fail on 13 bands.
    usable, refused = 0, {}
    for name in known_transforms():
        listed = {"name": name, "p": 1.0, **NEEDED.get(name, {})}
        if name in RGB_ONLY:
            with pytest.raises((ValueError, TypeError)):
                getattr(A, name)(p=1.0)(image=noise(13))
            augment(listed)
            continue
        for preprocess, raw in ((prep(), noise()), (prep(13, scale=1.0), noise(13, np.uint16, 4000))):
            try:
                made = augment(listed, preprocess=preprocess)
            except DataError as error:
                refused[name] = str(error)
                continue
            result = made(raw, (0, 0, 0))
            assert result.dtype == raw.dtype, name
            assert result.shape[2] == raw.shape[2], name
            usable += 1
    assert usable > 120
    for name, message in refused.items():
        reasons = (
            "which a recipe cannot give",
            "the data has none",
            "needs boxes",
            "Neither valid mask nor",
            "Can not find mask",
            "supported for RGB",
        )
        assert any(reason in message for reason in reasons), (name, message)


# The domain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preprocess", "raw"),
    [
        (prep(13, scale=65535.0), noise(13, np.uint16, 65536)),
        (prep(13, scale=1.0), noise(13, np.int16, 9000) - np.int16(500)),
        (prep(2, scale=1.0), noise(2, np.float32, 9000)),
        (prep(4), noise(4)),
    ],
)
def test_the_domain_changes_nothing_by_itself(preprocess: Preprocess, raw: np.ndarray) -> None:
    custom = Custom(({"name": "NoOp"},), preprocess)
    image, back = custom.enter(raw)
    assert image.dtype == (np.uint8 if raw.dtype == np.uint8 else np.float32)
    assert image.max() <= (255 if raw.dtype == np.uint8 else 1.0)
    np.testing.assert_allclose(back(image), raw, atol=1e-3 if raw.dtype == np.float32 else 0)
    assert back(image).dtype == raw.dtype


def test_brightness_of_reflectance_goes_by_the_range_of_each_band() -> None:
    # albumentations alone takes float32 for 0..1 and returns 0..1 for reflectance x 10000.
    preprocess = prep(2, scale=1.0)  # mean 2000, deviation 500: the range is 0..4000
    raw = np.full((64, 64, 2), (1000.0, 3000.0), dtype=np.float32)
    listed = {"name": "RandomBrightnessContrast", "brightness_limit": [0.1, 0.1], "contrast_limit": [0, 0], "p": 1.0}
    np.testing.assert_allclose(augment(listed, preprocess=preprocess)(raw, (0, 0, 0)), raw + 400.0, rtol=1e-4)
    alone = A.RandomBrightnessContrast(brightness_limit=(0.1, 0.1), contrast_limit=(0, 0), p=1.0)(image=raw)["image"]
    assert alone.max() <= 1.0
    bright = raw.copy()
    bright[0, 0] = 9000.0  # beyond the range: the range widens, nothing is clipped
    assert augment({"name": "NoOp"}, preprocess=preprocess)(bright, (0, 0, 0)).max() == pytest.approx(9000.0, rel=1e-5)


def test_noise_is_of_the_range_of_each_band() -> None:
    stats = Preprocess(("a", "b"), (10.0, 5000.0), (1.0, 1000.0), 1.0, (64, 64), "squash", "bilinear", ("a", "b"))
    raw = np.full((64, 64, 2), (10.0, 5000.0))
    listed = {"name": "GaussNoise", "std_range": [0.05, 0.05], "p": 1.0}
    changed = augment(listed, preprocess=stats)(raw, (0, 0, 0)) - raw
    np.testing.assert_allclose(changed.std(axis=(0, 1)), (0.05 * 8, 0.05 * 8000), rtol=0.1)


def test_missing_pixels_do_not_blend_into_their_neighbours() -> None:
    preprocess = prep(2, scale=1.0, nodata=-9999.0)
    raw = np.full((64, 64, 2), 2000.0, dtype=np.float32)
    raw[:20, :, 0] = -9999.0
    raw[40, 40, 1] = np.nan
    result = augment({"name": "GaussianBlur", "p": 1.0}, preprocess=preprocess)(raw, (0, 0, 0))
    np.testing.assert_allclose(result, 2000.0, rtol=1e-5)


def test_eight_bits_of_which_some_are_missing_are_eight_bits() -> None:
    raw = noise().astype(np.float32)
    raw[:20] = np.nan
    known = raw.copy()
    known[:20] = 128  # the mean
    listed = ({"name": "Rotate", "limit": [30, 30], "p": 1.0}, {"name": "GaussNoise", "p": 1.0})
    expected = augment(*listed)(known.astype(np.uint8), (0, 0, 0))
    np.testing.assert_array_equal(augment(*listed)(raw, (0, 0, 0)), expected)


def test_eight_bits_are_what_albumentations_makes_of_them() -> None:
    raw = noise()
    made = augment({"name": "Posterize", "num_bits": [3, 3], "p": 1.0})
    np.testing.assert_array_equal(made(raw, (0, 0, 0)), A.Posterize(num_bits=(3, 3), p=1.0)(image=raw)["image"])


# Draws and places ----------------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_the_key_and_come_after_the_preset() -> None:
    raw = noise()
    spec = AugmentSpec(preset="overhead", transforms=({"name": "GaussNoise", "p": 1.0},))
    one, two = Augment.of(spec, prep()), Augment.of(spec, prep())
    first = one(raw, (3, 0, 1))
    two(raw, (3, 0, 2))
    np.testing.assert_array_equal(two(raw, (3, 0, 1)), first)
    assert not np.array_equal(one(raw, (3, 1, 1)), first)
    plain = Augment("overhead")(raw, (3, 0, 1))
    assert plain.shape == first.shape
    assert 0 < np.abs(plain.astype(float) - first).mean() < 120
    assert Augment.of(AugmentSpec(preset="none"), prep())(raw, (3, 0, 1)) is raw


@pytest.mark.parametrize(
    "listed",
    [
        {"name": "Affine", "rotate": [90, 90], "p": 1.0},
        {"name": "HorizontalFlip", "p": 1.0},
        {"name": "RandomCrop", "height": 50, "width": 40, "p": 1.0},
        {"name": "Pad", "padding": 7, "fill": 0, "p": 1.0},
    ],
)
def test_masks_and_boxes_follow_listed_transforms(listed) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:30, 25:37] = 1
    raw = np.repeat(mask[..., None], 3, axis=2) * 200
    made = augment(listed, {"name": "GaussNoise", "std_range": [0.01, 0.01]}, target="boxes")
    got = made.with_targets(raw, (0, 0, 0), mask=mask, boxes=np.array([[25.0, 20.0, 37.0, 30.0]]))
    np.testing.assert_array_equal(got.image[..., 0] > 100, got.mask == 1)
    rows, columns = np.nonzero(got.mask == 1)
    np.testing.assert_allclose(got.boxes[0], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1.0)
    assert set(np.unique(got.mask)) <= {0, 1, 255}
    if listed["name"] == "Pad":
        assert (got.mask[:7] == 255).all()  # from outside the image: of no class


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 13])
@pytest.mark.parametrize(
    "listed",
    [
        {"name": "Affine", "scale": [0.5, 0.5]},
        {"name": "CropAndPad", "px": 9},
        {"name": "Pad", "padding": 9},
        {"name": "Perspective", "scale": [0.2, 0.2], "fit_output": True},
        {"name": "Rotate", "limit": [30, 30]},
        {"name": "CoarseDropout"},
        {"name": "OneOf", "transforms": [{"name": "SafeRotate", "limit": [30, 30], "p": 1.0}]},
    ],
)
@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 255.0), (np.uint16, 65535.0), (np.float32, 1.0)])
def test_what_comes_from_outside_the_image_is_nothing_to_the_network(listed, bands: int, dtype, scale: float) -> None:
    # albumentations' own value is black: -2.25 for a colour of 0.45, and with physical values the far end of the range.
    names = RGB if bands == 3 else tuple(f"b{i}" for i in range(bands))
    one = bands > 4 or listed["name"] == "CropAndPad"  # takes one value for all bands
    means = np.linspace(0.4, 0.5, bands) if not one or scale == 1.0 else np.full(bands, 0.45)
    means, std = (means, 0.2) if scale != 1.0 else (means * 5000.0, 500.0)
    stats = (tuple(means.tolist()), (std,) * bands)
    preprocess = Preprocess(names, *stats, scale, (64, 64), "squash", "bilinear", ("a", "b"))
    bright = (means + 2 * std) * scale if scale != 1.0 else means + 14 * std  # far beyond the usual
    raw = np.ones((64, 64, bands)) * bright
    shown = augment({**listed, "p": 1.0}, preprocess=preprocess)(raw.astype(dtype), (0, 0, 0))
    seen = preprocess.normalize(torch.from_numpy(shown.astype(np.float32)).permute(2, 0, 1)[None])
    assert seen.amin(dim=(0, 2, 3)).abs().max() < 0.02
    assert seen.amax() > 1.9


@pytest.mark.parametrize(
    "listed",
    [
        {"name": "Affine", "scale": [0.5, 0.5], "p": 1.0},
        {"name": "Pad", "padding": 9, "p": 1.0},
        {"name": "Rotate", "limit": [30, 30], "p": 1.0},
        {"name": "CoarseDropout", "num_holes_range": [3, 3], "p": 1.0},
    ],
)
def test_no_object_reaches_outside_the_image_or_into_a_hole(listed) -> None:
    outline = np.zeros((1, 64, 64), bool)
    outline[0, 20:44, 20:44] = True
    raw = np.full((64, 64, 3), 40, np.uint8)
    raw[outline[0]] = 220
    got = augment({**listed, "fill": 0}, target="boxes").with_targets(
        raw, (0, 0, 0), boxes=np.array([[20.0, 20.0, 44.0, 44.0]]), masks=outline
    )
    assert got.masks.dtype == bool
    assert got.masks.sum() > 0
    wrong = got.masks[0] != (got.image[..., 0] > 130)
    assert wrong.mean() < 0.01  # the half pixel at the rim


def test_a_turned_box_ends_where_its_object_ends() -> None:
    y, x = np.mgrid[:64, :64]
    disc = (x - 32) ** 2 + (y - 32) ** 2 < 15**2
    made = augment({"name": "Rotate", "limit": [45, 45], "p": 1.0}, target="boxes")
    box = np.array([[17.0, 17.0, 48.0, 48.0]])
    got = made.with_targets(noise(), (0, 0, 0), boxes=box, masks=disc[None])
    np.testing.assert_allclose(got.boxes, box, atol=1.5)  # a disc is as wide as before
    alone = made.with_targets(noise(), (0, 0, 0), boxes=box)
    assert np.ptp(alone.boxes[0, ::2]) > 1.3 * 31  # nobody knows more than the corners


def test_noise_alone_leaves_boxes_where_they_are() -> None:
    made = augment({"name": "GaussNoise", "p": 1.0}, target="boxes")
    boxes = np.array([[1.0, 2.0, 30.0, 40.0]], dtype=np.float32)
    got = made.with_targets(noise(), (0, 0, 0), boxes=boxes)
    np.testing.assert_array_equal(got.boxes, boxes)
    assert got.kept.tolist() == [0]


@pytest.mark.parametrize("bands", [3, 13])
@pytest.mark.parametrize("name", ["RandomResizedCrop", "Resize", "SmallestMaxSize"])
def test_images_are_reduced_without_false_texture(name: str, bands: int) -> None:
    fine = np.zeros((96, 96, bands), np.uint8 if bands == 3 else np.uint16)
    fine[::3] = 200  # lines of which a reduction to a third takes all or none, unless it takes means
    listed = {"name": name, **NEEDED[name], **({"scale": [1.0, 1.0], "ratio": [1.0, 1.0]} if "Crop" in name else {})}
    preprocess = prep(bands, 255.0 if bands == 3 else 1.0)
    reduced = Augment.of(AugmentSpec(preset="none", transforms=(listed,)), preprocess)(fine, (0, 0, 0))
    assert reduced.shape == (32, 32, bands)
    assert np.abs(reduced[1:-1].astype(float) - 200 / 3).max() <= 1.0
    # To the pixel what validation makes of it, borders included.
    seen = replace(preprocess, size=(32, 32)).fit(fine).permute(1, 2, 0).numpy()
    assert np.abs(reduced.astype(float) - seen).max() <= (0.0 if bands == 3 else 0.51)
    means = {**listed, "area_for_downscale": "image"}
    by_area = Augment.of(AugmentSpec(preset="none", transforms=(means,)), preprocess)(fine, (0, 0, 0))
    assert np.abs(by_area.astype(float) - 200 / 3).max() <= 1.0
    plain = {**listed, "area_for_downscale": None}  # a recipe may still ask for it
    aliased = Augment.of(AugmentSpec(preset="none", transforms=(plain,)), preprocess)(fine, (0, 0, 0))
    assert np.abs(aliased.astype(float) - 200 / 3).max() > 50.0
