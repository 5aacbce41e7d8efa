"""Weight files as they come: which file a path means, and its tensors, without ever running code from it."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from r2kit.errors import ModelError, did_you_mean

__all__ = ["WEIGHTS_FILE", "few", "read_json_beside", "read_weight_file", "resolve_weight_file"]

WEIGHTS_FILE = "model.safetensors"
_PICKLED = {".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".pkl"}
_CONTAINERS = ("state_dict", "model_state_dict", "model", "model_state", "net", "weights")
_EMA_CONTAINERS = ("model_ema", "state_dict_ema", "ema")


def resolve_weight_file(path: Path) -> Path:
    """Return the weight file that `path` means, or say what is wrong with it."""
    if path.is_dir():
        file = path / WEIGHTS_FILE
        if file.is_file():
            return file
        checkpoints = sorted(path.glob("checkpoints/*.ckpt")) + sorted(path.glob("*.ckpt"))
        if checkpoints:
            raise ModelError(
                f"{path}: the folder holds no {WEIGHTS_FILE} (an unfinished run?): give a checkpoint, {checkpoints[-1]}"
            )
        raise ModelError(f"{path}: the folder holds no {WEIGHTS_FILE}: give the folder of a run, or a weight file")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
        raise ModelError(
            f"{path}: no such weight file{hint}" if siblings else f"{path}: no such weight file, nor its folder"
        )
    if path.stat().st_size == 0:
        raise ModelError(f"{path}: the weight file is empty: fetch or copy it again")
    return path


def read_weight_file(file: Path) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Return the tensors of a file, what it is in words, and what it says of itself."""
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix not in _PICKLED:
        known = ", ".join(sorted({".safetensors", *_PICKLED}))
        raise ModelError(f"{file}: not a weight file by its name; known endings: {known}")
    try:
        with warnings.catch_warnings():
            # A hint to torch's developers, about files that other programs wrote.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "GLOBAL" in text or "TypedStorage" in text or "REDUCE" in text or "global" in text:
            raise ModelError(
                f"{file}: holds more than tensors and plain values, and opening it would run code from the file: "
                "save its state dict alone (safetensors, or torch.save(model.state_dict()))"
            ) from error
        raise ModelError(
            f"{file}: damaged, or a pickle of something else than tensors, which is never opened: fetch or copy it "
            "again, or save the state dict alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError, IndexError) as error:
        if "TorchScript" in str(error):
            raise ModelError(
                f"{file}: is a TorchScript program, not weights: save its state dict as safetensors"
            ) from error
        raise ModelError(f"{file}: the weight file is damaged or incomplete: fetch or copy it again") from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{file}: holds {type(content).__name__}, not a state dict")
    return _unpack(content, file)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Read a safetensors file with its metadata."""
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            raw = dict(handle.metadata() or {})
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  not a mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{file}: the weight file is damaged or incomplete: fetch or copy it again") from error
    if not state:
        raise ModelError(f"{file}: holds no tensors")
    metadata: dict[str, Any] = dict(raw)
    kind = "safetensors"
    if "r2kit" in raw:
        kind = "r2kit weights"
        try:
            metadata = dict(json.loads(raw["r2kit"]))
        except (ValueError, TypeError) as error:
            raise ModelError(f"{file}: the metadata of the weight file are damaged: fetch or copy it again") from error
    return state, kind, metadata


def _unpack(content: Mapping[Any, Any], file: Path) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Find the state dict among what training programs put around it."""
    kind = "Lightning checkpoint" if "pytorch-lightning_version" in content else "state dict"
    notes: dict[str, Any] = {}
    for key in _CONTAINERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            content = inner
            kind = kind if kind != "state dict" else f"checkpoint, its '{key}'"
            break
    else:
        if any(isinstance(content.get(key), Mapping) for key in _EMA_CONTAINERS):
            key = next(key for key in _EMA_CONTAINERS if isinstance(content.get(key), Mapping))
            content, kind = content[key], f"checkpoint, its '{key}'"
    state = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        keys = few([str(k) for k in content])
        raise ModelError(f"{file}: holds no state dict; it has: {keys}")
    return state, kind, notes


def read_json_beside(file: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in the file `name` beside the weight file, or an empty one."""
    path = file.parent / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def few(names: Sequence[str], limit: int = 3) -> str:
    """Return the first few names, and a sign that there are more."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
