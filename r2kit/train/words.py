"""What training says: everything about a run before it starts, and its result."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from r2kit.console import duration, table
from r2kit.data.boxes.source import BoxedImages
from r2kit.data.files import ImageFiles
from r2kit.data.resize import scaled_size
from r2kit.data.splits import PARTS
from r2kit.evaluate import summary_lines
from r2kit.optim import describe_groups
from r2kit.run import Run, installed_versions
from r2kit.tasks import ClassificationTask, MultilabelTask, SegmentationTask, Task
from r2kit.train.prepare import Job


def print_start(console: Console, job: Job) -> None:
    """Print versions, device, data, network and the estimated time."""
    recipe, data = job.recipe, job.data
    versions = installed_versions()
    console.print("  ".join(f"{name} {versions[name]}" for name in ("r2kit", "torch", "lightning", "timm")))
    console.print(f"device: {job.device_name}, precision {job.precision}, seed {recipe.seed}")
    console.print(f"data: {data.source.name}, split: {data.split.described}")
    if isinstance(data.source, ImageFiles) and data.source.cached:
        console.print(f"decoded images on disk: {data.source.cached}")
    for warning in data.split.warnings:
        console.print(f"  note: {warning}")
    for path, reason in data.skipped[:5]:
        console.print(f"  left out: {path}: {reason}")
    if len(data.skipped) > 5:
        console.print(f"  and {len(data.skipped) - 5} more left out")
    counts = data.counts()
    if recipe.data.sampler != "shuffle":
        counts["drawn an epoch"] = data.draws_by_class()
    rows = [[name, *row] for name, row in zip(counts.index, counts.to_numpy().tolist(), strict=True)]
    if len(rows) > 1 and data.target != "classes":
        rows.append(["all", *counts.sum().tolist()])
    elif data.target == "classes":  # an image counts for each of its labels
        rows.append(["images", *(len(data.split.rows(part)) for part in PARTS)])
        rows[-1] += [len(data.split.train)] * (len(counts.columns) - len(PARTS))
    console.print(table("images", ["class" if len(rows) > 1 else "", *counts.columns], rows))
    if data.target == "mask":
        shares = data.pixel_shares()
        rows = [[str(name), *(f"{100 * share:.2f} %" for share in row)] for name, *row in shares.itertuples()]
        console.print(table("labelled pixels", ["class", *shares.columns], rows))
    if isinstance(data.source, BoxedImages):
        objects = data.object_counts()
        rows = [[str(name), *(str(count) for count in row)] for name, *row in objects.itertuples()]
        console.print(table("objects", ["class", *objects.columns], rows))
        for box in data.source.bad_boxes[:5]:
            console.print(f"  {box.mended}: {box.where}: {box.reason}")
        if len(data.source.bad_boxes) > 5:
            console.print(f"  and {len(data.source.bad_boxes) - 5} more boxes cut or left out")
    if (
        isinstance(job.task, ClassificationTask | MultilabelTask | SegmentationTask)
        and job.task.class_weights is not None
    ):
        weights = job.task.class_weights.tolist()
        each = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(data.classes, weights, strict=True))
        console.print(f"class weights in the loss: {each}")
    prep = data.preprocess
    bands = [[band, f"{m:.4g}", f"{s:.4g}"] for band, m, s in zip(prep.bands, prep.mean, prep.std, strict=True)]
    console.print(table(f"normalisation (of pixel values divided by {prep.scale:g})", ["band", "mean", "std"], bands))
    frozen = _frozen(job.task)
    pretrained = recipe.model.pretrained
    if isinstance(pretrained, bool):
        start = "published ImageNet weights" if pretrained else "random weights"
    else:
        start = f"weights of {pretrained}"
    height, width = recipe.data.size
    console.print(
        f"model: {recipe.model.name}, {start}, {job.parameters:,} parameters, {job.macs / 1e9:.3g} GMACs at "
        f"{height}x{width}, {job.speed:.1f} training images/s measured here; {frozen}"
    )
    for line in job.loaded:
        console.print(f"  {line}")
    for line in _strategy(job):
        console.print(line)
    console.print(f"optimize: {job.optimized}")
    for choice in job.choices:
        console.print(f"  {choice.key}: {choice.value} ({choice.reason})")
    trained, validated = data.inputs_of_epoch()
    passes = (trained + validated / 3) * recipe.train.epochs
    seconds, limit = passes / job.speed, recipe.train.time_limit_seconds
    if limit is not None and limit < seconds:
        console.print(
            f"estimated training time: {duration(limit)}, the limit; all epochs would take {duration(seconds)}"
        )
    else:
        console.print(f"estimated training time: {duration(seconds)}")


def _frozen(task: Task) -> str:
    """Say what stands still, and until when."""
    if task.freezer is None:
        return "nothing is frozen"
    text = f"{task.freezer.parameters:,} parameters are frozen"
    epochs = task.freezer.unfreeze
    if not epochs:
        return text
    steps = [f"{task.freezer.depth_at(epoch)} of {task.freezer.depth} parts from epoch {epoch + 1}" for epoch in epochs]
    return f"{text}; frozen then: {', '.join(steps)}"


def _strategy(job: Job) -> list[str]:
    """Say how the network is trained, where it is not the plain way."""
    spec, size = job.recipe.train, job.recipe.data.size
    lines = [
        f"training: {spec.optimizer}, {describe_groups(job.task.groups)} ({job.task.lr:g} at the highest), schedule "
        f"{spec.schedule.replace('_', ' ')} after {spec.warmup:g} epochs of warm-up"
    ]
    if spec.progressive_size:
        shares = [*spec.progressive_size, 1.0]
        firsts = [next(e for e in range(spec.epochs) if spec.size_share(e) == share) for share in shares]
        sizes = [scaled_size(size, share) for share in shares]
        parts = [f"{h}x{w} from epoch {e + 1}" for (h, w), e in zip(sizes, firsts, strict=True)]
        lines.append(f"training images grow: {', '.join(parts)}")
    return lines


def print_result(
    console: Console, run: Run, metrics: dict[str, Any], best_epoch: int, seconds: tuple[float, float, float]
) -> None:
    """Print the result, what it stands beside, the seconds (training, evaluation, all), and what to do next."""
    training, evaluation, total = (duration(value) for value in seconds)
    console.print()
    console.print(f"best epoch: {best_epoch + 1} of {run.recipe.train.epochs}")
    for line in summary_lines(metrics):
        console.print(line)
    console.print(f"time: {total}, of which {training} training and {evaluation} evaluation and report")
    console.print(f"run folder: {run.path}  (start with {run.report})")
    console.print("next:")
    console.print(f"  r2kit evaluate {run.path}")
    console.print(f"  r2kit predict {run.path} path/to/images")
    console.print(f"  r2kit report {run.path}")
