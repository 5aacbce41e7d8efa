"""From a recipe to a run folder: data, network, training, evaluation, report."""

from r2kit.train.again import reproduce
from r2kit.train.flow import dry_run, finetune, resume
from r2kit.train.ranks import first_process

__all__ = ["dry_run", "finetune", "first_process", "reproduce", "resume"]
