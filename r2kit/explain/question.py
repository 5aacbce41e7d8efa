"""What is explained in an image: of whatever a network answers, the one class whose evidence is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import box_iou

from r2kit.data.preprocess import Preprocess
from r2kit.data.tiles import tile_windows
from r2kit.errors import ModelError, did_you_mean
from r2kit.objects.detectors import Detector
from r2kit.recipe import MultilabelSpec, Recipe

_SAME_BOX = 0.5  # intersection over union above which a box of a changed image is still the one that is explained


@dataclass(frozen=True)
class Question:
    """One class in one image.

    Attributes:
        name: The class.
        target: Its column in what `scores` returns.
        score: Of the answer, in [0, 1].
        words: What the network answers about the class.
        strength: By which the tile of a large image is chosen: the score of a box, the number of a class's pixels.
        scores: (B, C, h, w) -> (B, K), the score that is explained in column `target`.
        box: x0 y0 x1 y1 in pixels of the network's input, of a detection.
    """

    name: str
    target: int
    score: float
    words: str
    strength: float
    scores: nn.Module
    box: NDArray[np.float32] | None = None


def allowed_class(name: str, classes: tuple[str, ...], where: str) -> str:
    """Return a class that was asked for.

    Raises:
        ModelError: If there is no such class.
    """
    if name not in classes:
        shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        raise ModelError(f"{where}: no class '{name}'; there are {shown}{did_you_mean(name, classes)}")
    return name


@torch.no_grad()
def ask(
    model: nn.Module,
    recipe: Recipe,
    classes: tuple[str, ...],
    image: Tensor,
    *,
    wanted: str | None = None,
    near: NDArray[np.float32] | None = None,
) -> Question | None:
    """Say what is explained in an image.

    - A classification: the logit of the class, by default of the most likely one.
    - Several labels: likewise.
    - A segmentation, and salient objects: the mean logit of the class over the pixels that are predicted as it (those
      of Seg-Grad-CAM), by default of the class that most pixels are predicted as, or of the object.
    - A detection: the score of the surest box, by default of any class. Where the image is changed, as occlusion does,
      it is that of the surest box of this class that overlaps this one by half, or zero.

    Args:
        model: The network, in evaluation mode.
        recipe: Its recipe.
        classes: K names.
        image: (1, C, h, w), normalised, on the network's device.
        wanted: The class; by default the predicted one.
        near: A detection: only a box that overlaps this one by half, in shares of the sides.

    Returns:
        None where there is nothing to explain: no box is found, or no pixel is predicted as the class.

    Source: Vinogradova et al. 2020, arXiv:2002.11434, eq. 2.
    """
    kind = recipe.task.kind
    if kind in ("detection", "instance"):
        assert isinstance(model, Detector)
        return _ask_detector(model, classes, image, wanted, near)
    logits = model(image).float()  # (1, K) or (1, K, h, w)
    if logits.ndim == 2:
        several = isinstance(recipe.task, MultilabelSpec)
        probs = (logits.sigmoid() if several else logits.softmax(1))[0]
        target = int(probs.argmax()) if wanted is None else classes.index(wanted)
        score = float(probs[target])
        return Question(classes[target], target, score, f"{classes[target]} {100 * score:.0f} %", score, model)
    predicted = logits.argmax(1)[0]  # (h, w)
    count = torch.bincount(predicted.flatten(), minlength=len(classes))
    usual = 1 if kind == "saliency" else int(count.argmax())
    target = usual if wanted is None else classes.index(wanted)
    if not count[target]:
        return None
    inside = predicted == target
    score = float(logits.softmax(1)[0, target][inside].mean())
    words = f"{classes[target]}, {_share(int(count[target]), predicted.numel())} of the pixels"
    return Question(classes[target], target, score, words, float(count[target]), _PixelScore(model, inside))


def _share(part: int, whole: int) -> str:
    """A share that is never written as nothing."""
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 0.5 else f"{percent:.2g} %"


class _PixelScore(nn.Module):
    """The mean logit of every class over chosen pixels (h, w)."""

    def __init__(self, network: nn.Module, inside: Tensor) -> None:
        super().__init__()
        self.network = network
        self.inside = inside.float()

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)
        return (logits * self.inside).sum((2, 3)) / self.inside.sum()


class _BoxScore(nn.Module):
    """The score of the surest box of each class that overlaps a given one, (B, K)."""

    def __init__(self, network: Detector, box: Tensor, count: int) -> None:
        super().__init__()
        self.network = network
        self.box = box
        self.count = count

    def forward(self, image: Tensor) -> Tensor:
        rows = []
        for one, found in zip(image, self.network(image), strict=True):
            near = box_iou(self.box[None], found["boxes"])[0] >= _SAME_BOX
            scores = [
                found["scores"][near & (found["labels"] == label)][:1].sum() for label in range(1, self.count + 1)
            ]
            # What does not depend on the image has no gradient, and captum asks for one.
            rows.append(torch.stack(scores) + 0.0 * one.sum())
        return torch.stack(rows)


def _ask_detector(
    model: Detector,
    classes: tuple[str, ...],
    image: Tensor,
    wanted: str | None,
    near: NDArray[np.float32] | None,
) -> Question | None:
    """The surest box, of a class and at a place if these are given."""
    found = model(image)[0]
    kept = torch.ones_like(found["scores"], dtype=torch.bool)
    if wanted is not None:
        kept &= found["labels"] == classes.index(wanted) + 1
    if near is not None and len(kept):
        sides = torch.tensor([image.shape[-1], image.shape[-2]] * 2, device=image.device)
        place = torch.as_tensor(near, device=image.device) * sides
        kept &= box_iou(place[None].float(), found["boxes"].float())[0] >= _SAME_BOX
    if not kept.any():
        return None
    first = int(kept.nonzero()[0])  # they fall
    target, score, box = int(found["labels"][first]) - 1, float(found["scores"][first]), found["boxes"][first].detach()
    name = classes[target]
    scores = _BoxScore(model, box, len(classes))
    return Question(name, target, score, f"{name} {100 * score:.0f} %", score, scores, box.cpu().numpy())


def as_input(preprocess: Preprocess, piece: NDArray[Any]) -> Tensor:
    """Bring a piece of raw pixels (H, W, C) to the network's input: (1, C, h, w), normalised.

    A piece that is smaller than a tile is put into the middle of one, as in training.
    """
    fitted = preprocess.fit(piece)
    canvas = _canvas(preprocess, fitted.shape[1:])
    if tuple(fitted.shape[1:]) != canvas:
        fitted = replace(preprocess, size=canvas).fill_up(fitted)
    return preprocess.normalize(fitted[None])


def mask_as_input(preprocess: Preprocess, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Bring a mask (H, W) to where `as_input` brings its piece; False where the piece is filled up."""
    fitted = preprocess.fit_mask(mask.astype(np.uint8)).numpy()
    canvas = _canvas(preprocess, fitted.shape)
    whole = np.zeros(canvas, dtype=bool)
    top, left = ((m - n) // 2 for n, m in zip(fitted.shape, canvas, strict=True))
    whole[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted == 1  # neither 0 nor IGNORE
    return whole


def _canvas(preprocess: Preprocess, shape: Sequence[int]) -> tuple[int, int]:
    """(H, W) of the input of a fitted piece: of a tile at least, where the network sees tiles."""
    if preprocess.resize != "tile":
        return preprocess.size
    return max(shape[0], preprocess.size[0]), max(shape[1], preprocess.size[1])


def windows(preprocess: Preprocess, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Return the pieces of an image (H, W) that may be explained: all of it, or tiles where the network sees tiles."""
    if preprocess.resize != "tile":
        return [(slice(0, shape[0]), slice(0, shape[1]))]
    found = tile_windows(shape, preprocess.size, 0.0)
    return [(slice(top, top + height), slice(left, left + width)) for top, left, height, width in found]
