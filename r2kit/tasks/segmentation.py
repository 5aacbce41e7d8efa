"""Segmentation: one class for each pixel."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r2kit.data.datamodule import DataModule
from r2kit.data.targets import IGNORE
from r2kit.dense.losses import balanced_weights, pixel_losses
from r2kit.dense.metrics import confusion_counts, mean_iou, pixel_accuracy
from r2kit.dense.sliding import sliding_logits
from r2kit.errors import RecipeError
from r2kit.recipe import Recipe, SegmentationSpec
from r2kit.tasks.base import Reduction, Stage, SteppedTask, once_each


class SegmentationTask(SteppedTask):
    """One class for each pixel.

    Args:
        recipe: The recipe.
        model: The network, (B, C, H, W) -> (B, K, H, W).
        num_classes: K.
        class_weights: (K,) weights of the pixels of each class; None for equal ones.
    """

    columns: ClassVar[tuple[str, ...]] = ("train_loss", "train_acc", "val_loss", "val_acc", "val_miou")
    monitor: ClassVar[str] = "val_miou"
    target: ClassVar[str] = "mask"

    def __init__(self, recipe: Recipe, model: nn.Module, num_classes: int, class_weights: Tensor | None = None) -> None:
        super().__init__(recipe, model, num_classes)
        assert isinstance(recipe.task, SegmentationSpec)
        self.spec = recipe.task
        self.tile = recipe.data.size if recipe.data.resize == "tile" else None
        self.class_weights = class_weights
        self.train_sums = torch.zeros(4, dtype=torch.float64)  # loss, images, right pixels, labelled pixels

    @classmethod
    def from_data(cls, recipe: Recipe, model: nn.Module, data: DataModule) -> SegmentationTask:
        """Build the task, its class weights measured on the training masks where the recipe asks for that.

        Raises:
            RecipeError: If the recipe's list of weights is not one for each class.
        """
        assert isinstance(recipe.task, SegmentationSpec)
        wanted, weights = recipe.task.class_weights, None
        if wanted == "balanced":
            weights = balanced_weights(torch.from_numpy(data.pixel_shares()["train"].to_numpy(np.float64) * 2**40))
        elif wanted != "none":
            if len(wanted) != len(data.classes):
                raise RecipeError(
                    f"task.class_weights: {len(wanted)} weights for the {len(data.classes)} classes "
                    f"{', '.join(data.classes)}; one each, in this order"
                )
            weights = torch.tensor(wanted)
        return cls(recipe, model, len(data.classes), weights)

    def loss(self, logits: Tensor, target: Tensor, stage: Stage, reduction: Reduction = "mean") -> Tensor:
        """Return the recipe's loss of logits (B, K, H, W); the plain cross-entropy of labelled pixels in validation.

        Raises:
            ValueError: If the recipe's loss, which is one of the whole batch, is asked for each image.
        """
        if stage == "val":
            entropy, pixels = _entropy(logits, target), (target != IGNORE).sum((1, 2))
            if reduction == "none":
                return entropy / pixels.clamp_min(1)
            return entropy.sum() / pixels.sum().clamp_min(1)
        if reduction == "none":
            raise ValueError("reduction: the losses of a segmentation are those of a batch; none has no meaning")
        return pixel_losses(logits, target, self.spec.loss, self.class_weights)

    def count(self, logits: Tensor, target: Tensor, loss: Tensor) -> None:
        """Add loss, images and right pixels."""
        known = target != IGNORE
        right = (logits.argmax(1) == target) & known
        sums = [loss * len(target), loss.new_tensor(len(target)), right.sum(), known.sum()]
        self.train_sums += torch.stack([value.double() for value in sums]).cpu()

    def logits(self, image: Tensor) -> Tensor:
        """Return the logits (B, K, H, W) of images of any size, in tiles where the recipe says so."""
        if self.tile is None:
            return super().logits(image)
        return sliding_logits(self, image, self.tile, self.spec.overlap)

    def keep(self, index: Tensor, logits: Tensor, target: Tensor) -> None:
        """Keep the counts of the pixels and the cross-entropy of each image."""
        confusion = confusion_counts(logits.argmax(1), target, self.num_classes)
        self._val_outputs.append((index, confusion, _entropy(logits, target)))

    def training_metrics(self) -> dict[str, float]:
        """Return mean loss and share of right pixels."""
        loss, count, right, known = self.all_train_sums().sum(0).tolist()
        return {"train_loss": loss / count, "train_acc": right / max(known, 1.0)}

    def validation_metrics(self) -> dict[str, float]:
        """Return what `segmentation_metrics` gives."""
        index, confusion, entropy = self.kept()
        rows = once_each(index)
        return segmentation_metrics(confusion[rows], entropy[rows])


def _entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the summed cross-entropy (B,) of the labelled pixels of each image, float64."""
    return F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none").double().sum((1, 2))


def segmentation_metrics(confusion: Tensor, entropy: Tensor) -> dict[str, float]:
    """Return loss, pixel accuracy and mean IoU over distinct images.

    Args:
        confusion: (N, K, K) pixels of each image by true and predicted class.
        entropy: (N,) summed cross-entropy of the labelled pixels of each image, in nats.

    Returns:
        `val_loss` (mean cross-entropy of a labelled pixel), `val_acc` (share of labelled pixels) and `val_miou` (class
        mean over one confusion matrix of all images; a class that neither occurs nor is predicted is left out).
    """
    whole = confusion.sum(0)
    pixels = max(int(whole.sum()), 1)
    matrix = whole.numpy()
    return {
        "val_loss": entropy.sum().item() / pixels,
        "val_acc": float(np.nan_to_num(pixel_accuracy(matrix))),
        "val_miou": float(np.nan_to_num(mean_iou(matrix))),
    }
