"""Weight files in and out: strict, without ever running code from a file, and with a report of what was done.

What `load_weights` reads, all into the same strict check:

- safetensors: ours (`save_weights`), timm's, anybody's;
- ``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.pth.tar`` that hold tensors and plain containers; a file that would run
  code when opened is refused;
- the folder of a run, or of a model as timm saves it: their ``model.safetensors``;
- Lightning checkpoints, and any file whose keys carry a common prefix (``model.``, ``module.``, ``backbone.``);
- the authors' files. Res2Net v1, v1b and Res2NeXt have timm's keys. Res2Net-DLA files hold projections that the
  authors' code runs and never uses. Res2NetPlus files name the stem differently, see `rename_published_plus`.

Only two things may differ from the model: the classifier of another class count is left out, and the first convolution
is adapted to another number of bands, by a rule that the report states.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from r2kit.backbones._fit import (
    InChansRule,
    adapt_first_conv,
    architecture_of,
    check_in_chans_rule,
    drop_dead_projections,
    fit_classifier,
    fit_first_conv,
    fitting_variant,
    mismatch,
    rename_published_plus,
    strip_prefix,
)
from r2kit.backbones._weight_file import few, read_json_beside, read_weight_file, resolve_weight_file
from r2kit.backbones.published import Preprocessing
from r2kit.errors import ModelError

__all__ = [
    "InChansRule",
    "LoadReport",
    "adapt_first_conv",
    "check_in_chans_rule",
    "fitting_variant",
    "load_state",
    "load_weights",
    "save_weights",
]


@dataclass(frozen=True)
class LoadReport:
    """What loading a set of weights did.

    Args:
        source: The file, or the hub repository.
        kind: What the source is, in words.
        tensors: How many tensors the model took.
        classifier: What became of the classifier, in words.
        in_chans: The rule that adapted the first convolution, in words; empty when it fitted.
        left_out: Tensors of the source that the model did not take.
        missing: Tensors of the model that the source did not bring, so that they are as initialised.
        notes: Whatever else a person should know, one sentence each.
        preprocessing: What the images must look like.
        licence: Of the weights, where it is known.
        metadata: What the file says of itself: our own `save_weights` metadata, else what safetensors holds.
        rgb_bands: Which bands of the model the kernels of the source were meant for, in their order; None where that
            is not known by name.
    """

    source: str
    kind: str
    tensors: int
    classifier: str
    in_chans: str = ""
    left_out: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    licence: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    rgb_bands: tuple[int, ...] | None = None

    def lines(self) -> list[str]:
        """Return the report as a few lines for a person."""
        licence = f", licence: {self.licence}" if self.licence else ""
        lines = [
            f"weights: {self.source} ({self.kind}{licence}): {self.tensors} tensors",
            f"classifier: {self.classifier}",
        ]
        if self.in_chans:
            lines.append(f"first convolution: {self.in_chans}")
        if pre := self.preprocessing:
            mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (pre.mean, pre.std))
            where = {"file": "from the file", "published": "as published", "assumed": "assumed: the file says nothing"}
            lines.append(f"preprocessing: mean {mean}; std {std}; {pre.interpolation} ({where[pre.origin]})")
        return lines + [f"note: {note}" for note in self.notes]


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    in_chans_rule: InChansRule = "repeat",
    rgb_bands: Sequence[int] | None = None,
    strict: bool = True,
) -> LoadReport:
    """Load a weight file into `model`, in place.

    Args:
        model: A backbone with its classifier, as `create_model` builds it.
        path: File, or folder that holds ``model.safetensors``.
        in_chans_rule: For a model with another number of bands than the file; see `adapt_first_conv`.
        rgb_bands: For the same; see `adapt_first_conv`.
        strict: Refuse a file of which any other tensor does not fit. Otherwise load what fits and report the rest.

    Raises:
        ModelError: If the file is missing, damaged, would run code, holds no weights, or does not fit. In the last case
            the message names tensors and shapes, and the registered variant that the file is for, if there is one.
    """
    check_in_chans_rule(in_chans_rule)
    file = resolve_weight_file(Path(path).expanduser())
    state, kind, metadata = read_weight_file(file)
    report = load_state(
        model,
        state,
        str(file),
        kind,
        in_chans_rule=in_chans_rule,
        rgb_bands=_in_their_order(rgb_bands, _bands(file, metadata)),
        strict=strict,
        metadata=metadata,
    )
    preprocessing = _preprocessing(file, metadata, _unwrapped(model))
    notes = report.notes
    if preprocessing is not None and preprocessing.origin == "assumed":
        notes = (*notes, "the file does not say which mean and std it was trained with")
    return replace(report, preprocessing=preprocessing, notes=notes)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    kind: str,
    *,
    in_chans_rule: InChansRule = "repeat",
    rgb_bands: Sequence[int] | None = None,
    strict: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> LoadReport:
    """Load tensors that are in memory into `model`, in place, as `load_weights` does with those of a file.

    Args:
        model: A backbone with its classifier.
        state: Tensors by name.
        source: Where they come from, for messages.
        kind: What that is, in words.
        in_chans_rule: See `adapt_first_conv`.
        rgb_bands: See `adapt_first_conv`.
        strict: Refuse tensors of which any other does not fit.
        metadata: What the source says of itself.

    Raises:
        ModelError: If the tensors do not fit, or are not finite.
    """
    model = _unwrapped(model)
    metadata = metadata or {}
    wanted = dict(model.state_dict())
    notes: list[str] = []

    inside, outside = strip_prefix(state, wanted)
    inside = rename_published_plus(inside, model, source)
    inside, dead = drop_dead_projections(inside, model)
    if dead:
        notes.append(f"{len(dead)} tensors of projections that the authors' code computes but never uses are left out")
    if outside:
        heads = sorted({name.split(".")[0] for name in outside})
        notes.append(f"{len(outside)} tensors outside the backbone are left out ({few(heads)})")
    # Files from before torch 0.4.1 do not count batches; nothing but momentum=None ever reads the count.
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked") and name not in inside:
            inside[name] = tensor.clone()

    inside, classifier, fresh, surplus = fit_classifier(inside, wanted, model)
    in_chans = fit_first_conv(inside, wanted, model, in_chans_rule, rgb_bands)

    missing = [name for name in wanted if name not in inside and name not in fresh]
    unexpected = [name for name in inside if name not in wanted]
    unequal = [name for name in wanted if name in inside and inside[name].shape != wanted[name].shape]
    fitting = {name: tensor for name, tensor in inside.items() if name in wanted and name not in unequal}
    brought = [name for name in fitting if not name.endswith("num_batches_tracked")]
    if not brought or (strict and (missing or unexpected or unequal)):
        raise ModelError(mismatch(source, model, inside, wanted, missing, unexpected, unequal))
    theirs = metadata.get("architecture")
    if strict and isinstance(theirs, str) and timm.is_model(theirs) and theirs != architecture_of(model):
        raise ModelError(
            f"{source}: holds weights of '{theirs}', which computes something else than '{architecture_of(model)}' "
            f"from tensors of the same shapes: build '{theirs}'"
        )
    bad = [name for name, tensor in fitting.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise ModelError(
            f"{source}: {len(bad)} tensors hold values that are not finite ({few(bad)}); did its training diverge?"
        )
    model.load_state_dict(fitting, strict=False)
    return LoadReport(
        source=source,
        kind=kind,
        tensors=len(fitting),
        classifier=classifier,
        in_chans=in_chans,
        left_out=tuple(sorted({*outside, *dead, *surplus, *unexpected, *unequal})),
        missing=tuple(sorted({*missing, *fresh, *unequal})),
        notes=tuple(notes),
        licence=_text_or_none(metadata.get("licence")),
        metadata=dict(metadata),
        rgb_bands=None if rgb_bands is None else tuple(rgb_bands),
    )


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the state dict of `model` and `metadata` to a safetensors file, whole or not at all.

    Args:
        model: What to save; wrappers of ``torch.compile`` and of data parallelism are taken off.
        path: File to write; its folder must exist.
        metadata: Plain values (JSON); ``architecture`` is added. `load_weights` understands ``preprocess`` (``mean``,
            ``std``, ``interpolation``) and ``licence``, and gives everything back in `LoadReport.metadata`.

    Raises:
        ModelError: If the metadata are not plain values, or the file cannot be written.
    """
    path = Path(path)
    try:
        text = json.dumps({"architecture": architecture_of(_unwrapped(model)), **(metadata or {})})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: metadata must be plain values (numbers, text, lists, dicts): {error}") from error
    # Clones, because safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in _unwrapped(model).state_dict().items()}
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            safetensors.torch.save_file(tensors, name, metadata={"format": "pt", "r2kit": text})
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path}: the weights cannot be written: {error}") from error


