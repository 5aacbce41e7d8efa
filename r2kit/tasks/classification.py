"""Classification: one class for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from r2kit.data.datamodule import DataModule
from r2kit.losses import classification_loss, effective_number_weights
from r2kit.recipe import ClassificationSpec, Recipe
from r2kit.tasks.base import Reduction, Stage, SteppedTask, once_each


class ClassificationTask(SteppedTask):
    """One class for each image.

    Args:
        recipe: The recipe.
        model: The network, (B, C, H, W) -> (B, K).
        num_classes: K.
        class_counts: (K,) training images of each class; needed where the recipe asks for class weights.

    Raises:
        ValueError: If the recipe asks for class weights and there are no counts.
    """

    columns: ClassVar[tuple[str, ...]] = ("train_loss", "train_acc", "val_loss", "val_acc", "val_f1")
    monitor: ClassVar[str] = "val_acc"
    target: ClassVar[str] = "label"
    class_weights: Tensor | None

    def __init__(
        self, recipe: Recipe, model: nn.Module, num_classes: int, class_counts: Sequence[int] | None = None
    ) -> None:
        super().__init__(recipe, model, num_classes)
        self._train_acc = "train_acc"
        if recipe.augment.mixup + recipe.augment.cutmix:  # an image of two classes has no accuracy: its name says whose
            self._train_acc = "train_acc_dominant"
            columns = (self._train_acc if name == "train_acc" else name for name in self.columns)
            self.columns = tuple(columns)  # type: ignore[misc]
        assert isinstance(recipe.task, ClassificationSpec)
        self.spec = recipe.task
        weights = None
        if recipe.task.class_weights == "effective_number":
            if class_counts is None:
                raise ValueError("class_counts: class weights are made from the number of images of each class")
            weights = effective_number_weights(class_counts, recipe.task.class_weights_beta)
        self.register_buffer("class_weights", weights, persistent=False)  # the data and the recipe give it again
        self.train_sums = torch.zeros(3, dtype=torch.float64)  # loss, hits, images

    @classmethod
    def from_data(cls, recipe: Recipe, model: nn.Module, data: DataModule) -> ClassificationTask:
        """Build the task for data that is set up."""
        return cls(recipe, model, len(data.classes), data.counts()["train"].tolist())

    def loss(self, logits: Tensor, target: Tensor, stage: Stage, reduction: Reduction = "mean") -> Tensor:
        """Return the recipe's loss of logits (B, K), or in validation the plain cross-entropy."""
        if stage == "val":
            return classification_loss(logits, target, reduction=reduction)
        spec = self.spec
        gamma = spec.focal_gamma if spec.loss == "focal" else None
        return classification_loss(logits, target, spec.label_smoothing, self.class_weights, gamma, reduction)

    def count(self, logits: Tensor, target: Tensor, loss: Tensor) -> None:
        """Add loss and hits, on the dominant label of mixed targets."""
        dominant = target.argmax(1) if target.ndim == 2 else target
        hits = (logits.argmax(1) == dominant).sum()
        count = float(len(logits))
        self.train_sums += torch.stack([loss.double() * count, hits.double(), hits.new_tensor(count).double()]).cpu()

    def keep(self, index: Tensor, logits: Tensor, target: Tensor) -> None:
        """Keep logits and labels."""
        self._val_outputs.append((index, logits, target))

    def training_metrics(self) -> dict[str, float]:
        """Return mean loss and accuracy."""
        loss, hits, count = self.all_train_sums().sum(0).tolist()
        return {"train_loss": loss / count, self._train_acc: hits / count}

    def validation_metrics(self) -> dict[str, float]:
        """Return what `classification_metrics` gives."""
        index, logits, label = self.kept()
        return classification_metrics(index, logits, label, self.num_classes)


def classification_metrics(index: Tensor, logits: Tensor, label: Tensor, num_classes: int) -> dict[str, float]:
    """Return loss, accuracy and macro F1 over distinct images.

    Args:
        index: (N,) row of each image; a row that comes twice, as when shards are padded to equal length, counts once.
        logits: (N, K).
        label: (N,) class of each image.
        num_classes: K.

    Returns:
        `val_loss` (mean cross-entropy in nats), `val_acc` and `val_f1` (mean of the per-class F1 over the classes that
        occur in the labels or the predictions).
    """
    keep = once_each(index)
    logits, label = logits[keep].double(), label[keep]
    pred = logits.argmax(1)
    confusion = torch.bincount(label * num_classes + pred, minlength=num_classes**2).view(num_classes, num_classes)
    hits = confusion.diagonal().double()
    either = (confusion.sum(0) + confusion.sum(1)).double()
    f1 = (2 * hits / either)[either > 0]
    return {
        "val_loss": nn.functional.cross_entropy(logits, label).item(),
        "val_acc": (hits.sum() / len(label)).item(),
        "val_f1": f1.mean().item(),
    }
