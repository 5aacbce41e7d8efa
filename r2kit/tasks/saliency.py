"""Salient objects: how much each pixel belongs to what stands out."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from r2kit.data.datamodule import DataModule
from r2kit.data.targets import IGNORE
from r2kit.dense.saliency import f_curve, saliency_loss
from r2kit.dense.sliding import sliding_logits
from r2kit.errors import RecipeError
from r2kit.recipe import Recipe, SaliencySpec
from r2kit.tasks.base import Batch, Task, once_each


class SaliencyTask(Task):
    """How much each pixel belongs to what stands out.

    Args:
        recipe: The recipe.
        model: The network, see `dense.saliency.SaliencyNet`.
        num_classes: Two: background and object.
    """

    columns: ClassVar[tuple[str, ...]] = ("train_loss", "val_loss", "val_mae", "val_max_f")
    monitor: ClassVar[str] = "val_max_f"

    def __init__(self, recipe: Recipe, model: nn.Module, num_classes: int) -> None:
        super().__init__(recipe, model, num_classes)
        assert isinstance(recipe.task, SaliencySpec)
        self.spec = recipe.task
        self.tile = recipe.data.size if recipe.data.resize == "tile" else None
        self.train_sums = torch.zeros(2, dtype=torch.float64)  # loss, images
        self._val_outputs: list[tuple[Tensor, Tensor]] = []  # index; error, pixels, loss, curve

    @classmethod
    def from_data(cls, recipe: Recipe, model: nn.Module, data: DataModule) -> SaliencyTask:
        """Build the task.

        Raises:
            RecipeError: If the masks have other than two classes.
        """
        if len(data.classes) != 2:
            raise RecipeError(
                f"task.kind: saliency needs masks of two classes, background first, and there are {len(data.classes)} "
                f"({', '.join(data.classes)}); set data.masks.threshold or data.masks.classes, or "
                "data.bluemarble.masks=salient for the embedded ones"
            )
        return cls(recipe, model, 2)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the batch."""
        loss = saliency_loss(self(batch["image"]).float(), batch["mask"], self.spec.loss, self.spec.side_weight)
        count = len(batch["mask"])
        self.train_sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the measures of each image for the end of the epoch."""
        image, masks = batch["image"], batch["mask"]
        logits = self(image) if self.tile is None else sliding_logits(self, image, self.tile, self.spec.overlap)
        kept = []
        for one, mask in zip(logits.float(), masks, strict=True):
            score = (one[1] - one[0])[None, None]
            loss = saliency_loss(score, mask[None], self.spec.loss, 0.0)
            known = (mask != IGNORE).cpu().numpy()
            probs, truth = score[0, 0].sigmoid().cpu().numpy()[known], (mask == 1).cpu().numpy()[known]
            sums = [float(np.abs(probs - truth).sum()), float(known.sum()), float(loss)]
            kept.append(torch.tensor([*sums, *f_curve(probs, truth)], dtype=torch.float64))
        self._val_outputs.append((batch["index"], torch.stack(kept).to(self.device)))

    def on_validation_epoch_start(self) -> None:
        """Forget the measures of the last epoch."""
        self._val_outputs.clear()

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics of the epoch over every image once."""
        index, values = (torch.cat(column) for column in zip(*self._val_outputs, strict=True))
        self._val_outputs.clear()
        if self.trainer.world_size > 1:
            index, values = (self.all_gather(column).flatten(0, 1) for column in (index, values))
        table = values.cpu()[once_each(index.cpu())].numpy()
        errors = table[:, 0] / np.maximum(table[:, 1], 1.0)
        self.keep_metrics(
            {
                "val_loss": float(table[:, 2].mean()),
                "val_mae": float(errors.mean()),
                "val_max_f": float(table[:, 3:].mean(0).max()),
            }
        )

    def on_train_epoch_end(self) -> None:
        """Turn the sums of the epoch into its training metrics."""
        loss, count = self.all_train_sums().sum(0).tolist()
        self.epoch_metrics.update(train_loss=loss / count)
