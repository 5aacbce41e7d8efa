"""Grad-CAM against the formula written out, and what it leaves behind."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from r2kit import errors
from r2kit.explain import available, gradcam, target_layer

pytest.importorskip("captum", reason="captum (extra explain) is not installed")


class Small(nn.Module):
    """Convolution, pooling, classifier: small enough to write Grad-CAM out by hand."""

    def __init__(self, depth=4, bands=5, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(bands, depth, 3, stride=2, padding=1), nn.BatchNorm2d(depth), nn.ReLU())
        self.head = nn.Linear(depth, classes)
        self.feature_info = [{"module": "body", "num_chs": depth, "reduction": 2}]

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


def test_maps_are_the_formula(model):
    image, target = torch.randn(3, 5, 16, 16), torch.tensor([0, 2, 1])
    found = gradcam(model, image, target)
    model.eval()
    with torch.no_grad():
        maps = model.body(image)
        # The classifier is linear in the pooled maps: the gradient of a logit is its weight over the number of pixels.
        weight = model.head.weight[target] / maps[0, 0].numel()
        cam = (weight[:, :, None, None] * maps).sum(1, keepdim=True).relu()
        cam = nn.functional.interpolate(cam, (16, 16), mode="bilinear")[:, 0]
        expected = cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-20)
    assert found.shape == (3, 16, 16)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_bright_spot_is_found():
    model = Small(depth=1, bands=1, classes=2)
    with torch.no_grad():
        model.body[0].weight.fill_(1 / 9)
        model.body[0].bias.zero_()
        model.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    image = torch.zeros(1, 1, 32, 32)
    image[..., 4:10, 20:26] = 1.0
    row, column = np.unravel_index(gradcam(model, image, torch.tensor([0]))[0].argmax(), (32, 32))
    assert 3 <= row <= 10
    assert 19 <= column <= 26
    assert gradcam(model, image, torch.tensor([1])).max() == 0.0  # it speaks against the other class


def test_model_and_image_are_left_as_they_were(model):
    model.train()
    model.head.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    image = torch.randn(2, 5, 8, 8)
    with torch.inference_mode(False), torch.no_grad():
        gradcam(model, image, torch.tensor([0, 1]))
    assert model.training
    assert model.body[1].training
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False, True]
    assert all(p.grad is None for p in model.parameters())
    assert not image.requires_grad
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key])


def test_a_real_backbone_gives_maps_of_the_image_size():
    model = timm.create_model("resnet18", num_classes=4)  # in-place ReLU right behind the layer
    assert target_layer(model, (224, 224)) is model.layer4
    assert target_layer(model, (64, 64)) is model.layer3
    assert target_layer(model, (32, 32)) is model.layer2
    found = gradcam(model, torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
    assert found.shape == (2, 64, 64)
    assert found.min() >= 0.0
    assert found.max() == pytest.approx(1.0)


def test_an_image_does_not_depend_on_its_batch(model):
    image, target = torch.randn(4, 5, 16, 16), torch.tensor([0, 1, 2, 0])
    np.testing.assert_allclose(gradcam(model, image, target)[1:2], gradcam(model, image[1:2], target[1:2]), atol=1e-5)


def test_a_network_without_stages_is_refused():
    with pytest.raises(errors.ModelError, match="does not name its stages"):
        gradcam(nn.Linear(2, 2), torch.zeros(1, 2, 4, 4), torch.tensor([0]))


def test_a_layer_without_maps_is_refused(model):
    with pytest.raises(errors.ModelError, match="not maps"):
        gradcam(model, torch.zeros(1, 5, 8, 8), torch.tensor([0]), layer=model.head)


def test_without_captum_the_way_to_get_it_is_named(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert not available()
    with pytest.raises(errors.MissingExtraError, match=r'pip install "r2kit\[explain\]"'):
        gradcam(model, torch.zeros(1, 5, 8, 8), torch.tensor([0]))
