"""A run's network asked about images: the evidence for a class, and the pictures that show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2kit import plots
from r2kit.data.preprocess import Preprocess
from r2kit.data.reader import RGB, choose_bands
from r2kit.draw import GIVEN, draw_boxes
from r2kit.errors import DataError, ModelError, require
from r2kit.explain.methods import METHODS, OF_PIXELS, Method, evidence, target_layer
from r2kit.explain.question import Question, allowed_class, as_input, ask, mask_as_input, windows
from r2kit.inference import choose_device
from r2kit.run import Run

_BRIGHTEST = 0.995  # of the pixels of a map that is as sharp as they are; the few above would darken all others


@dataclass(frozen=True)
class Look:
    """The evidence for one class in one image, or in the tile of it where the answer is strongest.

    Attributes:
        question: The class, and what the network answers.
        window: Rows and columns of the image that the network saw.
        image: (1, C, h, w), the network's input, on its device.
        heat: (h, w) in [0, 1] over it.
        picture: (h, w, 3) uint8, the network's input.
        overlay: (h, w, 3) uint8, the same under its evidence; with the box that is explained.
    """

    question: Question
    window: tuple[slice, slice]
    image: Tensor
    heat: NDArray[np.float32]
    picture: NDArray[np.uint8]
    overlay: NDArray[np.uint8]

    @property
    def share_of_sides(self) -> NDArray[np.float32] | None:
        """The box in shares of the sides of the input, which another run's input of another size has too."""
        if self.question.box is None:
            return None
        height, width = self.heat.shape
        return (self.question.box / np.array([width, height] * 2)).astype(np.float32)


