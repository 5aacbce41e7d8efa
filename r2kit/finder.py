"""A trained detector at work: on its device, from the pieces of images to the objects in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2kit.data.tiles import Piece
from r2kit.errors import RunError
from r2kit.inference import choose_device
from r2kit.objects.coco import Objects
from r2kit.objects.detectors import Detector, detect
from r2kit.run import Run


class Finder:
    """A run's detector, always in float32 arithmetic.

    Args:
        run: A finished run of a detection.
        device: Where to run, see `inference.choose_device`.
        batch_size: Pieces at once.
    """

    def __init__(self, run: Run, device: str = "auto", *, batch_size: int) -> None:
        self.batch_size = batch_size
        self.nms_iou = run.recipe.objects.nms_iou
        model = run.model()
        assert isinstance(model, Detector)
        self.model = model.eval().to(choose_device(device), torch.float32)

    @torch.inference_mode()
    def __call__(self, image: Tensor, pieces: Sequence[Sequence[Piece]]) -> list[Objects]:
        """Return the objects of each image, see `r2kit.objects.detectors.detect`."""
        return detect(self.model, image, pieces, batch_size=self.batch_size, nms_iou=self.nms_iou)


def refuse_tta(tta: bool) -> None:
    """Refuse averaging over orientations for a detector.

    Raises:
        RunError: If it is asked for.
    """
    if tta:
        raise RunError(
            "--tta averages probabilities over the eight orientations; boxes have none to average; leave it out"
        )
