"""From a recipe to a network: backbone and head, with the weights it starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

import safetensors
import safetensors.torch
import torch
from torch import nn

from r2kit.backbones import create_model
from r2kit.backbones.warmstart import Images, warm_start
from r2kit.backbones.weights import LoadReport, load_weights
from r2kit.data.preprocess import Interpolation, Preprocess
from r2kit.dense.saliency import build_saliency
from r2kit.dense.segmenter import build_segmenter
from r2kit.errors import ModelError, RunError
from r2kit.objects.anchors import standard_anchors
from r2kit.objects.detectors import Detector, build_detector
from r2kit.recipe import DetectionSpec, InstanceSpec, ModelSpec, Recipe, SaliencySpec, SegmentationSpec

if TYPE_CHECKING:
    from r2kit.run import Run


def build_network(
    recipe: Recipe,
    *,
    num_classes: int,
    bands: Sequence[str],
    images: Callable[[LoadReport], Images] | None = None,
) -> nn.Module:
    """Build the network of a recipe, of whatever kind its task is, with its starting weights.

    Args:
        recipe: The recipe.
        num_classes: K.
        bands: Names of the bands; weights made for colour images find red, green and blue among them by name.
        images: For a warm start, see `build_model`.

    Returns:
        The network, with `load_report` and `get_classifier`.

    Raises:
        ModelError: If the backbone cannot be had, or does not suit the task.
        MissingExtraError: If the task needs packages of an extra that is not installed.
    """
    task = recipe.task
    if isinstance(task, SegmentationSpec):
        return build_segmenter(
            recipe.model, task, num_classes=num_classes, in_chans=len(bands), rgb_bands=_rgb_positions(bands)
        )
    if isinstance(task, SaliencySpec):
        return build_saliency(recipe.model, task, in_chans=len(bands), rgb_bands=_rgb_positions(bands))
    if isinstance(task, DetectionSpec | InstanceSpec):
        return _build_detector(recipe.model, task, num_classes, bands)
    return build_model(recipe.model, num_classes=num_classes, bands=bands, images=images)


def _build_detector(
    spec: ModelSpec, task: DetectionSpec | InstanceSpec, num_classes: int, bands: Sequence[str]
) -> Detector:
    """Build a detector; those whose anchors are measured get them when the data is known, or with their weights."""
    preset = "small" if task.anchors == "auto" else task.anchors
    return build_detector(
        task.model,
        spec.name,
        num_classes=num_classes,
        anchors=None if task.model == "fcos" else standard_anchors(task.model, preset),
        width=task.width,
        min_score=task.min_score,
        nms_iou=task.nms_iou,
        max_detections=task.max_detections,
        regions=task.regions,
        pretrained=spec.pretrained,
        in_chans=len(bands),
        in_chans_rule=spec.in_chans_rule,
        rgb_bands=_rgb_positions(bands),
        drop_path_rate=spec.drop_path_rate,
        **spec.options,
    )


def build_model(
    spec: ModelSpec, *, num_classes: int, bands: Sequence[str], images: Callable[[LoadReport], Images] | None = None
) -> nn.Module:
    """Build the network that a recipe names, with its starting weights.

    Args:
        spec: The recipe's `model` section.
        num_classes: Size of the classifier.
        bands: Names of the bands; weights made for colour images find red, green and blue among them by name.
        images: For a warm start: makes batches of training images, given what loading the weights did.

    Raises:
        ValueError: If the recipe asks for a warm start and there are no images.
        ModelError: If the name is unknown, the channel table cannot be read, or the weights cannot be had or do not
            fit.
    """
    options: dict[str, Any] = {
        "pretrained": spec.pretrained,
        "num_classes": num_classes,
        "in_chans": len(bands),
        "in_chans_rule": spec.in_chans_rule,
        "rgb_bands": _rgb_positions(bands),
        "drop_rate": spec.drop_rate,
        "drop_path_rate": spec.drop_path_rate,
        **spec.options,
    }
    if not spec.warm_start:
        return create_model(spec.name, **options)
    if images is None:
        raise ValueError("images: a warm start measures statistics on training images")
    return warm_start(spec.name, images, **options)


def _rgb_positions(bands: Sequence[str]) -> tuple[int, int, int] | None:
    """Return where red, green and blue are among the bands, None where they are not named."""
    lowered = [band.lower() for band in bands]
    if not {"red", "green", "blue"} <= set(lowered):
        return None
    return lowered.index("red"), lowered.index("green"), lowered.index("blue")


def fit_preprocess(preprocess: Preprocess, report: LoadReport | None) -> tuple[Preprocess, str | None]:
    """Give the images the normalisation that the starting weights were made with.

    Args:
        preprocess: Made from the training images.
        report: What loading the weights did; None for random weights.

    Returns:
        The preprocessing to use, and a line that says what was decided; None where there was nothing to decide.
    """
    wanted = report.preprocessing if report is not None else None
    if wanted is None or wanted.origin == "assumed":
        return preprocess, None
    if not preprocess.is_picture or len(wanted.mean) != len(preprocess.bands):
        return preprocess, "normalisation: that of the training images; the weights' own is for other bands"
    ours = get_args(Interpolation)
    interpolation = cast(Interpolation, wanted.interpolation) if wanted.interpolation in ours else None
    mean, std = list(wanted.mean), list(wanted.std)
    if report is not None and report.rgb_bands is not None and len(report.rgb_bands) == len(mean):
        for position, band in enumerate(report.rgb_bands):
            mean[band], std[band] = wanted.mean[position], wanted.std[position]
    return preprocess.with_stats(mean, std, interpolation), "normalisation: that of the weights"


def model_from_run(run: Run) -> nn.Module:
    """Rebuild the network of a finished run, in evaluation mode, on the CPU.

    Raises:
        RunError: If the stored weights do not fit the stored recipe.
    """
    recipe = run.own_recipe
    spec = recipe.model.model_copy(update={"pretrained": False, "warm_start": False})
    model = build_network(
        recipe.model_copy(update={"model": spec}),
        num_classes=len(run.preprocess.classes),
        bands=run.preprocess.bands,
    )
    try:
        if recipe.task.kind in ("classification", "multilabel"):
            load_weights(model, run.weights_file)
        else:  # all tensors, not only those of a backbone
            model.load_state_dict(safetensors.torch.load_file(run.weights_file))
    except (ModelError, RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise RunError(f"{run.path}: {error}") from None
    return model.eval()


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the layout of a batch of images in memory."""
    return torch.channels_last if channels_last else torch.contiguous_format
