"""The `task` part of a recipe: a union whose member `kind` chooses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from r2kit.recipe.base import Fraction, Positive, Spec
from r2kit.recipe.detection import DetectionSpec, InstanceSpec

Weight = Annotated[float, Field(ge=0.0)]


class ClassificationSpec(Spec):
    """One class per image."""

    kind: Literal["classification"] = "classification"
    """What the network predicts."""
    label_smoothing: Fraction = 0.0
    """Share of the target spread evenly over all classes."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """`focal`: images that the network is sure about count less (Lin et al. 2017); not with MixUp and CutMix."""
    focal_gamma: Annotated[float, Field(gt=0.0, le=10.0)] = 2.0
    """For `loss: focal`: the loss of an image of probability p is multiplied by (1 - p) to this power."""
    class_weights: Literal["none", "effective_number"] = "none"
    """`effective_number`: rare classes count more in the loss (Cui et al. 2019); 1 on average over the images."""
    class_weights_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """For `class_weights: effective_number`: near 0 all classes count alike, near 1 as the inverse of their size."""

    @model_validator(mode="after")
    def _consistent(self) -> ClassificationSpec:
        refuse_unused(self, "focal_gamma", "loss", "focal")
        refuse_unused(self, "class_weights_beta", "class_weights", "effective_number")
        return self


class SegmentationLossSpec(Spec):
    """The sum that is minimised: the weight of each loss, 0 for none."""

    cross_entropy: Weight = 1.0
    """Cross-entropy of every labelled pixel."""
    dice: Weight = 0.0
    """One minus the Dice overlap of each class over the batch."""
    focal: Weight = 0.0
    """Cross-entropy in which pixels that are right already count less."""
    lovasz: Weight = 0.0
    """The Lovasz extension of one minus the intersection over union of each class."""
    focal_gamma: Weight = 2.0
    """How much less: the power of one minus the probability of the true class."""
    label_smoothing: Fraction = 0.0
    """Share of the target of the cross-entropy spread evenly over all classes."""

    @model_validator(mode="after")
    def _consistent(self) -> SegmentationLossSpec:
        if self.cross_entropy + self.dice + self.focal + self.lovasz == 0.0:
            raise ValueError("cross_entropy: every loss has weight 0; give at least one a weight, e.g. cross_entropy=1")
        for name, needed in (("focal_gamma", "focal"), ("label_smoothing", "cross_entropy")):
            if getattr(self, name) != type(self).model_fields[name].default and getattr(self, needed) == 0.0:
                raise ValueError(f"{name}: has no effect with {needed}=0; give {needed} a weight, or leave {name} out")
        return self


class SegmentationSpec(Spec):
    """One class per pixel."""

    kind: Literal["segmentation"] = "segmentation"
    """What the network predicts."""
    decoder: Literal[
        "unet",
        "unetplusplus",
        "manet",
        "linknet",
        "fpn",
        "pspnet",
        "deeplabv3",
        "deeplabv3plus",
        "pan",
        "upernet",
    ] = "unet"
    """What turns the backbone's maps into classes of pixels, from segmentation-models-pytorch (extra ``seg``)."""
    output_stride: Literal[8, 16] | None = None
    """For deeplabv3 and deeplabv3plus: image size over the size of the backbone's last map, kept small by dilation;
    null for 8 with deeplabv3 and 16 with deeplabv3plus."""
    loss: SegmentationLossSpec = SegmentationLossSpec()
    class_weights: Literal["none", "balanced"] | Annotated[tuple[Positive, ...], Field(strict=False)] = "none"
    """Weight of each class in cross_entropy and focal: all alike; `balanced`: the median share of pixels over the
    class's own, measured on the training masks; or a list in the order of the classes."""
    overlap: Annotated[float, Field(ge=0.0, le=0.75)] = 0.25
    """Share of a tile that neighbouring tiles have in common where an image larger than `data.image_size` is read in
    tiles (data.resize=tile)."""
    boundary_tolerance: Annotated[float, Field(ge=0.0, le=64.0)] = 2.0
    """Distance in pixels of the original image up to which a boundary counts as found, for the boundary F1."""

    @model_validator(mode="after")
    def _consistent(self) -> SegmentationSpec:
        if self.output_stride is not None and self.decoder not in ("deeplabv3", "deeplabv3plus"):
            raise ValueError(
                f"output_stride: only deeplabv3 and deeplabv3plus have a choice; leave it out with "
                f"decoder={self.decoder}"
            )
        if self.class_weights != "none" and self.loss.cross_entropy + self.loss.focal == 0.0:
            raise ValueError(
                "class_weights: dice and lovasz take the mean over the classes, and weigh no pixels; leave "
                "class_weights out, or give loss.cross_entropy or loss.focal a weight"
            )
        return self


