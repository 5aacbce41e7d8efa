"""Detectors: what they are made of, that they learn, and that what they find is where it is."""

import pytest
import torch
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)

from r2kit.backbones import create_model
from r2kit.backbones.measure import count_parameters
from r2kit.errors import ModelError
from r2kit.freeze import Freezer
from r2kit.objects.anchors import fit_anchors, standard_anchors
from r2kit.objects.detectors import build_detector

KINDS = ("faster_rcnn", "mask_rcnn", "retinanet", "fcos")


def anchors(kind):
    return None if kind == "fcos" else standard_anchors(kind, "small")


def small(kind, **options):
    torch.manual_seed(0)
    return build_detector(kind, "test_resnet", num_classes=2, anchors=anchors(kind), width=32, **options)


def scenes(count, size=(64, 96), bands=3, seed=0):
    """Images with a bright square (class 1) and a dark bar (class 2), and their targets."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        image = torch.randn(bands, *size, generator=generator) * 0.1
        boxes = []
        for width, height, value in ((12, 12, 2.0), (24, 8, -2.0)):
            x = int(torch.randint(0, size[1] - width, (1,), generator=generator))
            y = int(torch.randint(0, size[0] - height, (1,), generator=generator))
            image[:, y : y + height, x : x + width] = value
            boxes.append([x, y, x + width, y + height])
        masks = torch.zeros(2, *size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        images.append(image)
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor([1, 2]), "masks": masks})
    return torch.stack(images), targets


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reaches_every_parameter(kind):
    model = small(kind, in_chans=5).train()
    images, targets = scenes(3, bands=5)
    targets[1] = {  # an image without an object
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 96, dtype=torch.bool),
    }
    before = [{key: value.clone() for key, value in target.items()} for target in targets]
    losses = model(images, targets)
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    for target, old in zip(targets, before, strict=True):  # nothing that was given is changed
        assert all(torch.equal(target[key], old[key]) for key in old)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_has_its_form(kind):
    model = small(kind, min_score=0.0, max_detections=7).eval()
    images, _ = scenes(2, size=(50, 70))  # no multiple of any stride
    with torch.inference_mode():
        found = model(images)
    for item in found:
        count = len(item["scores"])
        assert 0 < count <= 7
        assert item["boxes"].shape == (count, 4)
        assert item["boxes"].min() >= 0
        assert item["boxes"][:, [0, 2]].max() <= 70
        assert item["boxes"][:, [1, 3]].max() <= 50
        assert item["labels"].min() >= 1
        assert item["labels"].max() <= 2
        assert (item["scores"].diff() <= 0).all()
        if kind == "mask_rcnn":
            assert item["masks"].shape == (count, 50, 70)
            assert item["masks"].min() >= 0
            assert item["masks"].max() <= 1


def test_the_composition_is_torchvisions():
    """With a ResNet-50 and torchvision's own anchors the parameters are those of torchvision's detectors."""
    for kind, theirs, outputs in (
        ("faster_rcnn", fasterrcnn_resnet50_fpn, 91),
        ("mask_rcnn", maskrcnn_resnet50_fpn, 91),
        ("retinanet", retinanet_resnet50_fpn, 90),  # theirs has an unused output for the background where it has 91
        ("fcos", fcos_resnet50_fpn, 90),
    ):
        with torch.device("meta"):
            given = None if kind == "fcos" else standard_anchors(kind, "natural")
            ours = build_detector(kind, "resnet50", num_classes=90, anchors=given)
            reference = theirs(weights=None, weights_backbone=None, num_classes=outputs)
        assert count_parameters(ours) == count_parameters(reference), kind


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net101_26w_4s", "res2netplus50"])
def test_parameters_of_faster_rcnn_with_res2net(name):
    """The sum of its parts, each counted by hand: 80 classes of COCO, as the papers' configurations have it."""
    with torch.device("meta"):
        model = build_detector("faster_rcnn", name, num_classes=80, anchors=standard_anchors("faster_rcnn", "natural"))
        body = count_parameters(create_model(name, num_classes=0))
    pyramid = sum(256 * channels + 256 for channels in (256, 512, 1024, 2048)) + 4 * (9 * 256 * 256 + 256)
    proposals = (9 * 256 * 256 + 256) + (256 * 3 + 3) + (256 * 12 + 12)
    box_head = (256 * 49 * 1024 + 1024) + (1024 * 1024 + 1024)
    predictor = (1024 * 81 + 81) + (1024 * 81 * 4 + 81 * 4)
    assert count_parameters(model) == body + pyramid + proposals + box_head + predictor


def test_anchors_travel_with_the_weights():
    """A detector loaded into one with other anchors finds what the first one found."""
    sides = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).numpy() * 20 + 4
    first = build_detector(
        "faster_rcnn", "test_resnet", num_classes=2, anchors=fit_anchors("faster_rcnn", sides), width=32, min_score=0.0
    ).eval()
    second = small("faster_rcnn", min_score=0.0).eval()
    images, _ = scenes(1)
    second.load_state_dict(first.state_dict())
    with torch.inference_mode():
        (a,), (b,) = first(images), second(images)
    assert torch.equal(a["boxes"], b["boxes"])


def test_frozen_backbone_leaves_pyramid_and_heads():
    model = small("faster_rcnn")
    Freezer(model).apply(0)
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"backbone", "rpn", "roi_heads"}
    assert not any(p.requires_grad for p in model.backbone.body.parameters())
    assert all(p.requires_grad for p in model.backbone.fpn.parameters())
    model.train()
    assert model.load_report is None


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ModelError, match=r"needs maps of reduction 4, 8, 16, 32, and 'vit_tiny_patch16_224' has"):
        build_detector("faster_rcnn", "vit_tiny_patch16_224", num_classes=2, anchors=anchors("faster_rcnn"))
    with pytest.raises(ValueError, match="anchors: fcos has none"):
        build_detector("fcos", "test_resnet", num_classes=2, anchors=anchors("retinanet"))
    with pytest.raises(ModelError, match="unknown model"):
        build_detector("fcos", "res2nt", num_classes=2, anchors=None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("faster_rcnn", 150), ("retinanet", 400), ("fcos", 150)])
def test_a_detector_learns(kind, steps):
    model = small(kind)
    images, targets = scenes(24, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    model.train()
    for step in range(steps):
        chosen = [(8 * step + i) % 24 for i in range(8)]
        losses = model(images[chosen], [targets[i] for i in chosen])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    model.eval()
    from torchvision.ops import box_iou

    fresh, truth = scenes(8, seed=9)
    hits = 0
    with torch.inference_mode():
        for item, target in zip(model(fresh), truth, strict=True):
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                same = item["boxes"][(item["labels"] == label) & (item["scores"] > 0.3)]
                hits += bool(len(same) and box_iou(box[None], same).max() > 0.5)
    assert hits >= 10, hits


def test_maps_are_found_by_their_reduction_not_by_their_place():
    """The first map that DLA counts is as fine as the image, and is not given by default."""
    model = build_detector("faster_rcnn", "dla60_res2net", num_classes=2, anchors=anchors("faster_rcnn"), width=16)
    assert model.backbone.body.feature_info.reduction() == [4, 8, 16, 32]
    assert model.backbone.body.feature_info.channels() == [128, 256, 512, 1024]
