"""What is learned: the network, its loss, its optimiser and the metrics of an epoch, as Lightning modules."""

from r2kit.tasks.base import Task
from r2kit.tasks.classification import ClassificationTask, classification_metrics

__all__ = ["ClassificationTask", "Task", "classification_metrics"]