class SaliencyLossSpec(Spec):
    """The sum that is minimised at every level of the decoder: the weight of each loss, 0 for none."""

    bce: Weight = 1.0
    """Binary cross-entropy of every labelled pixel."""
    iou: Weight = 1.0
    """One minus the soft intersection over union of each image."""
    structure: Weight = 0.0
    """Both of these with pixels near a boundary counting up to six times."""

    @model_validator(mode="after")
    def _consistent(self) -> SaliencyLossSpec:
        if self.bce + self.iou + self.structure == 0.0:
            raise ValueError("bce: every loss has weight 0; give at least one a weight, e.g. bce=1")
        return self


class SaliencySpec(Spec):
    """How much each pixel belongs to what stands out; learned from masks of two classes, background first."""

    kind: Literal["saliency"] = "saliency"
    """What the network predicts."""
    width: Annotated[int, Field(ge=8, le=512)] = 64
    """Channels of the feature pyramid."""
    loss: SaliencyLossSpec = SaliencyLossSpec()
    side_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Weight of the loss at each level of the pyramid but the finest (deep supervision)."""
    overlap: Annotated[float, Field(ge=0.0, le=0.75)] = 0.25
    """Share of a tile that neighbouring tiles have in common where an image larger than `data.image_size` is read in
    tiles (data.resize=tile)."""


class MultilabelSpec(Spec):
    """Any number of labels per image: a table whose column label holds them, separated by ``;``."""

    kind: Literal["multilabel"] = "multilabel"
    """What the network predicts."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Probability from which a label is given, in F1 and in predictions; mean average precision needs none."""
    label_smoothing: Fraction = 0.0
    """Moves each yes and no towards one half by this share; not for the focal loss."""
    loss: Literal["cross_entropy", "focal", "asymmetric"] = "cross_entropy"
    """Of each label on its own. `focal`: what the network is sure about counts less (Lin et al. 2017). `asymmetric`: of
    the labels that an image does not have only (Ridnik et al. 2021)."""
    focal_gamma: Annotated[float, Field(gt=0.0, le=10.0)] = 2.0
    """For `loss: focal`: the loss of a probability p of the truth is multiplied by (1 - p) to this power."""
    class_weights: Literal["none", "effective_number"] = "none"
    """`effective_number`: for each label, images with it count more than those without as it is rarer; for
    `loss: cross_entropy`."""
    class_weights_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """For `class_weights: effective_number`: near 0 both count alike, near 1 as the inverse of their number."""

    @model_validator(mode="after")
    def _consistent(self) -> MultilabelSpec:
        refuse_unused(self, "focal_gamma", "loss", "focal")
        refuse_unused(self, "class_weights_beta", "class_weights", "effective_number")
        if self.class_weights != "none" and self.loss != "cross_entropy":
            raise ValueError(f"class_weights: loss={self.loss} weighs rare labels by itself; use one of the two")
        if self.label_smoothing > 0 and self.loss == "focal":
            raise ValueError("label_smoothing: the focal loss has none; use label_smoothing=0 or another loss")
        return self


def refuse_unused(spec: Spec, name: str, key: str, needed: str) -> None:
    """Refuse a value that nothing would read.

    Args:
        spec: Part of a recipe.
        name: A field of it, used only when field `key` is `needed`.
        key: The field that decides.
        needed: Its value.

    Raises:
        ValueError: If `name` is not at its default and `key` is not `needed`.
    """
    value = getattr(spec, name)
    if getattr(spec, key) != needed and value != type(spec).model_fields[name].default:
        raise ValueError(f"{name}: {value:g} has no effect with {key}={getattr(spec, key)}; set {key}={needed} too")


def _default_kind(values: Any) -> Any:
    """Let a task without a kind be a classification, as a recipe without a task is."""
    return {"kind": "classification", **values} if isinstance(values, dict) else values


TaskSpec = Annotated[
    Annotated[
        ClassificationSpec | MultilabelSpec | SegmentationSpec | SaliencySpec | DetectionSpec | InstanceSpec,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_default_kind),
]
"""What a recipe's `task` can be."""

Target = Literal["class", "classes", "mask", "boxes", "outlines"]
TARGET_OF_KIND: dict[str, Target] = {
    "classification": "class",
    "multilabel": "classes",
    "segmentation": "mask",
    "saliency": "mask",
    "detection": "boxes",
    "instance": "outlines",
}
"""What an image must carry for each kind of task."""
