"""A detector as ONNX, through torch's older exporter.

The exporter that everything else goes through cannot trace a detector: how many boxes are left is known only when it
runs, and torchvision branches on it (torch 2.14, torchvision 0.29: "Could not guard on data-dependent expression
4*u1 > 4000" in torchvision/ops/boxes.py, batched_nms). The older one, which torchvision is written
for, traces the whole detector with its non-maximum suppression and the pasting of masks, for one image of any size.
OpenVINO 2026.4 reads that file and finds the same objects, but where nothing is found it answers with one object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2kit.export.formats import Facts, save_onnx
from r2kit.export.network import Deployed

OUTPUTS = ("boxes", "labels", "scores")
"""What every detector gives out; one of instances also gives ``masks``."""
_OPSET = 17
Found = tuple[NDArray[Any], ...]
"""Boxes (N, 4), labels (N,), scores (N,) and, of instances, masks (N, H, W)."""


class DeployedDetector(Deployed):
    """A detector from the raw pixels of one image to boxes, and masks where it has them."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Map raw pixels (1, C, H, W) to boxes (N, 4) in pixels, labels (N,) from 0, scores (N,) and masks (N, H, W).

        Masks are probabilities, over the whole image.
        """
        found = self.model(pixels * self.factor - self.offset)[0]
        boxes = found["boxes"], found["labels"] - 1, found["scores"]
        return (*boxes, found["masks"]) if "masks" in found else boxes


def detector_to_onnx(
    network: DeployedDetector, pixels: NDArray[np.float32], file: Path, facts: Facts, *, masks: bool
) -> Any:
    """Write a detector with the facts in its metadata; what ONNX Runtime finds in an image (1, C, H, W)."""
    import onnx
    import onnxruntime

    names = [*OUTPUTS, *(("masks",) if masks else ())]
    # Tracing keeps what it meets: an image in which something is found takes every branch.
    torch.onnx.export(
        network,
        (torch.from_numpy(pixels[:1]),),
        str(file),
        dynamo=False,
        opset_version=_OPSET,
        input_names=["pixels"],
        output_names=names,
        dynamic_axes={"pixels": {2: "rows", 3: "columns"}, **{name: {0: "found"} for name in names}},
    )
    save_onnx(onnx.load(file), file, facts)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def find(image: NDArray[np.float32]) -> Found:
        return tuple(session.run(names, {"pixels": image}))

    return find


def plain_detector(network: DeployedDetector) -> Any:
    """What PyTorch finds in an image (1, C, H, W)."""

    def find(image: NDArray[np.float32]) -> Found:
        with torch.inference_mode():
            return tuple(part.numpy() for part in network(torch.from_numpy(image)))

    return find


def largest_difference(ours: Found, theirs: Found) -> float:
    """Return the largest difference of a score, of a corner as a share of 100 pixels, or of a pixel of a mask.

    It is infinite for other objects, and for masks of another size.

    Each object is compared with the nearest of its class, because objects of equal scores have no order.
    """
    if len(ours[2]) != len(theirs[2]):
        return float("inf")
    worst, left = 0.0, list(range(len(theirs[2])))
    for number, (box, label, score) in enumerate(zip(*ours[:3], strict=True)):
        same = [i for i in left if theirs[1][i] == label]
        if not same:
            return float("inf")
        gaps = [max(float(np.abs(theirs[0][i] - box).max()) / 100, abs(float(theirs[2][i] - score))) for i in same]
        nearest = same[int(np.argmin(gaps))]
        left.remove(nearest)
        worst = max(worst, min(gaps))
        if len(ours) > len(OUTPUTS):
            mask, other = ours[3][number], theirs[3][nearest]
            worst = max(worst, float(np.abs(mask - other).max()) if mask.shape == other.shape else float("inf"))
    return worst
