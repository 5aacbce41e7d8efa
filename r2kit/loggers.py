"""Where the metrics of the epochs go beside `metrics.csv`: Lightning's loggers, by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger

from r2kit.errors import require
from r2kit.run import Run
from r2kit.tasks import Task

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a logger whose package is missing, before anything is done.

    Raises:
        MissingExtraError: With the command that installs it.
    """
    for name in names:
        require(name, _PACKAGES[name], name, f"train.loggers: {name}")


def make_loggers(names: Sequence[str], run: Run) -> list[Logger]:
    """Return the loggers of a run; one that goes on writes into the same records.

    Weights & Biases and MLflow follow their own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI); without the
    latter, MLflow writes into the run folder.
    """
    made: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            made.append(TensorBoardLogger(run.path, name="tensorboard", version="", default_hp_metric=False))
        elif name == "wandb":
            from lightning.pytorch.loggers import WandbLogger

            made.append(WandbLogger(name=run.path.name, save_dir=run.path, project="r2kit", id=run.info["id"]))
        else:
            from lightning.pytorch.loggers import MLFlowLogger

            uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.path.resolve() / 'mlflow.db'}")
            logger = MLFlowLogger("r2kit", run.path.name, uri, run_id=run.info.get("mlflow_run_id"))
            made.append(logger)
    return made


class LogEpochs(Checkpoint):
    """Gives the metrics of each epoch to the loggers.

    It is a `Checkpoint` only because those are called last, when an epoch has all of its metrics.

    Args:
        run: Remembers MLflow's number of the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the number that MLflow gave the run."""
        for logger in trainer.loggers:
            if type(logger).__name__ == "MLFlowLogger" and trainer.is_global_zero:
                self.run.write_info(mlflow_run_id=logger.run_id)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the epoch."""
        assert isinstance(pl_module, Task)
        rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        found: dict[str, Any] = {"epoch": trainer.current_epoch, "lr": rate, **pl_module.epoch_metrics}
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
