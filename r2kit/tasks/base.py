"""What every task shares: the network in its modes, the seed of each step, the optimiser."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn

from r2kit.data.datamodule import DataModule
from r2kit.models import Frozen, freeze_backbone, memory_format, parameter_groups
from r2kit.recipe import Recipe
from r2kit.schedules import warmup_cosine
from r2kit.seeding import derive_seed

Stage = Literal["train", "val"]
Batch = dict[str, Any]


class Task(L.LightningModule):
    """A network, what it learns, and how an epoch is measured.

    A kind of task adds `training_step`, its `columns` and its `monitor`, and the metrics of an epoch in
    `epoch_metrics` by the end of each validation and each training epoch. The metrics of an epoch are computed once,
    from what was kept of every image, in the order of the images: they do not depend on the batch size or on the
    number of devices.

    Args:
        recipe: The recipe; its plain values become the hyperparameters of the checkpoint.
        model: The network.
        num_classes: K.
    """

    columns: ClassVar[tuple[str, ...]]
    """Names of the metrics of an epoch, `train_...` and `val_...`, in the order of `metrics.csv`."""
    monitor: ClassVar[str]
    """The metric whose largest value makes the best epoch; among equals a lower `val_loss` does."""

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
        self.train()  # Lightning takes the modes as it finds them

    @classmethod
    def from_data(cls, recipe: Recipe, model: nn.Module, data: DataModule) -> Task:
        """Build the task for data that is set up."""
        return cls(recipe, model, len(data.classes))

    def forward(self, image: Tensor) -> Any:
        """Return what the network makes of images (B, C, H, W)."""
        return self.model(image.contiguous(memory_format=self.format))

    def train(self, mode: bool = True) -> Task:
        """Set training mode; frozen norms stay in evaluation mode, so that their statistics stand still."""
        super().train(mode)
        if self.frozen is not None:
            for module in self.frozen.modules:
                module.eval()
        return self

    def keep_metrics(self, metrics: dict[str, float]) -> None:
        """Add metrics of the validation images to those of the epoch, and hand them to the trainer."""
        self.epoch_metrics.update(metrics)
        if not self.trainer.sanity_checking:
            # Every rank holds the same numbers, so there is nothing to reduce.
            self.log_dict(
                {key: torch.tensor(value, dtype=torch.float64).float() for key, value in metrics.items()},
                rank_zero_only=True,
                sync_dist=False,
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and stochastic depth by step, so that they do not depend on what ran before."""
        torch.manual_seed(derive_seed(self.recipe.seed, self.trainer.global_step, self.trainer.global_rank))

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


def once_each(index: Tensor) -> Tensor:
    """Return where each distinct row of (N,) stands first, in the order of the rows.

    A row comes twice where shards are padded to equal length; it must count once.
    """
    order = torch.argsort(index, stable=True)
    index = index[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    return order[first]
