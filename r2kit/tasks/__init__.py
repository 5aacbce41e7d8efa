"""What is learned: the network, its loss, its optimiser and the metrics of an epoch, as Lightning modules."""

from r2kit.tasks.base import SteppedTask, Task
from r2kit.tasks.classification import ClassificationTask, classification_metrics
from r2kit.tasks.detection import DetectionTask, detection_metrics
from r2kit.tasks.multilabel import MultilabelTask, multilabel_metrics
from r2kit.tasks.saliency import SaliencyTask
from r2kit.tasks.segmentation import SegmentationTask, segmentation_metrics

__all__ = [
    "TASKS",
    "ClassificationTask",
    "DetectionTask",
    "MultilabelTask",
    "SaliencyTask",
    "SegmentationTask",
    "SteppedTask",
    "Task",
    "classification_metrics",
    "detection_metrics",
    "multilabel_metrics",
    "segmentation_metrics",
]

TASKS: dict[str, type[Task]] = {
    "classification": ClassificationTask,
    "multilabel": MultilabelTask,
    "segmentation": SegmentationTask,
    "detection": DetectionTask,
    "instance": DetectionTask,
    "saliency": SaliencyTask,
}
"""The module of each kind of task."""
