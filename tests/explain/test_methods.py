"""Grad-CAM and its kin against their formulas, on every family, and what they leave behind."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from r2kit import errors
from r2kit.backbones import create_model
from r2kit.dense.saliency import SaliencyNet
from r2kit.explain import available, evidence, gradcam, target_layer
from r2kit.explain.methods import guided_gradients

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


FAMILIES = (
    "res2net50_14w_8s",
    "res2net50d",
    "res2next50",
    "seres2net50",
    "dla60_res2next",
    "blresnet50",
    "res2netplus50d",
    "res2nextplus50",
    "resnest14d",
    "scalenet50_light",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_explained_whole_and_as_a_pyramid(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, in_chans=2).eval()
    images, targets = torch.randn(1, 2, 64, 64).expand(3, 2, 64, 64), torch.arange(3)
    for method in ("gradcam", "hirescam", "guided-gradcam"):
        found = evidence(model, images, targets, method=method)
        assert found.shape == (3, 64, 64)
        assert np.isfinite(found).all()
        assert found.max() == pytest.approx(1.0)  # random weights may speak against a class, never against all
    pyramid = create_model(name, features_only=True, in_chans=2, out_indices=(0, 1, 2, 3, 4)).eval()
    layer = target_layer(SaliencyNet(pyramid, 4), (64, 64))
    with torch.no_grad():
        seen = []
        hook = layer.register_forward_hook(lambda module, given, output: seen.append(output.shape))
        pyramid(images[:1])
        hook.remove()
    assert [shape[2:] for shape in seen] == [(4, 4)]


def test_hirescam_is_the_formula(model):
    image, target = torch.randn(2, 5, 16, 16), torch.tensor([1, 2])
    found = evidence(model, image, target, method="hirescam")
    maps = model.eval().body(image).detach().requires_grad_(True)
    model.head(maps.mean((2, 3))).gather(1, target[:, None]).sum().backward()
    cam = (maps * maps.grad).sum(1, keepdim=True).relu()
    cam = nn.functional.interpolate(cam, (16, 16), mode="bilinear")[:, 0]
    expected = cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-20)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_guided_gradients_are_captums_where_captum_can(model):
    from captum.attr import GuidedBackprop

    image, target = torch.randn(2, 5, 16, 16, requires_grad=True), torch.tensor([0, 2])
    model.eval()
    expected = GuidedBackprop(model).attribute(image, target=target)
    torch.testing.assert_close(guided_gradients(model, image, target), expected)
    assert expected.abs().sum() > 0
    assert not model.body[2]._forward_hooks


def test_guided_gradients_pass_mish_and_work_in_place():
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False)
    image = torch.randn(1, 1, 4, 4, requires_grad=True)

    class Net(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.first, self.act, self.second = first, act, second

        def forward(self, x):
            return self.second(self.act(self.first(x))).mean((2, 3))

    for act in (nn.Mish(), nn.ReLU(inplace=True)):
        found = guided_gradients(Net(act), image, torch.tensor([0]))
        before = first(image).detach().requires_grad_(True)
        slope = torch.autograd.grad(act(before.clone()).sum(), before)[0]
        kept = (second.weight.flatten() / 16).clamp_min(0.0)[None, :, None, None] * slope
        torch.testing.assert_close(found, (kept * first.weight.flatten()[None, :, None, None]).sum(1, keepdim=True))


def test_integrated_gradients_add_up_to_the_difference_of_the_scores(model):
    from r2kit.explain.methods import _integrated_gradients

    image, target = torch.randn(1, 5, 16, 16, requires_grad=True), torch.tensor([1])
    model.eval()
    found = _integrated_gradients(model, None, image, target)
    difference = model(image)[0, 1] - model(torch.zeros_like(image))[0, 1]
    assert found.sum().item() == pytest.approx(difference.item(), abs=0.02 * found.abs().sum().item())


def test_occlusion_finds_what_the_score_rests_on():
    class Corner(nn.Module):
        def forward(self, x):
            return x[:, :1, 8:16, 16:24].mean((2, 3))

    found = evidence(Corner(), torch.ones(1, 2, 64, 64), torch.tensor([0]), method="occlusion")[0]
    assert found[8:16, 16:24].min() > 0.2
    assert found[24:].max() == 0.0
    assert found[:, 32:].max() == 0.0
