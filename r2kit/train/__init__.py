"""From a recipe to a run folder: data, network, training, evaluation, report."""

from r2kit.train.claim import first_process
from r2kit.train.flow import dry_run, finetune

__all__ = ["dry_run", "finetune", "first_process"]
