"""One function for each format: write a traced network, load what was written, and return what answers from it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from r2kit.errors import MissingExtraError, require

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2", "openvino": "openvino.xml", "coreml": "model.mlpackage"}
"""Name of each format and its file."""

PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8"),
    "torch-export": ("fp32", "fp16"),
    "openvino": ("fp32", "fp16", "int8"),
    "coreml": ("fp32", "fp16"),
}
"""What each format can be exported in."""

Answer = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Facts = dict[str, Any]
"""Classes, bands and more, as they go into the metadata of a file."""


def file_name(form: str, precision: str) -> str:
    """Return the name of the file of a format in a precision."""
    stem, _, suffix = FILES[form].rpartition(".")
    return FILES[form] if precision == "fp32" else f"{stem}_{precision}.{suffix}"


def require_packages(form: str, precision: str) -> None:
    """Refuse what cannot be written here.

    Raises:
        MissingExtraError: If a package is not installed.
    """
    if form == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, module, "export", "export to onnx")
    if form == "openvino":
        require("openvino", "openvino", "export", "export to openvino")
        if precision == "int8":
            require("nncf", "nncf", "export", "export to openvino in int8")
    if form == "coreml":
        try:
            require("coremltools", "coremltools", "export", "export to coreml")
        except MissingExtraError as error:  # it is part of no extra: it follows torch a year behind
            error.args = ("export to coreml needs coremltools, which is not installed: pip install coremltools",)
            raise


def to_onnx(program: ExportedProgram, file: Path, facts: Facts) -> Answer:
    """Write ONNX with the facts in its metadata."""
    made = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["pixels"], output_names=["probabilities"]
    )
    assert made is not None  # with dynamo=True it never is
    save_onnx(made.model_proto, file, facts)
    return run_onnx(file)


def save_onnx(model: Any, file: Path, facts: Facts) -> None:
    """Write an ONNX model with the facts in its metadata."""
    import onnx

    onnx.helper.set_model_props(model, {f"r2kit.{key}": json.dumps(value) for key, value in facts.items()})
    onnx.save(model, file)


def run_onnx(file: Path) -> Answer:
    """What ONNX Runtime answers from a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(None, {"pixels": pixels})[0]
        return found

    return answer


def onnx_int8(source: Path, file: Path, facts: Facts, images: NDArray[np.float32]) -> Answer:
    """Write ONNX whose convolutions and matrix products work on 8-bit integers, calibrated on raw images (N, C, H, W).

    Weights have 7 bits, so that processors without 8-bit dot products cannot overflow 16 bits on the way.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        """One image at a time."""

        def __init__(self) -> None:
            self.left: Iterator[NDArray[np.float32]] = iter(images)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            """The next image, None after the last."""
            image = next(self.left, None)
            return None if image is None else {"pixels": image[None]}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(file),
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    save_onnx(onnx.load(file), file, facts)
    return run_onnx(file)


def to_torch_export(program: ExportedProgram, file: Path, facts: Facts) -> Answer:
    """Write torch's own archive with the facts in its file r2kit.json."""
    torch.export.save(program, file, extra_files={"r2kit.json": json.dumps(facts)})
    module = torch.export.load(file).module()

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = module(torch.from_numpy(pixels)).numpy()
        return found

    return answer


def to_openvino(
    program: ExportedProgram, file: Path, facts: Facts, precision: str, images: NDArray[np.float32] | None = None
) -> Answer:
    """Write OpenVINO's pair of files: full weights, half weights, or 8-bit integers calibrated on raw images."""
    import openvino

    model = openvino.convert_model(program)
    if precision == "int8":
        assert images is not None
        import nncf

        nncf.set_log_level(40)
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars have no other switch
            model = nncf.quantize(model, nncf.Dataset([image[None] for image in images]), subset_size=len(images))
    for key, value in facts.items():
        model.set_rt_info(json.dumps(value), ["r2kit", key])
    openvino.save_model(model, file, compress_to_fp16=precision == "fp16")
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = compiled(pixels)[0].copy()
        return found

    return answer


def to_coreml(program: ExportedProgram, file: Path, facts: Facts, precision: str) -> Answer | None:
    """Write a CoreML package; what answers from it, or None off macOS, where nothing can run it."""
    import coremltools

    model = coremltools.convert(
        program.run_decompositions({}),
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=getattr(coremltools.precision, "FLOAT16" if precision == "fp16" else "FLOAT32"),
    )
    model.user_defined_metadata.update({f"r2kit.{key}": json.dumps(value) for key, value in facts.items()})
    model.save(str(file))
    if sys.platform != "darwin":
        return None
    loaded = coremltools.models.MLModel(str(file))
    output = loaded.get_spec().description.output[0].name

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.asarray(loaded.predict({"pixels": pixels})[output], dtype=np.float32)
        return found

    return answer
