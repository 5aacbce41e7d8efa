"""The `task` part of a recipe that finds objects."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from r2kit.recipe.base import Fraction, Spec

AnchorWord = Literal["small", "natural", "auto"]


class _ObjectSpec(Spec):
    """What the detectors have in common."""

    anchors: AnchorWord = "small"
    """Sizes of the boxes that the detector starts from: `small`, from 8 pixels (16 with retinanet), for objects seen
    from above; `natural`, torchvision's, from 32 pixels; `auto`, measured on the training boxes."""
    width: Annotated[StrictInt, Field(ge=16, le=1024, multiple_of=16)] = 256
    """Channels of the feature pyramid."""
    min_score: Fraction = 0.05
    """What scores lower is not given out. COCO's figures want it low; for maps see `best_score` of the evaluation."""
    nms_iou: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Intersection over union above which the lower-scored of two boxes of one class is left out."""
    max_detections: Annotated[StrictInt, Field(ge=3, le=1000)] = 100
    """Most objects found in one image or tile, and of one class that count in the figures of an image; COCO has 100."""

    regions: Annotated[StrictInt, Field(ge=16, le=2048)] = 512
    """For faster_rcnn and mask_rcnn: proposed regions of an image that their heads learn from in a step; a quarter of
    them at most hold objects."""


class DetectionSpec(_ObjectSpec):
    """A box and a class for each object."""

    kind: Literal["detection"] = "detection"
    """What the network predicts."""
    model: Literal["faster_rcnn", "retinanet", "fcos"] = "faster_rcnn"
    """torchvision's detector over the feature pyramid of `model.name`."""

    @model_validator(mode="after")
    def _consistent(self) -> DetectionSpec:
        if self.model == "fcos" and self.anchors != "small":
            raise ValueError(f"anchors: fcos has none, and {self.anchors} would change nothing; leave anchors out")
        if self.model != "faster_rcnn" and self.regions != 512:
            raise ValueError(f"regions: {self.model} proposes none; leave regions out, or use model=faster_rcnn")
        if self.model == "fcos" and self.width % 32:
            raise ValueError(f"width: fcos normalises groups of 32 channels; {self.width} is no multiple of 32")
        return self


class InstanceSpec(_ObjectSpec):
    """A box, a class and an outline for each object."""

    kind: Literal["instance"] = "instance"
    """What the network predicts."""
    model: Literal["mask_rcnn"] = "mask_rcnn"
    """torchvision's detector over the feature pyramid of `model.name`."""
