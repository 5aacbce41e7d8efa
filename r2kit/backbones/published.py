"""Published weights: what exists for an architecture, under which licence, and how to get at the file without a wait.

Without a network timm retries every request five times, up to eight seconds apart, with a log line each: most of a
minute before it gives up. Here one short request decides first, and a file that is already in the hub's cache is used
without asking the network at all.
"""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg, get_pretrained_cfg

from r2kit.errors import ModelError

__all__ = ["Preprocessing", "WeightsInfo", "locate", "unpublished", "warm_start_source", "weights_info"]

_PROBE_SECONDS = 3.0
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm asks the hub for, in this order

# Networks without published weights that a ReLU network of the same skeleton converts into; see `warmstart`.
_WARM_START_SOURCES = {"res2netplus50d": "res2net50d", "res2netplus101d": "res2net101d"}
# Of those, the one to point at when another network of the family is asked for.
_WARM_START_RELATIVES = {
    "res2netplus50": "res2netplus50d",
    "res2netplus101": "res2netplus101d",
    "res2netplus152": "res2netplus101d",
    "res2nextplus50": "res2netplus50d",
    "res2netplus50_res2fg": "res2netplus50d",
}


@dataclass(frozen=True)
class Preprocessing:
    """What images must look like for a set of weights.

    Args:
        mean: One number a band, in the unit of the pixels; published weights want pixels scaled to [0, 1].
        std: The same.
        interpolation: Resize filter: ``bilinear``, ``bicubic``, ...
        crop_pct: Share of the resized image that the centre crop keeps, or None where the file does not say.
        origin: ``file``: it came with the weights. ``published``: timm's record of published weights. ``assumed``: the
            file says nothing, and these are the architecture's defaults.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float | None
    origin: str


@dataclass(frozen=True)
class WeightsInfo:
    """Published weights of one architecture.

    Args:
        name: Architecture.
        tag: Which of its published weights, for example ``in1k``.
        source: Repository on the Hugging Face hub, or a URL.
        page: Where a person reads about them.
        licence: SPDX-like name, or ``not stated``.
        num_classes: Outputs of their classifier.
        input_size: (C, H, W) they were trained for.
        preprocessing: Their mean, std and resize filter.
        custom_format: The file is not a state dict; only timm's code for this architecture reads it.
    """

    name: str
    tag: str
    source: str
    page: str
    licence: str
    num_classes: int
    input_size: tuple[int, int, int]
    preprocessing: Preprocessing
    custom_format: bool = False


def weights_info(name: str) -> WeightsInfo | None:
    """Return what is published for `name`, with or without a tag (``res2net50d.in1k``); None where nothing is.

    Asks no network: timm's registry knows.
    """
    if not timm.is_model(name):
        return None
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:  # the architecture exists, the tag does not
        return None
    if cfg is None or not cfg.has_weights:
        return None
    source = cfg.hf_hub_id or _url_of(cfg)
    licence = cfg.license if cfg.license and cfg.license != "unknown" else "not stated"
    return WeightsInfo(
        name=cfg.architecture or name.partition(".")[0],
        tag=cfg.tag or "",
        source=source,
        page=cfg.origin_url or (f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else source),
        licence=licence,
        num_classes=cfg.num_classes,
        input_size=tuple(cfg.input_size),
        preprocessing=Preprocessing(tuple(cfg.mean), tuple(cfg.std), cfg.interpolation, cfg.crop_pct, "published"),
        custom_format=bool(cfg.custom_load),
    )


def warm_start_source(name: str) -> str | None:
    """Return the network whose published weights convert into `name`, or None."""
    return _WARM_START_SOURCES.get(name)


def unpublished(name: str) -> str:
    """Return the sentence for somebody who asks for weights of `name` that nobody has published."""
    arch = name.partition(".")[0]
    text = f"model.pretrained: no weights of '{arch}' have been published"
    if source := _WARM_START_SOURCES.get(arch):
        text += f"; those of '{source}' convert into it (r2kit.backbones.warmstart.warm_start)"
    elif relative := _WARM_START_RELATIVES.get(arch):
        text += f"; '{relative}' can start from the weights of '{_WARM_START_SOURCES[relative]}' instead (a warm start)"
    return f"{text}: give a local file with model.pretrained=path/to/file.safetensors, or model.pretrained=false"


def locate(info: WeightsInfo, cache_dir: str | Path | None = None) -> Path | None:
    """Return the cached file of published weights, or None when they have to be fetched and the network answers.

    Args:
        info: What to fetch.
        cache_dir: Where the hub or torch keeps its files; None for their defaults.

    Raises:
        ModelError: At once, when the file is not cached and there is no network.
    """
    cfg = get_pretrained_cfg(f"{info.name}.{info.tag}" if info.tag else info.name)
    if cfg.hf_hub_id:
        repo, _, revision = cfg.hf_hub_id.partition("@")
        files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _HUB_FILES
        for file in files:
            found = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
        url = f"{hub_constants.ENDPOINT}/{repo}/resolve/{revision or 'main'}/{files[0]}"
        offline = hub_constants.HF_HUB_OFFLINE or _true(os.environ.get("HF_HUB_OFFLINE"))
    else:
        url = _url_of(cfg)
        folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
        cached = folder / Path(urllib.parse.urlparse(url).path).name
        if cached.is_file():
            return cached
        offline = False
    if offline:
        raise ModelError(no_network(info, "HF_HUB_OFFLINE forbids"))
    if not _answers(url):
        raise ModelError(no_network(info, "no network"))
    return None


def no_network(info: WeightsInfo, reason: str) -> str:
    """Return the one sentence that says why published weights cannot be had, and what to do instead."""
    licence = "licence not stated" if info.licence == "not stated" else info.licence
    return (
        f"model.pretrained: {reason} to fetch the weights of '{info.name}' ({info.source}, {licence}): give a local "
        "file with model.pretrained=path/to/file.safetensors, or model.pretrained=false"
    )


def _answers(url: str, seconds: float = _PROBE_SECONDS) -> bool:
    """Whether the host of `url` answers at all within `seconds`; proxies of the environment are honoured."""
    result: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "r2kit"})
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
            result.append(True)
        except urllib.error.HTTPError:  # it answered; what it said is for the real request to report
            result.append(True)
        except Exception:  # whatever went wrong, also long after nobody waits any more: it did not answer
            result.append(False)

    # Name resolution knows no timeout, so it waits in a thread that can be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(result and result[0])


def _url_of(cfg: PretrainedCfg) -> str:
    """Return the download address of a configuration; timm allows (url, file name) there."""
    url: Any = cfg.url or cfg.file or ""
    return str(url if isinstance(url, str) else url[0])


def _true(value: str | None) -> bool:
    """Read an environment flag as huggingface_hub does."""
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}
