"""The model card of a run: what the network is for, what it was measured to do, and where its limits are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from r2kit.catalog import CATALOG
from r2kit.console import counted, sentence
from r2kit.evaluate import summary_lines
from r2kit.page import template
from r2kit.report.classification import stored_result
from r2kit.result import Result
from r2kit.run import Run, write_atomic

REPO = "OWNER/NAME"
"""Stands for the repository in the card of a run that was not pushed."""

_KINDS: dict[str, tuple[str, str, str, str]] = {
    # pipeline tag of the hub, main figure, the figure's name on the hub, the extra that the network needs
    "classification": ("image-classification", "accuracy", "accuracy", ""),
    "multilabel": ("image-classification", "map", "mean_average_precision", ""),
    "segmentation": ("image-segmentation", "miou", "mean_iou", "[seg]"),
    "saliency": ("image-segmentation", "max_f", "max_f_measure", "[seg]"),
    "detection": ("object-detection", "map", "mean_average_precision", "[det]"),
    "instance": ("image-segmentation", "map", "mean_average_precision", "[det]"),
}
_WHAT = {
    "classification": "gives an image one of {n} classes",
    "multilabel": "gives an image any of {n} labels",
    "segmentation": "gives every pixel of an image one of {n} classes",
    "saliency": "says how much every pixel of an image belongs to what stands out",
    "detection": "finds objects of {n} {classes} in an image, as boxes",
    "instance": "finds objects of {n} {classes} in an image, as boxes and outlines",
}
_SPLITS = {
    "blocks": "whole spatial blocks are held out, because neighbouring images are alike.",
    "group": "whole groups of images are held out, because images of a group are alike.",
    "stratified": "images were drawn at random, each class in proportion. Where images are neighbours or near-copies "
    "of each other, such a split flatters the result.",
    "own": "as the data came divided.",
}


def write_card(run: Run) -> Path:
    """Write model_card.md of an evaluated run.

    Raises:
        RunError: If the run was not evaluated.
    """
    write_atomic(run.card, card_of(run))
    return run.card


def card_of(run: Run, repo: str = REPO) -> str:
    """Return the card of an evaluated run, Markdown with the front matter of the Hugging Face hub.

    Args:
        run: The run.
        repo: Repository on the hub that the card names.

    Raises:
        RunError: If the run was not evaluated.
    """
    recipe, info, preprocess = run.recipe, run.info, run.preprocess
    kind = recipe.task.kind
    result = stored_result(run, _KINDS[kind][1])
    source = Path(str(info.get("data", {}).get("source", "unknown"))).name
    of = "class" if len(preprocess.classes) == 1 else "classes"
    page = template("model_card.md.j2").render(
        front="---\nFRONT\n---",
        name=_line(recipe.name),
        what=f"{_line(recipe.model.name)} that {_WHAT[kind].format(n=len(preprocess.classes), classes=of)}.",
        info=info,
        use=_use(run),
        source=_line(source),
        bands=_line(", ".join(preprocess.bands)),
        classes=preprocess.classes,
        shown_classes=_line(_few(preprocess.classes)),
        counts=_counts(run),
        split=_SPLITS.get(str(info.get("split")), f"{_line(str(info.get('split', 'not recorded')))}."),
        result=result,
        measured=counted(result["images"], f"{'test' if result['split'] == 'test' else 'validation'} image"),
        lines=[sentence(_line(line)) for line in summary_lines(result) if "note: " not in line],
        units=f"whole {result['group_word']}s" if result.get("groups") is not None else "images",
        limits=[sentence(_line(limit)) for limit in _limits(run, result)],
        training=_training(run),
        licence=licence_words(run),
        extra=_KINDS[kind][3],
        repo=repo,
        folder=repo.rsplit("/", 1)[-1].lower(),
        timm=timm_owner(run),
        scale=f"{preprocess.scale:g}",
    )
    page = page.replace("&#39;", "'").replace("&#34;", '"')  # quotes harm no Markdown, and read better
    # The front matter is YAML from the hub's own library, which quotes what needs it: not a place for HTML escapes.
    return page.replace("---\nFRONT\n---", f"---\n{_front(run, result)}\n---", 1)


def timm_owner(run: Run) -> str | None:
    """Return who registers the network with timm, ``timm`` or ``r2kit``; None where timm cannot build it alone."""
    if run.recipe.task.kind not in ("classification", "multilabel") or run.recipe.model.structure is not None:
        return None
    entry = next((entry for entry in CATALOG if entry.name == run.recipe.model.name), None)
    return "timm" if entry is None else entry.owner


def licence_words(run: Run) -> str:
    """Return what is known of the licence of a run's weights."""
    model = run.recipe.model
    own = "Whoever publishes these weights states their licence; mind the terms of the training images as well."
    if model.pretrained is False:
        return f"Trained from random weights: no other weights' licence applies. {own}"
    if isinstance(model.pretrained, str):
        name = _line(Path(model.pretrained).name)
        return f"Training started from the weights in `{name}`, whose licence r2kit does not know. {own}"
    entry = next((entry for entry in CATALOG if entry.name == model.name), None)
    if entry is None or entry.weights is None:
        return f"Training started from the published weights of `{_line(model.name)}`; see their keeper's terms. {own}"
    known = "their keeper states no licence" if entry.licence == "unknown" else f"their licence is {entry.licence}"
    return f"Training started from `{entry.weights}`: {known}. {own}"


