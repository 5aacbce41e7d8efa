"""What every task shares: the network in its modes, the seed of each step, the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from r2kit.data.datamodule import DataModule
from r2kit.freeze import Freezer
from r2kit.models import memory_format
from r2kit.optim import Groups, make_optimizer, parameter_groups, set_momentum
from r2kit.recipe import Recipe
from r2kit.schedules import Plan, lr_factor
from r2kit.seeding import derive_seed

Stage = Literal["train", "val"]
Reduction = Literal["mean", "none"]
Batch = dict[str, Any]


class Task(L.LightningModule):
    """A network, what it learns, and how an epoch is measured.

    A kind of task adds `training_step`, its `columns` and its `monitor`, and the metrics of an epoch in
    `epoch_metrics` by the end of each validation and each training epoch. The metrics of a validation are computed
    once, from what was kept of every image, in the order of the images: they do not depend on the batch size or on the
    number of devices. What a training epoch adds up stands in `train_sums`, which the checkpoints hold, so that an
    interrupted epoch can go on.

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
        spec = recipe.train
        self.freezer: Freezer | None = Freezer(model, spec.unfreeze) if spec.freeze == "backbone" else None
        self.groups: Groups = self._make_groups()
        self.format = memory_format(recipe.train.channels_last)
        self.epoch_metrics: dict[str, float] = {}
        self.lr: float = spec.lr if spec.lr != "auto" else 0.0  # `auto` is found when all is ready
        self.time_share = 0.0  # of the time limit, as far as it is used up
        self.seconds_left: float | None = None  # of the time limit
        self.reductions = 0  # of the learning rate, at plateaus
        # A kind of task replaces it by sums of its own, on the CPU.
        self.train_sums = torch.zeros(0, dtype=torch.float64)
        self.final_form = True  # False while the network still changes its activation: such an epoch is never the best
        self.train()  # Lightning takes the modes as it finds them

    @classmethod
    def from_data(cls, recipe: Recipe, model: nn.Module, data: DataModule) -> Task:
        """Build the task for data that is set up."""
        return cls(recipe, model, len(data.classes))

    def example_loss(self) -> Callable[[nn.Module, Tensor], Tensor] | None:
        """Return what makes a loss of the network and a batch of random images, to measure its speed; None for any."""
        return None

    @property
    def counted(self) -> nn.Module:
        """The part of the network whose multiply-adds are counted: all of it, as far as they are the same for all."""
        return self.model

    def forward(self, image: Tensor) -> Any:
        """Return what the network makes of images (B, C, H, W)."""
        return self.model(image.contiguous(memory_format=self.format))

    def train(self, mode: bool = True) -> Task:
        """Set training mode; frozen norms stay in evaluation mode, so that their statistics stand still."""
        super().train(mode)
        if self.freezer is not None:
            self.freezer.hold()
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
                logger=False,  # the whole epoch goes there at its end
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Free what this epoch frees, and seed dropout and stochastic depth by step, not by what ran before."""
        if self.freezer is not None and self.freezer.apply(self.current_epoch):
            self.train()
            self._renew_ddp()
        step = self.trainer.global_step
        momentum = self.plan.momentum(step, self.time_share)
        if momentum is not None:
            set_momentum(self.trainer.optimizers[0], momentum)
        part = batch_idx % self.trainer.accumulate_grad_batches  # the passes of one step draw differently
        key = (self.recipe.seed, step, self.trainer.global_rank, *([part] if part else []))
        if self.device.type == "cpu":  # torch.manual_seed notes the stack for GPUs yet to come: 7 ms each time
            torch.default_generator.manual_seed(derive_seed(*key))
        else:
            torch.manual_seed(derive_seed(*key))

    def on_train_epoch_start(self) -> None:
        """Start the sums of a new epoch; an epoch that goes on does not come here."""
        self.train_sums.zero_()

    def all_train_sums(self) -> Tensor:
        """Return the sums of the epoch so far, (devices, *sums), the same in every process."""
        if processes() == 1:
            return self.train_sums[None].clone()
        gathered: Tensor = self.all_gather(self.train_sums.to(self.device)).cpu()
        return gathered

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of every process."""
        checkpoint["train_sums"] = self.all_train_sums()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this process's sums back; one of a device that was not there starts at zero."""
        kept = checkpoint["train_sums"]
        if self.trainer.global_rank < len(kept):
            self.train_sums = kept[self.trainer.global_rank].clone()

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and the recipe's schedule by step."""
        spec = self.recipe.train
        # One kernel for the whole update, 3 to 4 times as fast on the CPU; fp16's gradient scaler cannot clip with it.
        fused = self.trainer.precision != "16-mixed"
        factor = lr_factor(spec.optimizer, self.trainer.world_size) if spec.lr_scaling == "auto" else 1.0
        optimizer = make_optimizer(self.groups, spec, self.lr * factor, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * spec.warmup / spec.epochs)
        self.plan = Plan(spec.schedule, warmup, total, spec.epochs, spec.step_epochs, spec.lr_factor)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.plan.share(step, self.time_share, self.reductions)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

    @property
    def progress(self) -> float:
        """The share of training that is done, by steps or by time, whichever is ahead."""
        return self.plan.progress(self.trainer.global_step, self.time_share)

    def set_reductions(self, reductions: int) -> None:
        """Say how often a plateau was met; the learning rates follow at once."""
        self.reductions = reductions
        share = self.plan.share(self.schedule.last_epoch, self.time_share, reductions)
        for group, highest in zip(self.schedule.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = highest * share

    def score(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Return what makes an epoch better than another: its monitor, then a lower loss, or the other way round."""
        by_metric = metrics[self.monitor], -metrics["val_loss"]
        return by_metric if self.recipe.train.best_by == "metric" else by_metric[::-1]

    def _make_groups(self) -> Groups:
        """Return the parameter groups: of all that is trained at some time, made before it is frozen for a while."""
        spec = self.recipe.train
        if self.freezer is None:
            return parameter_groups(self.model, spec)
        groups: Groups = parameter_groups(self.model, spec) if spec.unfreeze else []
        self.freezer.apply(0)
        return groups or parameter_groups(self.model, spec)

    def _renew_ddp(self) -> None:
        """Wrap the network anew: DistributedDataParallel only averages what had gradients when it was made."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy.model = self
            strategy.configure_ddp()


class SteppedTask(Task):
    """A task whose steps are a forward pass, a loss and a count, each callable without a trainer.

    A kind of task adds `loss`, `count`, `keep`, `training_metrics` and `validation_metrics`; the steps are made of them
    here, and another trainer, such as fastai's, makes its own.
    """

    target: ClassVar[str]
    """Key of the batch that is learned."""

    def __init__(self, recipe: Recipe, model: nn.Module, num_classes: int) -> None:
        super().__init__(recipe, model, num_classes)
        self._val_outputs: list[tuple[Tensor, ...]] = []  # of each batch: index, and what `keep` kept

    def loss(self, logits: Tensor, target: Tensor, stage: Stage, reduction: Reduction = "mean") -> Tensor:
        """Return the loss: that of the recipe in training; in validation a plain one, so that runs compare.

        Args:
            logits: (B, K, ...) float32.
            target: What the batch holds under `target`.
            stage: Training or validation.
            reduction: `none` for the loss of each image, (B,).
        """
        raise NotImplementedError

    def count(self, logits: Tensor, target: Tensor, loss: Tensor) -> None:
        """Add a training batch to the sums of the epoch."""
        raise NotImplementedError

    def keep(self, index: Tensor, logits: Tensor, target: Tensor) -> None:
        """Keep what the metrics need of a batch of validation images, rows `index` (B,) of the manifest."""
        raise NotImplementedError

    def training_metrics(self) -> dict[str, float]:
        """Return the training metrics of the epoch, from the sums."""
        raise NotImplementedError

    def validation_metrics(self) -> dict[str, float]:
        """Return the validation metrics of the epoch, from what was kept, and forget that."""
        raise NotImplementedError

    def logits(self, image: Tensor) -> Tensor:
        """Return the logits (B, K, ...) of validation images."""
        found: Tensor = self(image)
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the batch, and count it."""
        logits, target = self(batch["image"]).float(), batch[self.target]
        loss = self.loss(logits, target, "train")
        self.count(logits.detach(), target, loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the outputs of the batch for the end of the epoch."""
        self.keep(batch["index"], self.logits(batch["image"]).float(), batch[self.target])

    def on_validation_epoch_start(self) -> None:
        """Forget the outputs of the last epoch."""
        self._val_outputs.clear()

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics of the epoch over every image once."""
        self.keep_metrics(self.validation_metrics())

    def on_train_epoch_end(self) -> None:
        """Turn the sums of the epoch into its training metrics."""
        self.epoch_metrics.update(self.training_metrics())

    def kept(self) -> tuple[Tensor, ...]:
        """Return what was kept in every process, index first, each row as often as it came; and forget it."""
        columns = tuple(torch.cat(column) for column in zip(*self._val_outputs, strict=True))
        self._val_outputs.clear()
        if processes() > 1:
            columns = tuple(self.all_gather(column).flatten(0, 1) for column in columns)
        return tuple(column.cpu() for column in columns)


def processes() -> int:
    """Return how many processes train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def once_each(index: Tensor) -> Tensor:
    """Return where each distinct row of (N,) stands first, in the order of the rows.

    A row comes twice where shards are padded to equal length; it must count once.
    """
    order = torch.argsort(index, stable=True)
    index = index[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    return order[first]
