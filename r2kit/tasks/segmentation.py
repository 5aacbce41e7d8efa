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
from r2kit.tasks.base import Batch, Task, once_each


class SegmentationTask(Task):
    """One class for each pixel.

    Args:
        recipe: The recipe.
        model: The network, (B, C, H, W) -> (B, K, H, W).
        num_classes: K.
        class_weights: (K,) weights of the pixels of each class; None for equal ones.
    """

    columns: ClassVar[tuple[str, ...]] = ("train_loss", "train_acc", "val_loss", "val_acc", "val_miou")
    monitor: ClassVar[str] = "val_miou"

    def __init__(self, recipe: Recipe, model: nn.Module, num_classes: int, class_weights: Tensor | None = None) -> None:
        super().__init__(recipe, model, num_classes)
        assert isinstance(recipe.task, SegmentationSpec)
        self.spec = recipe.task
        self.tile = recipe.data.size if recipe.data.resize == "tile" else None
        self.class_weights = class_weights
        self.train_sums = torch.zeros(4, dtype=torch.float64)  # loss, images, right pixels, labelled pixels
        self._val_outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # index, confusion, cross-entropy

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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the batch, and count right pixels."""
        logits, mask = self(batch["image"]).float(), batch["mask"]
        loss = pixel_losses(logits, mask, self.spec.loss, self.class_weights)
        known = mask != IGNORE
        right = (logits.detach().argmax(1) == mask) & known
        sums = [loss.detach() * len(mask), loss.new_tensor(len(mask)), right.sum(), known.sum()]
        self.train_sums += torch.stack([value.double() for value in sums]).cpu()
        return loss

    def logits(self, image: Tensor) -> Tensor:
        """Return the logits (B, K, H, W) of images of any size, in tiles where the recipe says so."""
        if self.tile is None:
            return self(image)
        return sliding_logits(self, image, self.tile, self.spec.overlap)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the pixels of the batch for the end of the epoch."""
        logits, mask = self.logits(batch["image"]).float(), batch["mask"]
        entropy = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none").double().sum((1, 2))
        self._val_outputs.append((batch["index"], confusion_counts(logits.argmax(1), mask, self.num_classes), entropy))

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the last epoch."""
        self._val_outputs.clear()

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics of the epoch over every image once."""
        index, confusion, entropy = (torch.cat(column) for column in zip(*self._val_outputs, strict=True))
        self._val_outputs.clear()
        if self.trainer.world_size > 1:
            index, confusion, entropy = (self.all_gather(c).flatten(0, 1) for c in (index, confusion, entropy))
        rows = once_each(index.cpu())
        self.keep_metrics(segmentation_metrics(confusion.cpu()[rows], entropy.cpu()[rows]))

    def on_train_epoch_end(self) -> None:
        """Turn the sums of the epoch into its training metrics."""
        sums = self.all_train_sums().sum(0)
        loss, count, right, known = sums.tolist()
        self.epoch_metrics.update(train_loss=loss / count, train_acc=right / max(known, 1.0))


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
