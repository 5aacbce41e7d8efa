"""Detection and instance segmentation: boxes, classes and outlines of the objects in an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from r2kit.data.boxes.source import BoxedImages
from r2kit.data.datamodule import DataModule
from r2kit.data.placement import Placement
from r2kit.data.splits import PARTS
from r2kit.data.targets import BoxTarget
from r2kit.errors import DataError, require
from r2kit.objects.anchors import fit_anchors
from r2kit.objects.coco import Objects, average_precision, pack_mask
from r2kit.objects.detectors import PIECES_AT_ONCE, Detector, detect
from r2kit.recipe import Recipe
from r2kit.tasks.base import Batch, Task

FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
"""COCO's figures that are measured after each epoch."""


class DetectionTask(Task):
    """The objects in each image.

    Args:
        recipe: The recipe.
        model: The detector.
        num_classes: K, without the background.

    Raises:
        MissingExtraError: If what measures a detector is not installed.
    """

    columns: ClassVar[tuple[str, ...]] = ("train_loss", *(f"val_{name}" for name in FIGURES))
    monitor: ClassVar[str] = "val_map"
    model: Detector

    def __init__(self, recipe: Recipe, model: nn.Module, num_classes: int) -> None:
        require("faster_coco_eval", "faster-coco-eval", "det", "COCO's average precision")
        super().__init__(recipe, model, num_classes)
        self.spec = recipe.objects
        self.outlines = recipe.task.kind == "instance"
        self.train_sums = torch.zeros(2, dtype=torch.float64)  # loss, images
        self._val_outputs: dict[int, tuple[Objects, Objects]] = {}  # found and truth, by row

    @classmethod
    def from_data(cls, recipe: Recipe, model: nn.Module, data: DataModule) -> DetectionTask:
        """Build the task; anchors that the recipe wants measured are measured on the training boxes.

        Raises:
            DataError: If training or validation images hold no object, or too few to measure anchors.
        """
        counts = data.object_counts().sum()
        for part in PARTS:
            if len(data.split.rows(part)) and counts[part] == 0:
                raise DataError(f"{data.source.name}: the {part} images hold no object; divide the images otherwise")
        if recipe.objects.anchors == "auto":
            cast(Detector, model).set_anchors(fit_anchors(recipe.objects.model, box_sides(data, data.split.train)))
        return cls(recipe, model, len(data.classes))

    def example_loss(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Return a loss with one object in each image."""

        def loss(model: nn.Module, image: Tensor) -> Tensor:
            height, width = image.shape[-2:]
            target = {
                "boxes": image.new_tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]]),
                "labels": torch.ones(1, dtype=torch.int64, device=image.device),
                "masks": torch.ones(1, height, width, dtype=torch.bool, device=image.device),
            }
            losses: Tensor = torch.stack(list(model(image, [target] * len(image)).values())).sum()
            return losses

        return loss

    def score(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Return what makes an epoch better than another: average precision, then that at an overlap of one half."""
        return metrics["val_map"], metrics["val_map_50"]

    @property
    def counted(self) -> nn.Module:
        """All but the heads of the regions that are proposed, whose number depends on the image."""
        return self.model.dense

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the detector's losses."""
        images = batch["image"].contiguous(memory_format=self.format)
        names = ("boxes", "labels", *(("masks",) if self.outlines else ()))
        targets = [dict(zip(names, items, strict=True)) for items in zip(*(batch[n] for n in names), strict=True)]
        loss: Tensor = torch.stack(list(self.model(images, targets).values())).sum()
        count = float(len(images))
        self.train_sums += torch.tensor([float(loss.detach()) * count, count], dtype=torch.float64)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep what was found in whole images for the end of the epoch."""
        found = detect(
            self.model,
            batch["image"].contiguous(memory_format=self.format),
            batch["pieces"],
            batch_size=PIECES_AT_ONCE,
            nms_iou=self.spec.nms_iou,
        )
        for row, objects, truth in zip(batch["index"].tolist(), found, batch["truth"], strict=True):
            self._val_outputs[row] = objects, as_objects(truth)

    def on_validation_epoch_start(self) -> None:
        """Forget the outputs of the last epoch."""
        self._val_outputs.clear()

    def on_validation_epoch_end(self) -> None:
        """Compute the figures of the epoch over every image once."""
        outputs = self._val_outputs
        if self.trainer.world_size > 1:
            # Boxes differ in number from image to image, so the images travel as objects; a row counts once.
            shares: list[dict[int, Any] | None] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, outputs)
            outputs = {row: output for share in shares if share is not None for row, output in share.items()}
        metrics = detection_metrics(
            outputs, self.num_classes, outlines=self.outlines, max_detections=self.spec.max_detections
        )
        self._val_outputs.clear()
        self.keep_metrics(metrics)

    def on_train_epoch_end(self) -> None:
        """Turn the sums of the epoch into its training metrics."""
        loss, count = self.all_train_sums().sum(0).tolist()
        self.epoch_metrics["train_loss"] = loss / count


def box_sides(data: DataModule, rows: np.ndarray) -> np.ndarray:
    """Return width and height (N, 2) of the boxes of some images in pixels of the network's input, without crowds.

    Args:
        data: Images with boxes, set up.
        rows: Rows of the manifest.
    """
    source = cast(BoxedImages, data.source)
    sides = []
    for row in rows.tolist():
        at = source.boxes.of(row)
        boxes = source.boxes.corners[at][~source.boxes.crowd[at]]
        if data.preprocess.resize != "tile":
            boxes = Placement.of(data.preprocess, source.sizes[row]).into(boxes)
        sides.append(boxes[:, 2:] - boxes[:, :2])
    return np.concatenate(sides)


def as_objects(target: BoxTarget) -> Objects:
    """Return what is known about an image in the form in which it is compared, its masks packed."""
    objects: Objects = {"boxes": target.boxes, "labels": target.labels, "crowd": target.crowd}
    if target.masks is not None:
        objects["masks"] = [pack_mask(mask) for mask in target.masks]
    return objects


def detection_metrics(
    outputs: dict[int, tuple[Objects, Objects]], num_classes: int, *, outlines: bool, max_detections: int
) -> dict[str, float]:
    """Return COCO's figures over images, those of masks where there are outlines.

    Args:
        outputs: Found and true objects by row; the order of the rows does not matter.
        num_classes: K.
        outlines: Whether overlaps are those of masks.
        max_detections: Detections of one class in one image that count.

    Returns:
        `val_map` and its kin, see `FIGURES`; NaN for what the images cannot give, as where no object is large.
    """
    rows = sorted(outputs)
    found, truth = ([outputs[row][side] for row in rows] for side in (0, 1))
    figures = average_precision(found, truth, num_classes, outlines=outlines, max_detections=max_detections)
    return {f"val_{name}": figures[name] for name in FIGURES}
