"""A run's network for other programs, with the proof that it says the same: ONNX, torch.export, OpenVINO, CoreML.

What is exported takes raw pixels already resized, and gives probabilities: normalisation is inside the graph. Resizing
is not, because no two libraries resize alike; ``export.json`` says how it is to be done. Beside the model lies a golden
pair, real images and the answers of PyTorch to them, against which any program can check itself. An export whose
answers differ is not kept; one of less precision says what it loses on the held-out images.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from r2kit.data.datamodule import DataModule
from r2kit.errors import DataError, RunError, did_you_mean
from r2kit.export import formats
from r2kit.export.accuracy import Loss, fixed_size, measure_losses
from r2kit.export.detector import DeployedDetector, detector_to_onnx, largest_difference, plain_detector
from r2kit.export.formats import FILES, PRECISIONS, Answer, Facts, file_name
from r2kit.export.network import UNIT, Deployed, any_size, fold_batch_norm, trace
from r2kit.run import Run, write_atomic

__all__ = ["FILES", "PRECISIONS", "Exported", "export"]

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest difference of a probability from PyTorch's with which an export is kept, by precision."""
MOST_LOST = 0.05
"""Loss of the headline figure with which an export of less precision is not kept, where it is shown to be so large."""

_GOLDEN = 4  # images
_CALIBRATION = 64  # validation images that the ranges of 8-bit integers are taken from
_BATCHES = (1, 8)  # of which the latency is measured
_ROUNDS = 7


@dataclass(frozen=True)
class Exported:
    """One exported file and how it compares with PyTorch.

    Attributes:
        format: One of `FILES`.
        precision: ``fp32``, ``fp16`` or ``int8``.
        file: Its name.
        difference: Largest difference of a probability from PyTorch's, over the golden images and, where it takes
            any size, over random ones of other sizes and batches. None where nothing here can run it.
        megabytes: Size of all its files.
        milliseconds: Median time of a batch on this machine's CPU, by batch.
        loss: What it loses; None in fp32, which loses nothing.
    """

    format: str
    precision: str
    file: str
    difference: float | None
    megabytes: float
    milliseconds: dict[int, float]
    loss: Loss | None = None


