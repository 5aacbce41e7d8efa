"""From a recipe to a detector: torchvision's detectors over the feature pyramid of any backbone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from r2kit.backbones import create_model
from r2kit.backbones.create import map_indices
from r2kit.data.tiles import Piece, cut_by_tile, merge_tiles
from r2kit.objects.anchors import LEVELS, Anchors
from r2kit.objects.coco import Objects, pack_mask

Kind = Literal["faster_rcnn", "mask_rcnn", "retinanet", "fcos"]
PIECES_AT_ONCE = 8
"""Pieces that are looked at in one pass unless fewer are asked for: the maps of a pyramid are large."""
_DIVISOR = 32  # sizes are padded to a multiple, so that the stride of every level is exact
_POINTS = (8, 16, 32, 64, 128)  # FCOS has a point where others have anchors; its side is the stride of its level


class Detector(nn.Module):
    """A torchvision detector over a batch of images that are normalised and of one size.

    Training: `forward(images, targets)` returns a dict of losses. Otherwise it returns for each image a dict of `boxes`
    (N, 4) in pixels of the batch, `labels` (N,) from 1, `scores` (N,) falling and, for Mask R-CNN, `masks` (N, h, w)
    as probabilities.

    Args:
        network: The detector, built by `build_detector`.
        first_label: The network's own number of the first class: 1 where it has an output for the background, else 0.
    """

    def __init__(self, network: nn.Module, first_label: int) -> None:
        super().__init__()
        self.network = network
        self.shift = 1 - first_label

    def forward(self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """Return losses while training, else what was found.

        Args:
            images: (B, C, H, W), normalised.
            targets: For each image `boxes` (N, 4), `labels` (N,) int64 from 1, and for Mask R-CNN `masks` (N, H, W).
        """
        given = None
        if targets is not None:
            given = [{**target, "labels": target["labels"] - self.shift} for target in targets]
        found = self.network(list(images), given)
        if self.training:
            return found
        for item in found:
            item["labels"] = item["labels"] + self.shift
            if "masks" in item:
                item["masks"] = item["masks"][:, 0]
        return found

    @property
    def backbone(self) -> Pyramid:
        """The network and the pyramid that the heads stand on."""
        return self.network.backbone  # type: ignore[return-value]

    @property
    def load_report(self) -> Any:
        """What loading the backbone's weights did; None for random weights."""
        return self.backbone.body.load_report

    def set_anchors(self, anchors: Anchors) -> None:
        """Replace the anchors by others of the same number.

        Raises:
            ValueError: If the detector has none, or another number.
        """
        own = [module for module in self.modules() if isinstance(module, DataAnchors)]
        if not own or own[0].scales.shape != (len(anchors.sizes), len(anchors.sizes[0])):
            raise ValueError("anchors: the detector has none, or another number of them")
        own[0].scales.copy_(torch.tensor(anchors.sizes))
        own[0].ratios.copy_(torch.tensor(anchors.ratios))

    @property
    def dense(self) -> nn.Module:
        """What runs over the whole image whatever is in it: all but the heads of the regions that were proposed."""
        return _Dense(self.network)

    def get_classifier(self) -> nn.Module:
        """Everything but the backbone's own layers: what is trained where the backbone is frozen."""
        body = {id(module) for module in self.backbone.body.modules()}
        holders = (self.network, self.backbone)
        others = [m for holder in holders for m in holder.children() if id(m) not in body and m is not self.backbone]
        return nn.ModuleList(others)


class Pyramid(nn.Module):
    """A backbone's feature maps joined into maps of one width, finest first.

    Args:
        body: A network built with `features_only`.
        channels: Channels of its maps.
        width: Channels of the pyramid.
        extra: torchvision's block that adds coarser levels.
    """

    def __init__(self, body: nn.Module, channels: Sequence[int], width: int, extra: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(channels), width, extra_blocks=extra)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (B, C, H, W) to maps of `out_channels` channels by the name of their level."""
        maps = self.body(images)
        if maps[0].shape[1] != self.fpn.inner_blocks[0][0].in_channels:  # timm's transformers end in channels
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(maps)))


class _Dense(nn.Module):
    """Backbone, pyramid and the head that slides over it; shares its parts with the detector."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.backbone = network.backbone
        self.head = network.rpn.head if hasattr(network, "rpn") else network.head

    def forward(self, images: Tensor) -> Any:
        return self.head(list(self.backbone(images).values()))


class _AsIs(GeneralizedRCNNTransform):
    """torchvision's way in and out of a detector without resizing and normalising: `Preprocess` has done both."""

    def __init__(self) -> None:
        super().__init__(min_size=1, max_size=1, image_mean=[0.0], image_std=[1.0], size_divisible=_DIVISOR)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Batch the images; the padding to a multiple of the coarsest stride has the mean colour."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return ImageList(self.batch_images(images, self.size_divisible), sizes), targets


