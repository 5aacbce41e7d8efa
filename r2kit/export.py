"""A run's network for other programs, with the proof that it says the same: ONNX, torch.export, OpenVINO.

What is exported takes raw pixels already resized, and gives probabilities: normalisation is inside the graph. Resizing
is not, because no two libraries resize alike; ``export.json`` says how it is to be done. Beside the model lies a golden
pair, real images and the answers of PyTorch to them, against which any program can check itself. An export whose
answers differ is not kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from r2kit.data.preprocess import Preprocess
from r2kit.errors import DataError, RunError, did_you_mean, require
from r2kit.run import Run, write_atomic

FORMATS = {"onnx": "model.onnx", "torch-export": "model.pt2", "openvino": "openvino.xml"}
"""Name of each format and its file."""

TOLERANCE = 1e-4
"""Largest difference of a probability from PyTorch's with which an export is kept."""

_UNIT = 32  # the sides of images are multiples of it
_GOLDEN = 4  # images
_BATCHES = (1, 8)  # of which the latency is measured
_ROUNDS = 7

Answer = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Deployed(nn.Module):
    """A network from raw pixels to probabilities.

    Args:
        model: (B, C, H, W), normalised, -> logits (B, K) or (B, K, H, W).
        preprocess: The run's.
        several: Whether an image may have several labels: sigmoid in place of softmax.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module, preprocess: Preprocess, *, several: bool = False) -> None:
        super().__init__()
        self.model = model
        self.several = several
        factor = [1.0 / (preprocess.scale * std) for std in preprocess.std]
        offset = [mean / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True)]
        self.register_buffer("factor", torch.tensor(factor)[:, None, None])
        self.register_buffer("offset", torch.tensor(offset)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Map raw pixels (B, C, H, W), float32, to probabilities (B, K) or (B, K, H, W)."""
        logits = self.model(pixels * self.factor - self.offset)
        return logits.sigmoid() if self.several else logits.softmax(1)


@dataclass(frozen=True)
class Exported:
    """One exported file and how it compares with PyTorch.

    Attributes:
        format: One of `FORMATS`.
        file: Its name.
        difference: Largest difference of a probability from PyTorch's, over the golden images and, where it takes
            any size, over random ones of other sizes and batches.
        megabytes: Size of all its files.
        milliseconds: Median time of a batch of 1 and of 8 images on this machine's CPU, by batch.
    """

    format: str
    file: str
    difference: float
    megabytes: float
    milliseconds: dict[int, float]