def _preprocessing(file: Path, metadata: Mapping[str, Any], model: nn.Module) -> Preprocessing | None:
    """Return mean, std and filter from the metadata, a JSON beside the file, or the architecture's defaults."""
    beside = (read_json_beside(file, "preprocess.json"), read_json_beside(file, "config.json").get("pretrained_cfg"))
    for source in (metadata.get("preprocess"), *beside):
        if isinstance(source, Mapping) and source.get("mean") and source.get("std"):
            return Preprocessing(
                tuple(float(v) for v in source["mean"]),
                tuple(float(v) for v in source["std"]),
                str(source.get("interpolation", "bilinear")),
                float(source["crop_pct"]) if source.get("crop_pct") is not None else None,
                "file",
            )
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("mean"):
        return None
    return Preprocessing(
        tuple(cfg["mean"]), tuple(cfg["std"]), cfg.get("interpolation", "bilinear"), cfg.get("crop_pct"), "assumed"
    )


def _bands(file: Path, metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the bands that the weights of a run were made for, None where the file does not say."""
    for source in (metadata.get("preprocess"), read_json_beside(file, "preprocess.json")):
        if isinstance(source, Mapping) and isinstance(source.get("bands"), list):
            return tuple(str(name).lower() for name in source["bands"])
    return None


def _in_their_order(rgb_bands: Sequence[int] | None, bands: tuple[str, ...] | None) -> tuple[int, ...] | None:
    """Return where red, green and blue are, in the order of the kernels; None for kernels that are of other bands."""
    if rgb_bands is None or bands is None:
        return None if rgb_bands is None else tuple(rgb_bands)
    place = dict(zip(("red", "green", "blue"), rgb_bands, strict=True))
    return tuple(place[band] for band in bands) if set(bands) == set(place) and len(bands) == 3 else None


def _unwrapped(model: nn.Module) -> nn.Module:
    """Take `torch.compile` and data-parallel wrappers off."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _text_or_none(value: Any) -> str | None:
    """Return text as it is, and anything else as None."""
    return value if isinstance(value, str) else None


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