class Explainer:
    """A finished run's network on its device.

    Args:
        run: The run.
        method: How the evidence is found, see `methods.evidence`; None takes Grad-CAM, and HiResCAM for a detector.
        bands: Three bands that are shown as red, green and blue, or one as grey, by name or position from 1; None
            shows what `Preprocess.denormalize` does.
        device: See `inference.choose_device`.

    Raises:
        MissingExtraError: If captum is not installed.
        DataError: If there is no such band.
        ModelError: If the method does not apply to the run's task.
    """

    def __init__(
        self,
        run: Run,
        *,
        method: Method | None = None,
        bands: Sequence[str | int] | None = None,
        device: str = "auto",
    ) -> None:
        require("captum", "captum", "explain", "r2kit explain")
        self.run = run
        self.method = method_for(run, method)
        self.preprocess = run.preprocess
        self.classes = run.preprocess.classes
        self.shown = None if bands is None else _positions(bands, self.preprocess)
        self.device = choose_device(device)
        self.model = run.model().eval().to(self.device, torch.float32)

    def look(
        self,
        raw: NDArray[Any],
        wanted: str | None = None,
        near: NDArray[np.float32] | None = None,
        *,
        tiles: int | None = None,
    ) -> Look | None:
        """Explain one image.

        Args:
            raw: (H, W, C) raw pixels with the run's bands.
            wanted: The class; by default the predicted one.
            near: A detection: see `question.ask`.
            tiles: Of an image that the network sees in tiles, at most so many, evenly spread; None looks at all.

        Returns:
            None where there is nothing to explain, see `question.ask`.

        Raises:
            ModelError: If there is no such class.
        """
        if wanted is not None:
            allowed_class(wanted, self.classes, "--target")
        best: tuple[Question, tuple[slice, slice], Tensor] | None = None
        places = windows(self.preprocess, (raw.shape[0], raw.shape[1]))
        for window in places if tiles is None else places[:: -(-len(places) // tiles)]:
            image = as_input(self.preprocess, raw[window]).to(self.device)
            question = ask(self.model, self.run.recipe, self.classes, image, wanted=wanted, near=near)
            if question is not None and (best is None or question.strength > best[0].strength):
                best = question, window, image
        if best is None:
            return None
        question, window, image = best
        layer = None
        if self.method not in ("integrated-gradients", "occlusion"):
            layer = target_layer(self.model, (image.shape[-2], image.shape[-1]))
        target = torch.tensor([question.target], device=self.device)
        heat = evidence(question.scores, image, target, method=self.method, layer=layer)[0]
        picture = self.picture(image[0])
        overlay = plots.overlay(picture, bright(heat, self.method))
        if question.box is not None:
            overlay = draw_boxes(overlay, question.box[None], [GIVEN])
        return Look(question, window, image, heat, picture, overlay)

    def mask(self, mask: NDArray[np.bool_], window: tuple[slice, slice]) -> NDArray[np.bool_]:
        """Bring a mask (H, W) of an image to the places of the heat (h, w) of a look at it."""
        return mask_as_input(self.preprocess, mask[window])

    def picture(self, image: Tensor) -> NDArray[np.uint8]:
        """Return the network's input (C, h, w) as a person sees it, (h, w, 3) uint8."""
        if self.shown is None:
            return plots.to_uint8(self.preprocess.denormalize(image).cpu().numpy())
        kept = [self.shown[i % len(self.shown)] for i in range(3)]
        composite = dataclasses.replace(
            self.preprocess,
            bands=RGB,
            mean=tuple(self.preprocess.mean[i] for i in kept),
            std=tuple(self.preprocess.std[i] for i in kept),
        )
        return plots.to_uint8(composite.denormalize(image[kept]).cpu().numpy())


def method_for(run: Run, method: Method | None = None) -> Method:
    """Return the method that is used for a run.

    Raises:
        ModelError: If the one that was asked for does not apply to the run's task.
    """
    boxes = run.recipe.task.kind in ("detection", "instance")
    if boxes and method in ("gradcam", "guided-gradcam"):
        others = ", ".join(name for name in METHODS if name not in ("gradcam", "guided-gradcam"))
        raise ModelError(
            f"--method: {method} averages gradients over the whole image, which says little about one box; for a "
            f"{run.recipe.task.kind} use {others}"
        )
    return method or ("hirescam" if boxes else "gradcam")


def bright(heat: NDArray[np.float32], method: Method) -> NDArray[np.float32]:
    """Return a map as it is shown: one of pixels without its few brightest ones."""
    if method not in OF_PIXELS:
        return heat
    top = float(np.quantile(heat, _BRIGHTEST))
    return np.clip(heat / top, 0.0, 1.0).astype(np.float32) if top > 0 else heat


def _positions(bands: Sequence[str | int], preprocess: Preprocess) -> list[int]:
    """Positions of the bands that are shown."""
    if len(bands) not in (1, 3):
        raise DataError(f"--bands: one band (grey) or three (red, green, blue) are shown, got {len(bands)}")
    return [preprocess.bands.index(name) for name in choose_bands(bands, preprocess.bands, "--bands")]


def energy_inside(heat: NDArray[np.float32], mask: NDArray[np.bool_]) -> float | None:
    """Return the share of a map's evidence that lies inside an object: the energy-based pointing game.

    Args:
        heat: (h, w), not negative.
        mask: (h, w), the object.

    Returns:
        In [0, 1]; None where there is no evidence or no object.

    Source: Wang et al. 2020, arXiv:1910.01279, sec. 4.3.
    """
    total = float(heat.sum(dtype=np.float64))
    if total <= 0.0 or not mask.any():
        return None
    return float(heat[mask].sum(dtype=np.float64)) / total


def pointed_inside(heat: NDArray[np.float32], mask: NDArray[np.bool_]) -> bool | None:
    """Return whether the brightest point of a map lies inside an object: the pointing game.

    Args:
        heat: (h, w), not negative.
        mask: (h, w), the object.

    Returns:
        None where there is no evidence or no object.

    Source: Zhang et al. 2016, arXiv:1608.00507, sec. 4.
    """
    if float(heat.max()) <= 0.0 or not mask.any():
        return None
    return bool(mask[np.unravel_index(int(heat.argmax()), heat.shape)])
