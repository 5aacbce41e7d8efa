"""What is learned: the network, its loss, its optimiser and the metrics of an epoch, as Lightning modules."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from r2kit.losses import classification_loss
from r2kit.models import Frozen, freeze_backbone, memory_format, parameter_groups
from r2kit.recipe import Recipe
from r2kit.seeding import derive_seed

Stage = Literal["train", "val"]
Batch = dict[str, Tensor]


class ClassificationTask(L.LightningModule):
    """One class for each image.

    The metrics of an epoch are computed once, from the stored outputs of every image, in the order of the images: they
    do not depend on the batch size or on the number of devices.

    Args:
        recipe: The recipe; its plain values become the hyperparameters of the checkpoint.
        model: The network, (B, C, H, W) -> (B, K).
        num_classes: K.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.save_hyperparameters({"recipe": recipe.model_dump(mode="json"), "num_classes": num_classes})
        self.recipe = recipe
        self.model = model
        self.num_classes = num_classes
        frozen = recipe.train.freeze == "backbone"
        self.frozen: Frozen | None = freeze_backbone(model) if frozen else None
        self.format = memory_format(recipe.train.channels_last)
        self.epoch_metrics: dict[str, float] = {}
        self.final_form = True  # False while the network still changes its activation: such an epoch is never the best
        self._train_sums = torch.zeros(3, dtype=torch.float64)  # loss, hits, images
        self._val_outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # index, logits, label
        self.train()  # Lightning takes the modes as it finds them

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits (B, K) of images (B, C, H, W)."""
        logits: Tensor = self.model(image.contiguous(memory_format=self.format))
        return logits

    def train(self, mode: bool = True) -> ClassificationTask:
        """Set training mode; frozen norms stay in evaluation mode, so that their statistics stand still."""
        super().train(mode)
        if self.frozen is not None:
            for module in self.frozen.modules:
                module.eval()
        return self

    # ---------------------------------------------------------------------------------------------- the steps

    def _step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) and the loss of a batch."""
        logits = self(batch["image"]).float()
        smoothing = self.recipe.task.label_smoothing if stage == "train" else 0.0
        return logits, classification_loss(logits, batch["label"], smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch, and count hits on the dominant label of mixed targets."""
        logits, loss = self._step(batch, "train")
        label = batch["label"]
        dominant = label.argmax(1) if label.ndim == 2 else label
        hits = (logits.detach().argmax(1) == dominant).sum()
        count = float(len(logits))
        self._train_sums += torch.stack(
            [loss.detach().double() * count, hits.double(), hits.new_tensor(count).double()]
        ).cpu()
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and stochastic depth by step, so that they do not depend on what ran before."""
        torch.manual_seed(derive_seed(self.recipe.seed, self.trainer.global_step, self.trainer.global_rank))

    def on_train_epoch_start(self) -> None:
        """Start the sums of a new epoch."""
        self._train_sums.zero_()

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
        self.epoch_metrics.update(metrics)
        if not self.trainer.sanity_checking:
            # Every rank holds the same numbers, so there is nothing to reduce.
            self.log_dict(
                {key: torch.tensor(value, dtype=torch.float64).float() for key, value in metrics.items()},
                rank_zero_only=True,
                sync_dist=False,
            )

    def on_train_epoch_end(self) -> None:
        """Turn the sums of the epoch into its training metrics."""
        sums = self._train_sums
        if self.trainer.world_size > 1:
            sums = self.all_gather(sums.to(self.device)).sum(0).cpu()
        loss, hits, count = sums.tolist()
        self.epoch_metrics.update(train_loss=loss / count, train_acc=hits / count)

    # ------------------------------------------------------------------------------------------ the optimiser

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and warm-up plus cosine as a schedule by step."""
        spec = self.recipe.train
        groups = parameter_groups(self.model, spec.weight_decay)
        # One kernel for the whole update, 3 to 4 times as fast on the CPU; fp16's gradient scaler cannot clip with it.
        fused = self.trainer.precision != "16-mixed"
        if spec.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=spec.lr, fused=fused)
        else:
            optimizer = torch.optim.SGD(groups, lr=spec.lr, momentum=0.9, nesterov=True, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * spec.warmup_epochs / spec.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the share of the highest learning rate at a step.

    Args:
        step: Optimiser steps taken, from 0.
        warmup: Steps in which the rate grows linearly to 1.
        total: All steps; the rate reaches zero there.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5 with one cycle; warm-up from Goyal et al. 2017,
    arXiv:1706.02677, sec. 2.2.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


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
    order = torch.argsort(index, stable=True)
    index = index[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    keep = order[first]
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
