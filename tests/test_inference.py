"""Devices, reading in order with failures kept apart, and probabilities."""

import numpy as np
import pytest
import torch
from torch import nn

from r2kit.data.preprocess import Preprocess
from r2kit.errors import DataError, ModelError
from r2kit.inference import (
    ORIENTATIONS,
    Classifier,
    PixelClassifier,
    choose_device,
    load_images,
    orient,
    restore,
)


def read(key):
    if key < 0:
        raise DataError(f"image {key}: broken")
    return np.full((2, 2, 1), key, dtype=np.float32)


def prepare(raw):
    return torch.from_numpy(raw).permute(2, 0, 1), torch.tensor(float(raw.max()))


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 3), (0, 100), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_images_come_in_order_and_failures_by_position(workers, batch_size):
    keys = [5, -1, 7, 8, -2, 9, 10]
    batches = list(load_images(read, keys, prepare, batch_size=batch_size, workers=workers))
    assert [i for b in batches for i in b.index] == [0, 2, 3, 5, 6]
    assert [f for b in batches for f in b.failed] == [(1, "image -1: broken"), (4, "image -2: broken")]
    values = torch.cat([b.tensors[1] for b in batches if b.index])
    assert values.tolist() == [5, 7, 8, 9, 10]
    assert batches[0].tensors[0].shape[1:] == (1, 2, 2)


def test_a_batch_of_failures_has_no_tensors():
    (batch,) = load_images(read, [-1, -2], prepare)
    assert batch.tensors == ()
    assert len(batch.failed) == 2


def test_probabilities_are_the_softmax_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(144, 5)
    ).double()
    image = torch.randn(6, 3, 8, 8)
    classify = Classifier(model, "cpu")
    found = classify(image)
    with torch.no_grad():
        expected = model.eval().float()(image).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(classify(image[2:3])[0], found[2], atol=1e-6)


def test_eight_orientations_are_eight_images_and_each_comes_back():
    images = torch.arange(24.0).view(1, 2, 3, 4)
    seen = {
        orient(images, number).reshape(-1).numpy().tobytes() + bytes(orient(images, number).shape)
        for number in range(8)
    }
    assert len(seen) == ORIENTATIONS
    for number in range(ORIENTATIONS):
        assert torch.equal(restore(orient(images, number), number), images)


def test_averaged_probabilities_do_not_depend_on_how_the_image_lies():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    image = torch.randn(2, 2, 9, 12)
    plain, averaged = Classifier(model, "cpu"), Classifier(model, "cpu", tta=True)
    expected = averaged(image)
    np.testing.assert_allclose(expected.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(expected, np.mean([plain(orient(image, k)) for k in range(8)], axis=0), atol=1e-7)
    for number in range(1, ORIENTATIONS):
        np.testing.assert_allclose(averaged(orient(image, number)), expected, atol=1e-6)
        assert np.abs(plain(orient(image, number)) - plain(image)).max() > 1e-3


@pytest.mark.parametrize(
    ("resize", "shape"), [("tile", (8, 12)), ("squash", (16, 24)), ("pad", (8, 8)), ("crop", (16, 20))]
)
def test_averaged_pixels_come_back_to_their_places(resize, shape):
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 3, padding=1)
    stats = {"bands": ("a", "b"), "mean": (0.0, 0.0), "std": (1.0, 1.0), "scale": 1.0, "classes": ("x", "y", "z")}
    preprocess = Preprocess(**stats, size=(8, 12), resize=resize, interpolation="bilinear")
    image = preprocess.apply(np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32))
    ((found, seen),) = PixelClassifier(model, preprocess, 0.25, "cpu", tta=True)([image], [shape])
    ((plain, _),) = PixelClassifier(model, preprocess, 0.25, "cpu")([image], [shape])
    with torch.no_grad():
        probs = [restore(model(orient(image[None], k)).softmax(1), k) for k in range(ORIENTATIONS)]
    logits, _ = preprocess.unfit(torch.stack(probs).mean(0).log()[0], shape)
    np.testing.assert_allclose(found, logits.softmax(0).numpy(), atol=1e-6)
    assert found.shape == (3, *shape)
    assert np.abs(found - plain)[:, seen].max() > 0.05


def test_a_tiled_image_is_averaged_tile_by_tile():
    model = nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False)  # class 0 is what lies to the left
    model.weight.data = torch.tensor([[[[1.0, 0, 0]]], [[[0.0, 0, 0]]]])
    preprocess = Preprocess(("a",), (0.0,), (1.0,), 1.0, (8, 8), "tile", "bilinear", ("left", "none"))
    image = torch.zeros(1, 20, 12)
    image[0, 10, 6] = 9.0
    ((found, _),) = PixelClassifier(model, preprocess, 0.25, "cpu", tta=True)([image], [(20, 12)])
    lit = np.argwhere(found[0] > 0.55).tolist()
    assert lit == [[9, 6], [10, 5], [10, 7], [11, 6]]  # all four neighbours, whichever way the image lay
    np.testing.assert_allclose(found[0][tuple(np.transpose(lit))], 0.25 / (1 + np.exp(-9)) + 0.75 / 2, atol=1e-4)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="'gpu' is no device; use auto, cpu"):
        choose_device("gpu")
    with pytest.raises(ModelError, match="this machine has none"):
        choose_device("cuda:99")