def export(run: Run, formats: Sequence[str] = ("onnx",), *, out: str | Path | None = None) -> list[Exported]:
    """Export a run's network, and keep only what agrees with PyTorch.

    Args:
        run: A finished classification or segmentation.
        formats: Names in `FORMATS`.
        out: Folder; by default ``export`` in the run's folder.

    Returns:
        One for each format, in the order given. The same is in ``export.json``, with bands, classes and how images are
        to be resized; ``golden_input.npy`` and ``golden_output.npy`` lie beside it.

    Raises:
        RunError: If a format or the task is unknown, the folder cannot be written, or an export does not agree.
        DataError: If the run's images, of which the golden pair is made, are gone.
        MissingExtraError: If a format needs a package that is not installed.
    """
    _check(run, formats)
    folder = run.path / "export" if out is None else Path(out)
    network = Deployed(run.model(), run.preprocess, several=run.recipe.task.kind == "multilabel").eval()
    pixels = _golden_pixels(run)
    plain = _plain(network)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as draft, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters deprecate parts of themselves in every release
            program = _program(network, pixels)
            made = [_export_one(name, program, network, plain, pixels, run, Path(draft)) for name in formats]
            np.save(Path(draft) / "golden_input.npy", pixels)
            np.save(Path(draft) / "golden_output.npy", plain(pixels))
            for file in sorted(Path(draft).iterdir()):
                os.replace(file, folder / file.name)
        write_atomic(folder / "export.json", json.dumps(_description(run, made, _any_size(program)), indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; give another --out") from None
    return made


def _check(run: Run, formats: Sequence[str]) -> None:
    """Refuse what cannot be exported before anything is done."""
    kind = run.recipe.task.kind
    if kind not in ("classification", "multilabel", "segmentation"):
        raise RunError(f"{run.path}: export knows classification and segmentation, and this run is of {kind}")
    for name in formats:
        if name not in FORMATS:
            raise RunError(f"--to: '{name}' is none of {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    if "onnx" in formats:
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, module, "export", "export to onnx")
    if "openvino" in formats:
        require("openvino", "openvino", "export", "export to openvino")


def _golden_pixels(run: Run) -> NDArray[np.float32]:
    """Held-out images (N, C, H, W) at the network's size, raw."""
    module = run.datamodule()
    module.setup()
    rows = np.concatenate([module.split.test, module.split.val, module.split.train])[:_GOLDEN]
    prepare = module.preprocess
    if prepare.resize == "tile":  # such images have no one size
        prepare = dataclasses.replace(prepare, resize="crop")
    images = [prepare.fit(module.source.read(int(row))).float() for row in rows]
    stacked: NDArray[np.float32] = torch.stack(images).numpy()
    if any(side % _UNIT for side in stacked.shape[2:]):
        raise DataError(
            f"{run.path}: the network sees {stacked.shape[2]}x{stacked.shape[3]} pixels; an export is made for "
            f"multiples of {_UNIT}"
        )
    return stacked


def _plain(network: Deployed) -> Answer:
    """PyTorch's own answers."""

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = network(torch.from_numpy(pixels)).numpy()
        return found

    return answer


def _program(network: Deployed, pixels: NDArray[np.float32]) -> ExportedProgram:
    """Trace the network for any batch; for any size too, where the network can and sees more than one cell."""
    example = torch.zeros(2, *pixels.shape[1:])
    batch = Dim("batch", min=1, max=4096)
    sizes = {2: _UNIT * Dim("rows", min=2, max=256), 3: _UNIT * Dim("columns", min=2, max=256)}
    with torch.no_grad():
        if min(pixels.shape[2:]) >= 2 * _UNIT:  # torch.export makes a graph of its own for a map of one cell
            try:
                return torch.export.export(network, (example,), dynamic_shapes=({0: batch, **sizes},))
            except Exception:  # its errors have no class in common: here, a network whose graph depends on the size
                pass
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def _any_size(program: ExportedProgram) -> bool:
    """Whether the program takes images of any size."""
    shape = next(node for node in program.graph.nodes if node.name == "pixels").meta["val"].shape
    return not isinstance(shape[2], int)


def _export_one(
    name: str,
    program: ExportedProgram,
    network: Deployed,
    plain: Answer,
    pixels: NDArray[np.float32],
    run: Run,
    folder: Path,
) -> Exported:
    """Write one format into a folder, run it, and compare."""
    file = folder / FORMATS[name]
    answer = {"onnx": _to_onnx, "torch-export": _to_torch_export, "openvino": _to_openvino}[name](program, file, run)
    rng = np.random.default_rng(0)
    tried = [pixels, pixels[:1]]
    if _any_size(program):
        low, high = float(pixels.min()), float(pixels.max())
        for batch, height, width in ((1, 64, 96), (3, 96, 64)):
            tried.append(rng.uniform(low, high, (batch, pixels.shape[1], height, width)).astype(np.float32))
    difference = max(float(np.abs(answer(some) - plain(some)).max()) for some in tried)
    if not difference <= TOLERANCE:
        raise RunError(
            f"{run.path}: the export to {name} differs from PyTorch by {difference:.2g}, more than {TOLERANCE:g} is "
            "not kept; nothing was written"
        )
    size = sum(path.stat().st_size for path in folder.glob(f"{file.stem}.*" if name == "openvino" else f"{file.name}*"))
    return Exported(name, file.name, difference, round(size / 1e6, 3), _latency(answer, pixels))


def _to_onnx(program: ExportedProgram, file: Path, run: Run) -> Answer:
    """Write ONNX with classes and bands in its metadata."""
    import onnx
    import onnxruntime

    made = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["pixels"], output_names=["probabilities"]
    )
    assert made is not None  # with dynamo=True it never is
    model = made.model_proto
    pre = run.preprocess
    facts = {"classes": pre.classes, "bands": pre.bands, "size": pre.size, "resize": pre.resize, "run": run.info["id"]}
    onnx.helper.set_model_props(model, {f"r2kit.{key}": json.dumps(value) for key, value in facts.items()})
    onnx.save(model, file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(None, {"pixels": pixels})[0]
        return found

    return answer


def _to_torch_export(program: ExportedProgram, file: Path, run: Run) -> Answer:
    """Write torch's own archive."""
    torch.export.save(program, file)
    module = torch.export.load(file).module()

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = module(torch.from_numpy(pixels)).numpy()
        return found

    return answer


def _to_openvino(program: ExportedProgram, file: Path, run: Run) -> Answer:
    """Write OpenVINO's pair of files, weights in full precision."""
    import openvino

    model = openvino.convert_model(program)
    openvino.save_model(model, file, compress_to_fp16=False)
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = compiled(pixels)[0].copy()
        return found

    return answer


def _latency(answer: Answer, pixels: NDArray[np.float32]) -> dict[int, float]:
    """Median milliseconds of a batch, by batch."""
    found = {}
    for batch in _BATCHES:
        images = np.resize(pixels, (batch, *pixels.shape[1:]))
        answer(images)
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            answer(images)
            seconds.append(time.perf_counter() - start)
        found[batch] = round(1000 * statistics.median(seconds), 3)
    return found


def _description(run: Run, made: Sequence[Exported], any_size: bool) -> dict[str, Any]:
    """The contents of export.json."""
    pre = run.preprocess
    return {
        "run": run.info["id"],
        "task": run.recipe.task.kind,
        "model": run.recipe.model.name,
        "input": "pixels: float32 (batch, bands, height, width), raw values, resized; normalisation is in the graph",
        "output": "probabilities: float32 (batch, classes), for a segmentation (batch, classes, height, width)",
        "classes": list(pre.classes),
        "bands": list(pre.bands),
        "size": list(pre.size),
        "resize": pre.resize,
        "any_size": any_size,
        "interpolation": f"{pre.interpolation}, averaging over what it shrinks (antialias)",
        "nodata": pre.nodata,
        "nodata_becomes": [mean * pre.scale for mean in pre.mean],
        "tolerance": TOLERANCE,
        "versions": run.info["versions"],
        "exports": [asdict(one) for one in made],
    }
