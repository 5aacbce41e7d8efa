"""Every key of a recipe: its type, default, bound and meaning. The one home of defaults; imports no torch.

A recipe is a tree of frozen, strict pydantic models. The text below each field is its documentation: `r2kit recipe
schema`, `r2kit recipe new` and the error messages are made from it. Reading files and overrides is in
`r2kit.recipe_file`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from r2kit.recipe.augment import AugmentSpec
from r2kit.recipe.base import Spec
from r2kit.recipe.boxes import BoxSpec
from r2kit.recipe.data import BlueMarbleSpec, DataSpec
from r2kit.recipe.detection import DetectionSpec, InstanceSpec
from r2kit.recipe.masks import MaskSpec
from r2kit.recipe.model import ModelSpec
from r2kit.recipe.rasters import RastersSpec
from r2kit.recipe.task import (
    TARGET_OF_KIND,
    ClassificationSpec,
    MultilabelSpec,
    SaliencyLossSpec,
    SaliencySpec,
    SegmentationLossSpec,
    SegmentationSpec,
    Target,
    TaskSpec,
)
from r2kit.recipe.train import TrainSpec

__all__ = [
    "TARGET_OF_KIND",
    "AugmentSpec",
    "BlueMarbleSpec",
    "BoxSpec",
    "ClassificationSpec",
    "DataSpec",
    "DetectionSpec",
    "InstanceSpec",
    "MaskSpec",
    "ModelSpec",
    "MultilabelSpec",
    "RastersSpec",
    "Recipe",
    "SaliencyLossSpec",
    "SaliencySpec",
    "SegmentationLossSpec",
    "SegmentationSpec",
    "Spec",
    "Target",
    "TaskSpec",
    "TrainSpec",
]


class Recipe(Spec):
    """A whole fine-tuning run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "recipe"
    """Name of the run folder (runs/NAME-1, -2, ...) and of the report; a recipe file's own name by default."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The one seed behind weights, split, order, augmentation and mixing."""
    data: DataSpec = DataSpec()
    task: TaskSpec = ClassificationSpec()
    """What is learned; its `kind` says which keys there are."""
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    augment: AugmentSpec = AugmentSpec()

    @property
    def target(self) -> Target:
        """What every image must carry for the task."""
        return TARGET_OF_KIND[self.task.kind]

    @property
    def objects(self) -> DetectionSpec | InstanceSpec:
        """The task of a recipe that finds objects."""
        assert isinstance(self.task, DetectionSpec | InstanceSpec)
        return self.task

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._consistent_boxes()
        self._consistent_tiles()
        if self.data.masks != type(self.data.masks)() and self.target != "mask" and self.data.source != "rasters":
            raise ValueError(f"data.masks: task.kind={self.task.kind} reads no masks; leave data.masks out")
        if self.target == "mask" and self.augment.mixup:
            raise ValueError(
                "augment.mixup: MixUp blends classes, and a pixel of a mask has one; augment.cutmix may be set"
            )
        if isinstance(self.task, SegmentationSpec) and self.task.decoder == "pan" and min(self.data.size) < 128:
            raise ValueError(
                f"task.decoder: pan pools 128 x 128 pixels into one, and data.image_size is {min(self.data.size)}; "
                "raise it, or take another decoder"
            )
        if self.model.warm_start and self.task.kind != "classification":
            raise ValueError(
                "model.warm_start: the activation turns while a classification is trained; start this task from the "
                "run of that one, with model.pretrained=path/to/run"
            )
        if self.model.warm_start and self.train.freeze != "none":
            raise ValueError(
                "train.freeze: a warm start changes the activation of every block while training, and what is frozen "
                "could not follow; use train.freeze=none"
            )
        task = self.task
        if isinstance(task, ClassificationSpec) and task.loss == "focal" and self.augment.mixup + self.augment.cutmix:
            raise ValueError(
                "task.loss: focal is for images of one class, and MixUp and CutMix blend two; use "
                "task.loss=cross_entropy, or augment.mixup=0 and augment.cutmix=0"
            )
        weighed = isinstance(task, ClassificationSpec | MultilabelSpec) and task.class_weights != "none"
        if weighed and self.data.sampler != "shuffle":
            raise ValueError(
                f"task.class_weights: data.sampler={self.data.sampler} makes up for the rare classes already; use one "
                "of the two"
            )
        if self.target not in ("class", "classes") and self.data.sampler != "shuffle":
            raise ValueError(f"data.sampler: {self.data.sampler} draws by the class of whole images; use shuffle here")
        return self

    def _consistent_tiles(self) -> None:
        """Refuse tiles where images are read whole, and an overlap of tiles where there are none."""
        if self.data.resize == "tile" and self.target in ("class", "classes"):
            raise ValueError(
                f"data.resize: only tasks that learn from masks or boxes read images in tiles; {self.task.kind} allows "
                "squash, crop and pad"
            )
        parts = {"data.boxes.overlap": self.data.boxes.model_dump(exclude_defaults=True)}
        parts["task.overlap"] = self.task.model_dump(exclude_defaults=True)
        for name, changed in parts.items():
            if "overlap" in changed and self.data.resize != "tile":
                raise ValueError(f"{name}: has no effect with data.resize={self.data.resize}; set data.resize=tile too")

    def _consistent_boxes(self) -> None:
        """Refuse what does not go with boxes, and what goes with boxes only."""
        augment, data = self.augment, self.data
        if self.target not in ("boxes", "outlines"):
            for name in ("mosaic", "copy_paste"):
                if getattr(augment, name):
                    raise ValueError(f"augment.{name}: is for boxes; task.kind={self.task.kind} has none")
            if data.boxes != type(data.boxes)():
                raise ValueError(f"data.boxes: task.kind={self.task.kind} reads no boxes; leave data.boxes out")
            return
        if augment.mixup + augment.cutmix:
            raise ValueError(
                "augment.mixup: MixUp and CutMix blend labels of whole images, and this task learns boxes; "
                "augment.mosaic and augment.copy_paste are for boxes"
            )
        if data.source not in ("auto", "folder") or data.name is not None:
            raise ValueError(
                f"data.source: {data.resolved_source} has no boxes; leave source and name out, and let data.root name "
                "a COCO .json file, or a folder as YOLO or VOC has it"
            )
        if data.band_files is not None:
            raise ValueError("data.band_files: boxes are of whole images; leave it out")
        if data.sampler != "shuffle":
            raise ValueError(f"data.sampler: {data.sampler} is for images of one class; use data.sampler=shuffle")
        if self.objects.model == "fcos" and self.objects.width == 32 and max(data.size) <= 128:
            raise ValueError(  # one channel a group, on a coarsest map of one pixel: nothing to normalise
                "task.width: fcos normalises each of 32 channels on its own, and the coarsest map of an image of up to "
                "128 pixels has one pixel; use task.width=64, or data.image_size above 128"
            )