def _front(run: Run, result: Result) -> str:
    """The hub's metadata as YAML."""
    recipe = run.recipe
    pipeline, main, name, _ = _KINDS[recipe.task.kind]
    figure = result[main]["value"]
    found = EvalResult(
        task_type=pipeline,
        dataset_type="custom",
        dataset_name=Path(str(run.info.get("data", {}).get("source", "unknown"))).name,
        dataset_split="test" if result["split"] == "test" else "validation",
        metric_type=name,
        metric_value=None if figure is None else round(float(figure), 4),
    )
    data = ModelCardData(
        license="unknown",
        library_name="timm" if timm_owner(run) else "r2kit",
        pipeline_tag=pipeline,
        tags=["r2kit", recipe.task.kind, recipe.model.name],
        model_name=recipe.name,
        eval_results=[found] if figure is not None else None,
    )
    return data.to_yaml()


def _use(run: Run) -> str:
    """For which images the network is meant."""
    preprocess = run.preprocess
    height, width = preprocess.size
    how = {"tile": f"read in tiles of {height} x {width} pixels, never resized"}.get(
        preprocess.resize, f"brought to {height} x {width} pixels ({preprocess.resize})"
    )
    size = run.info.get("data", {}).get("image_size")
    like = f" of about {size[0]} x {size[1]} pixels" if size else ""
    return (
        f"Images{like} like those it was trained on: the same bands, {_line(', '.join(preprocess.bands))}, the same "
        f"kind of sensor and the same ground per pixel; they are {how}. "
        "It is for work where a person, or a check against a sample of the truth, stands behind the answer. It is not "
        "for decisions about people, nor where a wrong answer does harm that nobody would notice."
    )


def _counts(run: Run) -> list[tuple[str, int]]:
    """Images of each part."""
    if not run.split_file.is_file():
        return []
    held = run.read_table(run.split_file, ["split"])["split"].value_counts()
    names = (("train", "training"), ("val", "validation"), ("test", "test"))
    return [(words, int(held.get(part, 0))) for part, words in names]


def _limits(run: Run, result: Result) -> list[str]:
    """What the numbers do not say, and where the network is weak."""
    lines = [line.strip().removeprefix("note: ") for line in summary_lines(result) if "note: " in line]
    if run.info.get("split") not in ("blocks", "group"):
        lines.append("How it does in other regions, seasons or with other sensors was not measured.")
    else:
        lines.append("Beyond the held-out blocks or groups, other regions, seasons and sensors were not measured.")
    lines.append("It always answers: images of none of the classes, or of another kind altogether, get an answer too.")
    return lines


def _training(run: Run) -> str:
    """How it was trained, in a sentence."""
    recipe = run.recipe
    start = "other weights"
    if isinstance(recipe.model.pretrained, bool):
        start = "published weights" if recipe.model.pretrained else "random weights"
    kept = run.info.get("best_epoch")
    chosen = "" if kept is None else f"; the weights of epoch {kept + 1} were kept, chosen on the validation images"
    by: str = recipe.train.optimizer
    if "fastai" in run.info:
        names = dict.fromkeys(str(fit["optimizer"]) for fit in run.info["fastai"]["fits"])
        by = " and ".join([*names, f"fastai {run.info['fastai']['version']}"])
    epochs = counted(run.epochs_trained, "epoch")
    return f"From {start}, {epochs} with {by}, augmentation `{recipe.augment.preset}`, seed {recipe.seed}{chosen}."


def _few(names: tuple[str, ...], most: int = 30) -> str:
    """Names, not too many of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _line(text: Any) -> str:
    """Text from strangers as one line of Markdown: no break, no table cell, no code."""
    return " ".join(str(text).split()).replace("|", "/").replace("`", "'")
