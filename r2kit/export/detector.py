"""A detector as ONNX, through torch's older exporter.

The exporter that everything else goes through cannot trace a detector: how many boxes are left is known only when it
runs, and torchvision branches on it (torch 2.14, torchvision 0.29: "Could not guard on data-dependent expression
Eq(4*u1, 0)" in torchvision/ops/boxes.py, _batched_nms_coordinate_trick). The older one, which torchvision is written
for, traces the whole detector with its non-maximum suppression, for one image of any size.
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
_OPSET = 17
Found = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]


class DeployedDetector(Deployed):
    """A detector from the raw pixels of one image to boxes."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Map raw pixels (1, C, H, W) to boxes (N, 4) in pixels, labels (N,) from 0, and scores (N,)."""
        found = self.model(pixels * self.factor - self.offset)[0]
        return found["boxes"], found["labels"] - 1, found["scores"]


def detector_to_onnx(network: DeployedDetector, pixels: NDArray[np.float32], file: Path, facts: Facts) -> Any:
    """Write a detector with the facts in its metadata; what ONNX Runtime finds in an image (1, C, H, W)."""
    import onnx
    import onnxruntime

    names = list(OUTPUTS)
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
        boxes, labels, scores = session.run(names, {"pixels": image})
        return boxes, labels, scores

    return find


def plain_detector(network: DeployedDetector) -> Any:
    """What PyTorch finds in an image (1, C, H, W)."""

    def find(image: NDArray[np.float32]) -> Found:
        with torch.inference_mode():
            boxes, labels, scores = network(torch.from_numpy(image))
        return boxes.numpy(), labels.numpy(), scores.numpy()

    return find


def largest_difference(ours: Found, theirs: Found) -> float:
    """Return the largest difference of a score, or of a corner as a share of 100 pixels; infinite for other objects.

    Each object is compared with the nearest of its class, because objects of equal scores have no order.
    """
    if len(ours[2]) != len(theirs[2]):
        return float("inf")
    worst, left = 0.0, list(range(len(theirs[2])))
    for box, label, score in zip(*ours, strict=True):
        same = [i for i in left if theirs[1][i] == label]
        if not same:
            return float("inf")
        gaps = [max(float(np.abs(theirs[0][i] - box).max()) / 100, abs(float(theirs[2][i] - score))) for i in same]
        left.remove(same[int(np.argmin(gaps))])
        worst = max(worst, min(gaps))
    return worst
