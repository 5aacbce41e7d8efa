"""Decoders over backbones: shapes, gradients, weights in and out, parameter counts."""

import pytest
import torch

from r2kit.backbones import create_model
from r2kit.backbones.measure import count_parameters
from r2kit.backbones.weights import load_weights, save_weights
from r2kit.dense.segmenter import build_segmenter
from r2kit.errors import ModelError
from r2kit.freeze import Freezer
from r2kit.recipe import ModelSpec, SegmentationSpec

DECODERS = list(SegmentationSpec.model_json_schema()["properties"]["decoder"]["enum"])


def build(decoder="unet", name="test_resnet", **options):
    torch.manual_seed(0)
    task = SegmentationSpec(decoder=decoder, **{k: options.pop(k) for k in ("output_stride",) if k in options})
    return build_segmenter(ModelSpec(name=name, **options), task, num_classes=4, in_chans=5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_the_classes_of_every_pixel(decoder):
    model = build(decoder)
    side = 128 if decoder == "pan" else 64
    image = torch.randn(2, 5, side + 6, side + 26)  # no multiple of any stride
    logits = model(image)
    assert logits.shape == (2, 4, side + 6, side + 26)
    torch.nn.functional.cross_entropy(logits, torch.randint(0, 4, (2, side + 6, side + 26))).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize(("decoder", "stride"), [("deeplabv3plus", 8), ("deeplabv3plus", 16), ("deeplabv3", 8)])
def test_a_dilated_backbone_keeps_its_last_map_large(decoder, stride):
    model = build(decoder, "resnet18", output_stride=stride)
    assert model.backbone(torch.zeros(1, 5, 64, 64))[-1].shape[-1] == 64 // stride


def test_weights_of_a_classification_start_the_backbone_and_the_other_way_round(tmp_path):
    torch.manual_seed(1)
    classifier = create_model("test_resnet", num_classes=3, in_chans=5)
    save_weights(classifier, tmp_path / "model.safetensors", {"name": "test_resnet"})
    model = build(pretrained=str(tmp_path))
    theirs, ours = classifier.state_dict(), model.backbone.state_dict()
    assert torch.equal(ours["conv1.0.weight"], theirs["conv1.0.weight"])
    assert set(ours) <= set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert model.load_report.tensors > 20
    save_weights(model, tmp_path / "dense.safetensors", {"name": "test_resnet"})
    torch.manual_seed(2)
    back = create_model("test_resnet", num_classes=7, in_chans=5)
    report = load_weights(back, tmp_path / "dense.safetensors")
    assert torch.equal(back.state_dict()["layer4.0.conv1.weight"], theirs["layer4.0.conv1.weight"])
    assert report.classifier.startswith("none in the file")


def test_freezing_leaves_decoder_and_head():
    model = build().train()
    freezer = Freezer(model)
    freezer.apply(0)
    freezer.hold()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "segmentation_head"}
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert any(m.training for m in model.network.decoder.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_a_backbone_without_maps_is_refused():
    with pytest.raises(ModelError, match=r"unet needs .*(maps|features)"):
        build(name="test_vit")


# DeepLabV3+ as its paper configures it for 21 classes at output stride 16, with separable convolutions.
DEEPLAB_DECODER = (
    2 * (2048 * 256 + 512)  # ASPP: the 1x1 and the pooled 1x1, each with a norm
    + 3 * (2048 * 9 + 2048 * 256 + 512)  # its three dilated 3x3
    + (5 * 256 * 256 + 512)  # their projection
    + (256 * 9 + 256 * 256 + 512)  # a 3x3 over it
    + (256 * 48 + 96)  # the skip from stride 4
    + (304 * 9 + 304 * 256 + 512)  # a 3x3 over both
    + (256 * 21 + 21)  # the classes
)


@pytest.mark.parametrize(("name", "whole"), [("res2net50d", 26_844_045), ("resnet50d", 26_701_957)])
def test_deeplabv3plus_adds_the_same_decoder_to_either_backbone(name, whole):
    task = SegmentationSpec(decoder="deeplabv3plus")
    with torch.device("meta"):
        model = build_segmenter(ModelSpec(name=name), task, num_classes=21, in_chans=3)
        bare = create_model(name, num_classes=0)
    assert model.network.encoder.output_stride == 16
    assert count_parameters(model.backbone) == count_parameters(bare)
    assert count_parameters(model) - count_parameters(bare) == DEEPLAB_DECODER
    assert count_parameters(model) == whole


def test_maps_are_found_by_their_reduction_not_by_their_place():
    """The first map that DLA counts is as fine as the image, and is not given by default."""
    model = build(name="dla60_res2net")
    assert model.backbone.feature_info.reduction() == [2, 4, 8, 16, 32]
