"""Any number of labels for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from r2kit.data.datamodule import DataModule
from r2kit.losses import label_weights, multilabel_loss
from r2kit.metrics import f1_of_labels, mean_average_precision
from r2kit.recipe import MultilabelSpec, Recipe
from r2kit.tasks.base import Reduction, Stage, SteppedTask, once_each


class MultilabelTask(SteppedTask):
    """Any number of labels for each image; the network answers yes or no for every label on its own.

    Args:
        recipe: The recipe.
        model: The network, (B, C, H, W) -> (B, K).
        num_classes: K.
        images: Number of training images; needed, like `class_counts`, where the recipe asks for class weights.
        class_counts: (K,) training images with each label.

    Raises:
        ValueError: If the recipe asks for class weights and there are no counts.
    """

    columns: ClassVar[tuple[str, ...]] = ("train_loss", "val_loss", "val_map", "val_f1", "val_f1_micro")
    monitor: ClassVar[str] = "val_map"
    target: ClassVar[str] = "label"
    class_weights: Tensor | None

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        num_classes: int,
        images: int | None = None,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(recipe, model, num_classes)
        assert isinstance(recipe.task, MultilabelSpec)
        self.spec = recipe.task
        weights = None
        if self.spec.class_weights == "effective_number":
            if class_counts is None or images is None:
                raise ValueError("class_counts: class weights are made from the number of images of each class")
            weights = label_weights(class_counts, images, self.spec.class_weights_beta)
        self.register_buffer("class_weights", weights, persistent=False)  # the data and the recipe give it again
        self.train_sums = torch.zeros(2, dtype=torch.float64)  # loss, images

    @classmethod
    def from_data(cls, recipe: Recipe, model: nn.Module, data: DataModule) -> MultilabelTask:
        """Build the task for data that is set up."""
        return cls(recipe, model, len(data.classes), len(data.split.train), data.counts()["train"].tolist())

    def loss(self, logits: Tensor, target: Tensor, stage: Stage, reduction: Reduction = "mean") -> Tensor:
        """Return the recipe's loss of logits (B, K), or in validation the plain binary cross-entropy."""
        if stage == "val":
            return multilabel_loss(logits, target, reduction=reduction)
        return multilabel_loss(
            logits,
            target,
            self.spec.loss,
            label_smoothing=self.spec.label_smoothing,
            pos_weight=self.class_weights,
            focal_gamma=self.spec.focal_gamma,
            reduction=reduction,
        )

    def count(self, logits: Tensor, target: Tensor, loss: Tensor) -> None:
        """Add the loss."""
        count = float(len(logits))
        self.train_sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)

    def keep(self, index: Tensor, logits: Tensor, target: Tensor) -> None:
        """Keep logits and labels."""
        self._val_outputs.append((index, logits, target))

    def training_metrics(self) -> dict[str, float]:
        """Return the mean loss."""
        loss, count = self.all_train_sums().sum(0).tolist()
        return {"train_loss": loss / count}

    def validation_metrics(self) -> dict[str, float]:
        """Return what `multilabel_metrics` gives."""
        index, logits, label = self.kept()
        return multilabel_metrics(index, logits, label, self.spec.threshold)


def multilabel_metrics(index: Tensor, logits: Tensor, label: Tensor, threshold: float) -> dict[str, float]:
    """Return loss, mean average precision and F1 over distinct images.

    Args:
        index: (N,) row of each image; a row that comes twice, as when shards are padded to equal length, counts once.
        logits: (N, K).
        label: (N, K), 1 for each label of the image.
        threshold: Probability from which a label is given.

    Returns:
        `val_loss` (binary cross-entropy in nats, mean over images and labels), `val_map` (mean over the labels that
        occur, 0 where none does), `val_f1` (mean over the labels that occur or are given) and `val_f1_micro`.
    """
    keep = once_each(index)
    logits, label = logits[keep].double(), label[keep].double()
    probs, held = logits.sigmoid().numpy(), label.numpy() > 0.5
    macro, micro = f1_of_labels(held, probs >= threshold)
    return {
        "val_loss": nn.functional.binary_cross_entropy_with_logits(logits, label).item(),
        "val_map": mean_average_precision(probs, held) if held.any() else 0.0,
        "val_f1": macro,
        "val_f1_micro": micro,
    }