class DataAnchors(AnchorGenerator):
    """Anchors whose sizes and ratios are part of the weights: a detector that is loaded has those it was trained with.

    They are not rounded to whole pixels, which at 8 pixels would change a side by up to 6 %.

    Args:
        anchors: Sizes for each level, ratios for all.
    """

    scales: Tensor
    ratios: Tensor

    def __init__(self, anchors: Anchors) -> None:
        super().__init__(anchors.sizes, (anchors.ratios,) * len(anchors.sizes))
        self.register_buffer("scales", torch.tensor(anchors.sizes, dtype=torch.float32))
        self.register_buffer("ratios", torch.tensor(anchors.ratios, dtype=torch.float32))

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Lay the anchors of each level around zero, from the buffers."""
        high = self.ratios.to(device, torch.float32).sqrt()[:, None]  # (R, 1); a ratio is height / width
        self.cell_anchors = []
        for sizes in self.scales.to(device, torch.float32):
            width, height = (sizes / high).flatten(), (sizes * high).flatten()  # (R * S,)
            self.cell_anchors.append((torch.stack([-width, -height, width, height], dim=1) / 2).to(dtype))


def build_detector(
    kind: Kind,
    name: str,
    *,
    num_classes: int,
    anchors: Anchors | None,
    width: int = 256,
    min_score: float = 0.05,
    nms_iou: float = 0.5,
    max_detections: int = 100,
    regions: int = 512,
    **backbone_options: Any,
) -> Detector:
    """Build a detector.

    Args:
        kind: Which.
        name: Any backbone that `r2kit.backbones.create_model` knows and whose maps have reductions 4 to 32.
        num_classes: Classes of objects, without the background.
        anchors: Of the levels that `LEVELS` names for this kind; None for FCOS, which has none.
        width: Channels of the pyramid.
        min_score: What scores lower is not given out.
        nms_iou: Intersection over union above which the lower-scored of two boxes of one class is left out.
        max_detections: Most boxes of one image.
        regions: Proposed regions of an image that the heads of Faster and Mask R-CNN learn from in a step.
        **backbone_options: As of `create_model`: ``pretrained``, ``in_chans``, ``drop_path_rate``, ...

    Raises:
        ModelError: If the backbone cannot be built, its weights cannot be loaded, or its maps are others.
    """
    if (anchors is None) != (kind == "fcos"):
        raise ValueError(f"anchors: {kind} {'has none' if anchors is not None else 'needs some'}")
    reductions = tuple(level for level in LEVELS[kind] if level <= 32)
    indices = map_indices(name, reductions, needs="a detector")
    body = create_model(name, features_only=True, out_indices=indices, **backbone_options)
    channels = body.feature_info.channels()  # type: ignore[union-attr, operator]
    two_stage = kind in ("faster_rcnn", "mask_rcnn")
    extra = LastLevelMaxPool() if two_stage else LastLevelP6P7(width, width)
    pyramid = Pyramid(body, channels, width, extra)
    generator = AnchorGenerator(tuple((side,) for side in _POINTS), ((1.0,),) * len(_POINTS))
    if anchors is not None:
        if len(anchors.sizes) != len(LEVELS[kind]):
            raise ValueError(f"anchors: {kind} has {len(LEVELS[kind])} levels, got {len(anchors.sizes)}")
        generator = DataAnchors(anchors)
    if two_stage:
        network: nn.Module = (FasterRCNN if kind == "faster_rcnn" else MaskRCNN)(
            pyramid,
            num_classes + 1,
            rpn_anchor_generator=generator,
            box_score_thresh=min_score,
            box_nms_thresh=nms_iou,
            box_detections_per_img=max_detections,
            box_batch_size_per_image=regions,
        )
    else:
        network = (RetinaNet if kind == "retinanet" else FCOS)(
            pyramid,
            num_classes,
            anchor_generator=generator,
            score_thresh=min_score,
            nms_thresh=nms_iou,
            detections_per_img=max_detections,
        )
    network.transform = _AsIs()
    return Detector(network, first_label=1 if two_stage else 0)


def detect(
    model: Detector,
    images: Tensor,
    pieces: Sequence[Sequence[Piece]],
    *,
    batch_size: int,
    nms_iou: float,
) -> list[Objects]:
    """Find the objects of images from their pieces.

    Args:
        model: The detector, in evaluation mode.
        images: (P, C, h, w), the pieces of all images one after another, normalised, on any device.
        pieces: Of each image, where its pieces lie; P in all.
        batch_size: Pieces at once.
        nms_iou: Overlap above which boxes of two tiles are one object.

    Returns:
        For each image `boxes` (N, 4) in pixels of the image, `scores` (N,) falling, `labels` (N,) from 1, and for Mask
        R-CNN `masks`, N run lengths as COCO packs them.
    """
    found: list[dict[str, Tensor]] = []
    device = next(model.parameters()).device
    for part in images.split(batch_size):
        found += model(part.to(device))
    result = []
    start = 0
    for of_image in pieces:
        result.append(_joined(found[start : start + len(of_image)], of_image, nms_iou))
        start += len(of_image)
    return result


def _joined(found: Sequence[dict[str, Tensor]], pieces: Sequence[Piece], nms_iou: float) -> Objects:
    """What was found in the pieces of one image, in pixels of the image."""
    boxes = [piece.back(item["boxes"].float().cpu().numpy()) for item, piece in zip(found, pieces, strict=True)]
    scores = np.concatenate([item["scores"].float().cpu().numpy() for item in found])
    labels = np.concatenate([item["labels"].cpu().numpy() for item in found])
    cut = [cut_by_tile(b, piece.window, piece.shape) for b, piece in zip(boxes, pieces, strict=True)]
    corners = np.concatenate(boxes)
    kept = np.arange(len(corners))
    if len(pieces) > 1:
        kept = merge_tiles(corners, scores, labels, np.concatenate(cut), nms_iou)
    # The way back may have cut a box at the image's border to nothing.
    kept = kept[(corners[kept, 2:] > corners[kept, :2]).all(axis=1)]
    result: Objects = {"boxes": corners[kept], "scores": scores[kept], "labels": labels[kept]}
    if "masks" in found[0]:
        of_piece = np.repeat(np.arange(len(pieces)), [len(item["masks"]) for item in found])
        first = np.concatenate([[0], np.cumsum([len(item["masks"]) for item in found])])
        result["masks"] = [
            pack_mask(pieces[of_piece[i]].mask_back(found[of_piece[i]]["masks"][i - first[of_piece[i]]])) for i in kept
        ]
    return result