def export(
    run: Run,
    to: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    *,
    out: str | Path | None = None,
) -> list[Exported]:
    """Export a run's network, and keep only what agrees with PyTorch.

    Args:
        run: A finished run.
        to: Names in `FILES`.
        precisions: ``fp32``, ``fp16``, ``int8``; each format is written in each.
        out: Folder; by default ``export`` in the run's folder.

    Returns:
        One for each format and precision, in the order given. The same is in ``export.json``, with bands, classes and
        how images are to be resized; ``golden_input.npy`` and ``golden_output.npy`` lie beside it.

    Raises:
        RunError: If a format, a precision or the task cannot be exported, the folder cannot be written, or an export
            does not agree.
        DataError: If the run's images, of which the golden pair is made, are gone.
        MissingExtraError: If a format needs a package that is not installed.
    """
    _check(run, to, precisions)
    folder = run.path / "export" if out is None else Path(out)
    module = run.datamodule()
    module.setup()
    pixels = _raw_pixels(module, np.concatenate([module.split.test, module.split.val, module.split.train])[:_GOLDEN])
    detector = run.recipe.task.kind in ("detection", "instance")  # which fills images up to whole cells by itself
    if any(side % UNIT for side in pixels.shape[2:]) and not detector:
        raise DataError(
            f"{run.path}: the network sees {pixels.shape[2]}x{pixels.shape[3]} pixels; an export is made for "
            f"multiples of {UNIT}"
        )
    write = _write_detector if detector else _write_all
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as draft, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters deprecate parts of themselves in every release
            made, facts = write(run, module, pixels, to, precisions, Path(draft))
            for file in sorted(Path(draft).iterdir()):
                if file.is_dir() and (folder / file.name).is_dir():  # a CoreML package of an earlier export
                    shutil.rmtree(folder / file.name)
                os.replace(file, folder / file.name)
        description = {**_description(run), **facts, "exports": [asdict(one) for one in made]}
        write_atomic(folder / "export.json", json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; give another --out") from None
    return made


def _check(run: Run, to: Sequence[str], precisions: Sequence[str]) -> None:
    """Refuse what cannot be exported before anything is done."""
    kind = run.recipe.task.kind
    for name in to:
        if name not in FILES:
            raise RunError(f"--to: '{name}' is none of {', '.join(FILES)}{did_you_mean(name, FILES)}")
    known = PRECISIONS["onnx"]
    for precision in precisions:
        if precision not in known:
            raise RunError(f"--precision: '{precision}' is none of {', '.join(known)}{did_you_mean(precision, known)}")
    if kind in ("detection", "instance") and (set(to) != {"onnx"} or set(precisions) != {"fp32"}):
        raise RunError(
            f"{run.path}: a detector is exported to onnx in fp32 alone; how many boxes it finds is known only when it "
            "runs, which torch.export cannot trace; take --to onnx"
        )
    for name in to:
        for precision in precisions:
            if precision not in PRECISIONS[name]:
                raise RunError(f"--precision: {name} has no {precision} here, only {', '.join(PRECISIONS[name])}")
            formats.require_packages(name, precision)


def _raw_pixels(module: DataModule, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Images (N, C, H, W) at the network's size, raw."""
    prepare = fixed_size(module.preprocess)
    images = [prepare.fit(module.source.read(int(row))).float() for row in rows]
    stacked: NDArray[np.float32] = torch.stack(images).numpy()
    return stacked


def _facts(run: Run) -> Facts:
    """What every file carries in its metadata."""
    pre = run.preprocess
    return {"classes": pre.classes, "bands": pre.bands, "size": pre.size, "resize": pre.resize, "run": run.info["id"]}


def _write_all(
    run: Run, module: DataModule, pixels: NDArray[np.float32], to: Sequence[str], precisions: Sequence[str], draft: Path
) -> tuple[list[Exported], dict[str, Any]]:
    """Write every format in every precision, compare, and measure what is lost."""
    several = run.recipe.task.kind == "multilabel"
    plain = _plain(Deployed(run.model(), run.preprocess, several=several).eval())
    shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
    folded, count, left = fold_batch_norm(run.model(), shape)
    program = trace(Deployed(folded, run.preprocess, several=several).eval(), pixels)
    half = None
    if "fp16" in precisions and set(to) & {"onnx", "torch-export"}:
        half = trace(Deployed(folded, run.preprocess, several=several, half=True).eval(), pixels)
    images = _raw_pixels(module, _calibration_rows(module)) if "int8" in precisions else None
    sizes = any_size(program) and (half is None or any_size(half))
    made: list[Exported] = []
    answers: dict[str, Answer] = {}
    for name in to:
        for precision in precisions:
            file = draft / file_name(name, precision)
            answer = _write_one(name, precision, program, half, images, file, _facts(run))
            made.append(_compared(run, name, precision, file, answer, plain, _tried(pixels, sizes)))
            if precision != "fp32" and answer is not None:
                answers[file.name] = answer
    losses = measure_losses(run, module, plain, answers) if answers else {}
    for file_of, loss in losses.items():
        if loss.high < -MOST_LOST:
            raise RunError(
                f"{run.path}: {file_of} loses {loss.words()} of {loss.figure} on {loss.images} {loss.split} images, "
                f"shown to be more than {100 * MOST_LOST:g}; nothing was written"
            )
    np.save(draft / "golden_input.npy", pixels)
    np.save(draft / "golden_output.npy", plain(pixels))
    facts = {"any_batch": True, "any_size": any_size(program), "batch_norm": {"folded": count, "left": left}}
    return [replace(one, loss=losses.get(one.file)) for one in made], facts


def _calibration_rows(module: DataModule) -> NDArray[np.int64]:
    """Validation images, spread over all of them; training images where there are none."""
    rows = module.split.val if len(module.split.val) else module.split.train
    chosen: NDArray[np.int64] = rows[
        np.linspace(0, len(rows), min(_CALIBRATION, len(rows)), endpoint=False).astype(int)
    ]
    return chosen


def _plain(network: Deployed) -> Answer:
    """PyTorch's own answers."""

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = network(torch.from_numpy(pixels)).numpy()
        return found

    return answer


def _write_one(
    name: str,
    precision: str,
    program: ExportedProgram,
    half: ExportedProgram | None,
    images: NDArray[np.float32] | None,
    file: Path,
    facts: Facts,
) -> Answer | None:
    """Write one file; what answers from it, None where nothing here can run it."""
    chosen = half if precision == "fp16" and half is not None else program
    if name == "onnx" and precision == "int8":
        assert images is not None
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model.onnx"
            formats.to_onnx(program, source, facts)
            return formats.onnx_int8(source, file, facts, images)
    if name == "onnx":
        return formats.to_onnx(chosen, file, facts)
    if name == "torch-export":
        return formats.to_torch_export(chosen, file, facts)
    if name == "openvino":
        return formats.to_openvino(program, file, facts, precision, images)
    return formats.to_coreml(program, file, facts, precision)


def _tried(pixels: NDArray[np.float32], sizes: bool) -> list[NDArray[np.float32]]:
    """Inputs to compare on: the golden images, one alone, and random ones of other sizes and batches."""
    tried = [pixels, pixels[:1]]
    if sizes:
        rng = np.random.default_rng(0)
        low, high = float(pixels.min()), float(pixels.max())
        for batch, height, width in ((1, 64, 96), (3, 96, 64)):
            tried.append(rng.uniform(low, high, (batch, pixels.shape[1], height, width)).astype(np.float32))
    return tried


def _compared(
    run: Run,
    name: str,
    precision: str,
    file: Path,
    answer: Answer | None,
    plain: Answer,
    tried: Sequence[NDArray[np.float32]],
) -> Exported:
    """Compare what a file answers with PyTorch."""
    size = _megabytes(file)
    if answer is None:
        return Exported(name, precision, file.name, None, size, {})
    # Random pixels show whether other sizes work; how 8 bits round is only of interest on real images.
    inputs = tried if precision != "int8" else tried[:2]
    for some in tried:
        answer(some)
    difference = max(float(np.abs(answer(some) - plain(some)).max()) for some in inputs)
    _refuse_difference(run, f"{name} in {precision}", difference, TOLERANCE.get(precision, 1.0))
    return Exported(name, precision, file.name, difference, size, _latency(lambda images: answer(images), tried[0]))


def _refuse_difference(run: Run, what: str, difference: float, tolerance: float) -> None:
    """Fail loudly where parity fails; NaN fails too."""
    if not difference <= tolerance:
        raise RunError(
            f"{run.path}: the export to {what} differs from PyTorch by {difference:.2g}, more than {tolerance:g} is "
            "not kept; nothing was written"
        )


def _write_detector(
    run: Run, module: DataModule, pixels: NDArray[np.float32], to: Sequence[str], precisions: Sequence[str], draft: Path
) -> tuple[list[Exported], dict[str, Any]]:
    """Write a detector to ONNX, compare, and describe its outputs."""
    network = DeployedDetector(run.model(), run.preprocess).eval()
    masks = run.recipe.task.kind == "instance"
    plain, file = plain_detector(network), draft / file_name("onnx", "fp32")
    find = detector_to_onnx(network, pixels, file, _facts(run), masks=masks)
    images = [pixels[i : i + 1] for i in range(len(pixels))]
    images.append(np.concatenate([pixels[:1], pixels[:1, :, ::-1][:, :, :UNIT]], axis=2))  # another size
    images.append(np.full_like(pixels[:1], pixels.mean()))  # most likely without an object
    difference = max(largest_difference(find(image), plain(image)) for image in images)
    _refuse_difference(run, "onnx in fp32", difference, TOLERANCE["fp32"])
    boxes, labels, scores, *outlines = plain(pixels[:1])
    np.save(draft / "golden_input.npy", pixels[:1])
    np.save(draft / "golden_output.npy", np.concatenate([boxes, labels[:, None], scores[:, None]], axis=1))
    output = "boxes: float32 (objects, 4) x0, y0, x1, y1 in pixels; labels: int64, position in classes; scores"
    golden = "golden_output.npy holds x0, y0, x1, y1, label, score"
    if masks:
        np.save(draft / "golden_masks.npy", outlines[0])
        output += "; masks: float32 (objects, height, width), probabilities"
        golden += ", and golden_masks.npy the masks"
    golden += "; the tolerance is that of scores, of corners in units of 100 pixels and of a mask's probabilities"
    times = _latency(lambda image: find(image), pixels, batches=(1,))
    facts = {
        "input": "pixels: float32 (1, bands, height, width), raw values, resized; normalisation is in the graph",
        "output": f"{output}; {golden}",
        "any_batch": False,
        "any_size": True,
        "batch_norm": {"folded": 0, "left": "all; ONNX Runtime folds them when it loads the file"},
    }
    return [Exported("onnx", "fp32", file.name, difference, _megabytes(file), times)], facts


def _megabytes(file: Path) -> float:
    """Size of a file and of what lies beside it under its name."""
    beside = [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file, file.with_name(f"{file.name}.data")]
    paths = [inner for path in beside for inner in (path.rglob("*") if path.is_dir() else [path])]
    return round(sum(path.stat().st_size for path in paths if path.is_file()) / 1e6, 3)


def _latency(
    answer: Callable[[NDArray[np.float32]], Any], pixels: NDArray[np.float32], batches: Sequence[int] = _BATCHES
) -> dict[int, float]:
    """Median milliseconds of a batch, by batch."""
    found = {}
    for batch in batches:
        images = np.resize(pixels, (batch, *pixels.shape[1:]))
        answer(images)
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            answer(images)
            seconds.append(time.perf_counter() - start)
        found[batch] = round(1000 * statistics.median(seconds), 3)
    return found


def _description(run: Run) -> dict[str, Any]:
    """The contents of export.json but for the exports."""
    pre = run.preprocess
    return {
        "run": run.info["id"],
        "task": run.recipe.task.kind,
        "model": run.recipe.model.name,
        "input": "pixels: float32 (batch, bands, height, width), raw values, resized; normalisation is in the graph",
        "output": "probabilities: float32 (batch, classes), for maps (batch, classes, height, width)",
        "classes": list(pre.classes),
        "bands": list(pre.bands),
        "size": list(pre.size),
        "resize": pre.resize,
        "interpolation": f"{pre.interpolation}, averaging over what it shrinks (antialias)",
        "nodata": pre.nodata,
        "nodata_becomes": [mean * pre.scale for mean in pre.mean],
        "tolerance": TOLERANCE["fp32"],
        "versions": run.info["versions"],
    }
