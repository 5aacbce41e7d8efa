"""Classification: one class for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from r2kit.data.datamodule import DataModule
from r2kit.losses import classification_loss, effective_number_weights
from r2kit.recipe import ClassificationSpec, Recipe
from r2kit.tasks.base import Batch, Stage, Task, once_each


class ClassificationTask(Task):
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
        self._val_outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # index, logits, label

    @classmethod
    def from_data(cls, recipe: Recipe, model: nn.Module, data: DataModule) -> ClassificationTask:
        """Build the task for data that is set up."""
        return cls(recipe, model, len(data.classes), data.counts()["train"].tolist())

    def _step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) and the loss of a batch."""
        logits = self(batch["image"]).float()
        if stage == "val":  # the plain loss, so that runs compare
            return logits, classification_loss(logits, batch["label"])
        spec = self.spec
        gamma = spec.focal_gamma if spec.loss == "focal" else None
        return logits, classification_loss(logits, batch["label"], spec.label_smoothing, self.class_weights, gamma)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch, and count hits on the dominant label of mixed targets."""
        logits, loss = self._step(batch, "train")
        label = batch["label"]
        dominant = label.argmax(1) if label.ndim == 2 else label
        hits = (logits.detach().argmax(1) == dominant).sum()
        count = float(len(logits))
        self.train_sums += torch.stack(
            [loss.detach().double() * count, hits.double(), hits.new_tensor(count).double()]
        ).cpu()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the outputs of the batch for the end of the epoch."""
        logits, _ = self._step(batch, "val")
        self._val_outputs.append((batch["index"], logits, batch["label"]))

    def on_validation_epoch_start(self) -> None:
        """Forget the outputs of the last epoch."""
        self._val_outputs.clear()

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics of the epoch over every image once."""
        index, logits, label = (torch.cat(column) for column in zip(*self._val_outputs, strict=True))
        self._val_outputs.clear()
        if self.trainer.world_size > 1:
            index, logits, label = (self.all_gather(column).flatten(0, 1) for column in (index, logits, label))
        metrics = classification_metrics(index.cpu(), logits.cpu(), label.cpu(), self.num_classes)
        self.keep_metrics(metrics)

    def on_train_epoch_end(self) -> None:
        """Turn the sums of the epoch into its training metrics."""
        loss, hits, count = self.all_train_sums().sum(0).tolist()
        self.epoch_metrics.update({"train_loss": loss / count, self._train_acc: hits / count})


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
