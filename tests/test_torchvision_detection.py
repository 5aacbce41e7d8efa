"""torchvision's detectors train over the features of the family's networks, joined by torchvision's own pyramid."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from r2kit.backbones import create_model

WIDTH = 32  # of the pyramid, so that the test is quick; 256 is usual


class PyramidBackbone(nn.Module):
    """A timm feature extractor and torchvision's feature pyramid; what a detector asks of it is `out_channels`."""

    def __init__(self, name: str, extra: ExtraFPNBlock, reductions: tuple[int, ...]) -> None:
        super().__init__()
        indices = tuple({2: 0, 4: 1, 8: 2, 16: 3, 32: 4}[reduction] for reduction in reductions)
        self.body = create_model(name, features_only=True, out_indices=indices)
        assert tuple(self.body.feature_info.reduction()) == reductions
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), WIDTH, extra_blocks=extra)
        self.out_channels = WIDTH

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (B, 3, H, W) to maps of WIDTH channels, finest first."""
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(images))))


def anchors(levels: int, ratios: tuple[float, ...] = (0.5, 1.0, 2.0)) -> AnchorGenerator:
    """One size a level, from 8 pixels."""
    return AnchorGenerator(tuple((8 * 2**level,) for level in range(levels)), (ratios,) * levels)


def faster_rcnn() -> FasterRCNN:
    backbone = PyramidBackbone("res2netplus50", LastLevelMaxPool(), (4, 8, 16, 32))
    return FasterRCNN(
        backbone,
        min_size=64,
        max_size=128,
        rpn_anchor_generator=anchors(5),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        box_head=TwoMLPHead(WIDTH * 7 * 7, 32),
        box_predictor=FastRCNNPredictor(32, 3),
        box_batch_size_per_image=16,
    )


def retinanet() -> RetinaNet:
    backbone = PyramidBackbone("res2netplus50", LastLevelP6P7(WIDTH, WIDTH), (8, 16, 32))
    return RetinaNet(backbone, num_classes=3, min_size=64, max_size=128, anchor_generator=anchors(5))


def scene(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """An image with two bright rectangles, and their boxes."""
    image = torch.rand(3, 64, 96, generator=generator) * 0.2
    boxes = torch.tensor([[8.0, 8.0, 24.0, 28.0], [50.0, 20.0, 80.0, 52.0]])
    for x0, y0, x1, y1 in boxes.int().tolist():
        image[:, y0:y1, x0:x1] += 0.7
    return image, {"boxes": boxes, "labels": torch.tensor([1, 2])}


@pytest.mark.parametrize("make", [faster_rcnn, retinanet])
def test_a_detector_takes_a_step_and_predicts(make):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = make()
    images, targets = zip(*(scene(generator) for _ in range(2)), strict=True)
    losses = model.train()(list(images), list(targets))
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    # The class logits' gradients reach the first convolution, through every level of the pyramid.
    assert [name for name, parameter in model.backbone.named_parameters() if parameter.grad is None] == []
    stem = model.backbone.body.conv1[0].weight
    before = stem.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert not torch.equal(before, stem)

    with torch.no_grad():
        (found,) = model.eval()([images[0]])
    assert found.keys() == {"boxes", "labels", "scores"}
    assert found["boxes"].shape == (len(found["scores"]), 4)
    if len(found["boxes"]):
        assert found["boxes"].min() >= 0
        assert found["boxes"][:, 2].max() <= 96
        assert found["boxes"][:, 3].max() <= 64
