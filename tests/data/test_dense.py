"""What is done to an image is done to its mask: augmentation, windows, resizing, batches, and the way back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from r2kit.data.datamodule import DataModule
from r2kit.data.dense import cut_window, known_mask
from r2kit.data.preprocess import Preprocess
from r2kit.data.targets import IGNORE
from r2kit.errors import DataError
from r2kit.recipe import AugmentSpec, DataSpec


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Sixteen pictures whose red says the class of a pixel: 200 in a box, else 50."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for i in range(16):
        mask = np.zeros((40, 48), dtype=np.uint8)
        top, left = rng.integers(0, 30, 2)
        mask[top : top + 14, left : left + 20] = 1
        image = np.stack([50 + 150 * mask, rng.integers(0, 255, mask.shape), np.full(mask.shape, i * 9)], axis=2)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(mask * 255).save(root / "masks" / f"{i:02d}.png")
    return root


def module(root: Path, preset="overhead", batch_size=4, **spec) -> DataModule:
    spec = {"root": str(root), "image_size": 32, "workers": 0, "masks": {"threshold": 127.0}, **spec}
    data = DataModule(
        DataSpec.model_validate(spec), AugmentSpec(preset=preset), seed=1, batch_size=batch_size, target="mask"
    )
    data.setup()
    return data


def red(data: DataModule, batch) -> torch.Tensor:
    return batch["image"][:, 0] * data.preprocess.std[0] * 255 + data.preprocess.mean[0] * 255


@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "tile"])
@pytest.mark.parametrize("preset", ["overhead", "natural"])
def test_masks_follow_their_images(pairs, preset, resize):
    data = module(pairs, preset, resize=resize)
    seen = 0
    for batch in data.train_dataloader():
        assert batch["image"].shape == (4, 3, 32, 32)
        assert batch["mask"].shape == (4, 32, 32)
        assert batch["mask"].dtype == torch.int64
        mask, light = batch["mask"], red(data, batch)
        for i in range(4):
            inside, outside = light[i][mask[i] == 1], light[i][mask[i] == 0]
            if len(inside) > 40:
                # The light of an image changes, and a resized border mixes: the middle of each class is far apart.
                assert inside.median() > outside.median() + 80
                close = (light[i] - outside.median()).abs() < (light[i] - inside.median()).abs()
                known = mask[i] != IGNORE
                assert (close == (mask[i] == 0))[known].float().mean() > 0.93
                seen += 1
    assert seen > 4


def test_the_same_key_gives_the_same_pair(pairs):
    first = list(module(pairs, resize="tile").train_dataloader())
    again = list(module(pairs, resize="tile").train_dataloader())
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["mask"], b["mask"])
    assert not torch.equal(first[0]["mask"], first[1]["mask"])


def test_whole_images_are_evaluated_without_resizing_and_filled_up(pairs, tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for file in sorted((pairs / folder).glob("*.png"))[:6]:
            picture = Image.open(file)
            height = 40 - 4 * int(file.stem)
            picture.crop((0, 0, 48 - int(file.stem), height)).save(tmp_path / folder / file.name)
    data = module(tmp_path, resize="tile", batch_size=8, val_fraction=0.4, test_fraction=0.0)
    batch = next(iter(data.val_dataloader()))
    shapes = [data.source.read(int(row)).shape[:2] for row in batch["index"]]
    assert batch["image"].shape[2:] == (max(h for h, _ in shapes), max(w for _, w in shapes))
    for (height, width), row, mask, image in zip(shapes, batch["index"], batch["mask"], batch["image"], strict=True):
        assert torch.equal(mask[:height, :width], torch.from_numpy(data.source.read_target(int(row)).mask).long())
        assert (mask[height:] == IGNORE).all()
        assert (mask[:, width:] == IGNORE).all()
        assert (image[:, height:] == 0).all()
    # As many pixels at once as a batch of tiles has, at least one image.
    assert data.val_dataloader().batch_size == max(1, 8 * 32 * 32 // (40 * 48))


def test_counts_are_of_images_and_shares_of_pixels(pairs):
    data = module(pairs)
    assert data.counts().index.tolist() == ["image"]
    assert data.counts().sum(axis=1).tolist() == [16]
    shares = data.pixel_shares()
    assert shares.index.tolist() == ["background", "object"]
    rows = data.split.train
    objects = sum(int((data.source.read_target(int(row)).mask == 1).sum()) for row in rows)
    assert shares["train"]["object"] == pytest.approx(objects / (len(rows) * 40 * 48))


def preprocess(resize, size=(8, 8)) -> Preprocess:
    return Preprocess(
        bands=("b",), mean=(0.0,), std=(1.0,), scale=1.0, size=size, resize=resize, interpolation="bilinear",
        classes=("a", "b"), nodata=None,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 8), (20, 12), (6, 30), (5, 4)])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "tile"])
def test_what_goes_in_comes_back_in_the_image_s_own_pixels(resize, shape):
    prep = preprocess(resize)
    rows, columns = np.meshgrid(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]), indexing="ij")
    raw = (rows + 2 * columns).astype(np.float32)[..., None]
    fitted = prep.fit(raw)
    assert prep.fit_mask(np.zeros(shape, np.uint8)).shape == fitted.shape[1:]
    back, seen = prep.unfit(fitted, shape)
    assert back.shape == (1, *shape)
    assert seen.shape == shape
    assert seen.all() == (resize != "crop" or shape[0] == shape[1])
    # A plane survives resizing there and back, but for half a coarse pixel at the border.
    coarse = max(1.0, *(n / 8 for n in shape)) if resize != "tile" else 0.0
    step = coarse * (1 / (shape[0] - 1) + 2 / (shape[1] - 1))
    assert (back[0] - torch.from_numpy(raw[..., 0]))[seen].abs().max() <= step + 1e-5
    assert (back[0][~seen] == 0).all()


@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "tile"])
def test_a_resized_mask_has_no_values_of_its_own(resize):
    mask = np.zeros((30, 20), dtype=np.uint8)
    mask[10:, 5:] = 7
    fitted = preprocess(resize).fit_mask(mask)
    assert set(fitted.unique().tolist()) <= {0, 7, IGNORE}
    assert (fitted == IGNORE).any() == (resize == "pad")


def test_pixels_without_measurement_have_no_class():
    raw = np.ones((2, 3, 2), dtype=np.float32)
    raw[0, 0] = -9
    raw[1, 1, 0] = -9  # one band is measured
    mask = np.array([[0, 1, 0], [1, 1, IGNORE]], dtype=np.uint8)
    assert known_mask(mask, raw, -9.0).tolist() == [[IGNORE, 1, 0], [1, 1, IGNORE]]
    assert known_mask(mask, raw, None, np.array([1, 0])).tolist() == [[1, 0, 1], [0, 0, IGNORE]]


def test_an_image_smaller_than_the_window_is_filled_up():
    raw, mask = np.full((3, 9, 1), 5, np.uint8), np.ones((3, 9), np.uint8)
    image, around = cut_window(raw, mask, (6, 4), np.array([0.5, 0.999]), preprocess("tile"))
    assert image.shape == (6, 4, 1)
    assert (around != IGNORE).sum() == 3 * 4
    assert (image[..., 0] == 5).sum() == 12
    assert np.array_equal(image[..., 0] == 5, around == 1)


def test_a_run_finds_its_classes_in_other_data(pairs, tmp_path):
    data = module(pairs)
    spec = DataSpec.model_validate(
        {"root": str(pairs), "workers": 0, "masks": {"classes": {"object": 255, "background": 0}}}
    )

    def other(spec):
        found = DataModule(
            spec, AugmentSpec(), seed=0, batch_size=4, preprocess=data.preprocess, all_test=True, target="mask"
        )
        found.setup()
        return found

    batch = next(iter(other(spec).test_dataloader()))
    same = next(iter(other(module(pairs).spec).test_dataloader()))
    assert torch.equal(batch["mask"], same["mask"])
    with pytest.raises(DataError, match="class 'cloud' is unknown to the run"):
        other(spec.model_copy(update={"masks": spec.masks.model_copy(update={"classes": {"cloud": 0, "object": 255}})}))
