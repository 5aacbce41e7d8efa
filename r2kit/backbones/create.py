"""`create_model`: the one door to every backbone, ours and timm's, that ignores nothing.

timm hands options down through several ``**kwargs``, and some of its blocks and models swallow what they do not know:
``res2net50d`` with ``block_args={"scael": 8}`` is a scale-4 network, and no word is said. Here every name is checked
against what the network really takes.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import get_attn
from timm.models import ResNet
from torch import nn

from r2kit.backbones._fit import without_memory
from r2kit.backbones.published import WeightsInfo, locate, no_network, unpublished, weights_info
from r2kit.backbones.resnest import fix_drop_path
from r2kit.backbones.weights import InChansRule, check_in_chans_rule, load_state, load_weights
from r2kit.errors import ModelError, did_you_mean

__all__ = ["create_model", "map_indices"]

_FEATURE_OPTIONS = ("features_only", "out_indices", "feature_cls", "output_fmt")
# What timm takes before it calls the model's class.
_BUILDER_OPTIONS = (*_FEATURE_OPTIONS, "cache_dir", "scriptable", "exportable", "no_jit")
# Options of timm that would load or describe weights behind our back.
_REPLACED_OPTIONS = {
    "checkpoint_path": "give the file with pretrained='path/to/file'",
    "pretrained_cfg": "choose published weights by their tag, as in 'resnet50.tv_in1k', or give a file",
    "pretrained_cfg_overlay": "choose published weights by their tag, as in 'resnet50.tv_in1k', or give a file",
}
# Zero is what a network without the option does anyway, so it can be honoured everywhere.
_ZERO_IS_NOTHING = {"drop_rate", "drop_path_rate", "drop_block_rate"}


def create_model(
    name: str,
    *,
    pretrained: bool | str | Path = False,
    num_classes: int = 1000,
    in_chans: int = 3,
    in_chans_rule: InChansRule = "repeat",
    rgb_bands: Sequence[int] | None = None,
    **timm_options: Any,
) -> nn.Module:
    """Build a backbone of r2kit or timm.

    The network carries `load_report` (a `LoadReport`, or None with random weights): where its weights came from, under
    which licence, what was left out, and the mean, std and filter they need.

    Args:
        name: Architecture, with or without a tag of its published weights: ``res2netplus50``, ``resnet50.tv_in1k``.
        pretrained: True for the published weights, or a path for `r2kit.backbones.weights.load_weights`.
        num_classes: Outputs of the classifier; 0 for none. Where the weights are for another count it starts afresh.
        in_chans: Bands of the image.
        in_chans_rule: How weights made for other bands start the first convolution: ``repeat``, ``mean``, ``zero`` or
            ``random``; see `r2kit.backbones.weights.adapt_first_conv`.
        rgb_bands: Which bands are red, green and blue, for the same; the first three if None.
        **timm_options: Whatever the architecture takes in timm: ``drop_rate``, ``drop_path_rate``, ``global_pool``,
            ``output_stride``, ``features_only``, ``out_indices``, ``block_args``, ... ``block_args`` are merged over
            the architecture's own; in timm they would replace them, and the scale would fall back to 4.

    Raises:
        ModelError: If the name or an option is unknown, an option cannot be honoured, or the weights cannot be had or
            do not fit. Without a network it is raised at once.
    """
    _check_name(name)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ModelError(f"num_classes: must be an integer >= 0, got {num_classes!r}")
    if isinstance(in_chans, bool) or not isinstance(in_chans, int) or in_chans < 1:
        raise ModelError(f"in_chans: must be an integer >= 1, got {in_chans!r}")
    check_in_chans_rule(in_chans_rule)
    options = {**_check_options(name, timm_options), "num_classes": num_classes, "in_chans": in_chans}

    whole_options = {k: v for k, v in options.items() if k not in _FEATURE_OPTIONS}
    if pretrained is False:
        model = _build(name, options)
        model.load_report = None  # type: ignore[assignment]
        return model
    if pretrained is True:
        info = weights_info(name)
        if info is None:
            raise ModelError(unpublished(name))
        state = _fetch(name, info, options).state_dict()  # before anything else is built, so that it fails at once
        whole = _build(name, whole_options)
        report = load_state(
            whole, state, info.source, "published weights", in_chans_rule=in_chans_rule, rgb_bands=rgb_bands
        )
        report = replace(report, licence=info.licence, preprocessing=info.preprocessing)
    else:
        whole = _build(name, whole_options)
        report = load_weights(whole, pretrained, in_chans_rule=in_chans_rule, rgb_bands=rgb_bands)
    model = _as_features(whole, _build(name, options)) if options.get("features_only") else whole
    model.load_report = report  # type: ignore[assignment]
    if report.preprocessing is not None:  # timm's own tools read it there
        pre = report.preprocessing
        found = {"mean": pre.mean, "std": pre.std, "interpolation": pre.interpolation, "crop_pct": pre.crop_pct}
        known = {k: v for k, v in found.items() if v is not None}
        model.pretrained_cfg = {**model.pretrained_cfg, **known}  # type: ignore[assignment, dict-item]
    return model


# -- names and options -------------------------------------------------------------------------------------------------


def map_indices(name: str, reductions: Sequence[int], *, needs: str) -> tuple[int, ...]:
    """Return the `out_indices` with which a network gives its maps at these reductions.

    Not their positions among the maps it gives by default: DLA counts a first map, as fine as the image, that it then
    leaves out.

    Args:
        name: A timm model or one of ours.
        reductions: Sides of the image over sides of the map, finest first.
        needs: What needs the maps, for messages.

    Raises:
        ModelError: If the network has no maps, or none of one of these reductions.
    """
    try:
        with torch.device("meta"):
            info: Any = create_model(name, features_only=True).feature_info
    except ModelError as error:
        raise ModelError(f"{needs} needs a backbone with maps of several sizes: {error}") from None
    found = list(info.reduction())
    if missing := [reduction for reduction in reductions if reduction not in found]:
        raise ModelError(
            f"model.name: {needs} needs maps of reduction {', '.join(map(str, reductions))}, and '{name}' has "
            f"{', '.join(map(str, found))} (no {', '.join(map(str, missing))}); take a network of the ResNet or "
            "Res2Net kind"
        )
    return tuple(info.out_indices[found.index(reduction)] for reduction in reductions)


def _check_name(name: str) -> None:
    """Raise unless timm's registry, which holds our names too, knows `name` and its tag."""
    arch, _, tag = name.partition(".")
    if not timm.is_model(name):
        hint = did_you_mean(arch, timm.list_models(), limit=3) or "; 'r2kit models' lists what exists"
        raise ModelError(f"model.name: unknown model '{name}'{hint}")
    tags = [
        t
        for n in timm.list_models(f"{arch}.*", include_tags=True)
        if (t := n.partition(".")[2]) and n.startswith(f"{arch}.")
    ]
    if tag and tag not in tags:
        has = f"it has: {', '.join(tags)}" if tags else "it has none"
        raise ModelError(f"model.name: '{arch}' has no weights tagged '{tag}'; {has}{did_you_mean(tag, tags)}")


def _check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with merged block arguments, after the checks that need no network."""
    for option, instead in _REPLACED_OPTIONS.items():
        if option in options:
            raise ModelError(f"{option}: not an option here; {instead}")
    if not options.get("features_only"):
        for option in _FEATURE_OPTIONS[1:]:
            if options.get(option) is not None:
                raise ModelError(f"{option}: needs features_only=True")
    if options.get("block_args") is not None:
        return {**options, "block_args": _merged_block_args(name, options["block_args"])}
    return dict(options)


def _known_options(name: str) -> list[str]:
    """Return the options that timm's builder, the entrypoint and the network's class name."""
    named = [*_BUILDER_OPTIONS]
    for function in (timm.model_entrypoint(name), type(without_memory(name)).__init__):
        parameters = inspect.signature(function).parameters.values()
        named += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [option for option in named if option not in ("self", "pretrained", *_REPLACED_OPTIONS)]


@functools.cache
def _swallows_options(name: str) -> bool:
    """Whether the network builds, and says nothing, with an option that nobody can know."""
    try:
        with torch.device("meta"):
            timm.create_model(name, an_option_that_nobody_knows=1)
    except TypeError:
        return False
    return True


def _unknown_option(name: str, option: str) -> str:
    """Say that `option` is unknown, with the nearest that is known."""
    return f"model '{name}' has no option '{option}'{did_you_mean(option, _known_options(name))}"


# -- block arguments ---------------------------------------------------------------------------------------------------


class _ProbedError(Exception):
    """Carries the arguments of a block out of the network's constructor."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class _BlockProbe:
    """Stands in for a block class, to learn with which arguments timm builds it."""

    expansion = 4

    def __init__(self, *_: Any, **arguments: Any) -> None:
        raise _ProbedError(arguments)


def _block_arguments(name: str, **options: Any) -> dict[str, Any]:
    """Return the arguments with which the network builds its first block."""
    try:
        timm.create_model(name, block=_BlockProbe, **options)
    except _ProbedError as probed:
        return probed.arguments
    raise ModelError(f"block_args: the blocks of '{name}' take none")


def _merged_block_args(name: str, block_args: Any) -> dict[str, Any]:
    """Return the architecture's own block arguments with `block_args` over them, if the block knows them by name."""
    if not isinstance(block_args, Mapping):
        raise ModelError(f"block_args: must be a mapping, got {type(block_args).__name__}")
    skeleton = without_memory(name)
    if not isinstance(skeleton, ResNet) or "block_args" not in _known_options(name):
        raise ModelError(f"block_args: the blocks of '{name}' take none")
    block = type(skeleton.layer1[0])
    of_stage = _block_arguments(name, block_args={})  # what the builder of the stages gives to every block
    own = {k: v for k, v in _block_arguments(name).items() if k not in of_stage}
    parameters = inspect.signature(block.__init__).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    free = sorted(named - of_stage.keys() - {"self", "inplanes", "planes", "stride", "downsample"})
    for option in block_args:
        if option not in free:
            raise ModelError(
                f"block_args: the blocks of '{name}' have no argument '{option}'; "
                f"allowed: {', '.join(free)}{did_you_mean(option, free)}"
            )
    merged = {**own, **block_args}
    if isinstance(merged.get("attn_layer"), str):  # timm's Res2Net block wants the class itself
        merged["attn_layer"] = get_attn(merged["attn_layer"])
    return merged


# -- building ----------------------------------------------------------------------------------------------------------


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Build the network with random weights, and make sure that it took every option."""
    given = {k: v for k, v in options.items() if v is not None}  # as timm does
    while True:
        try:
            model = timm.create_model(name, **given)
            break
        except ModelError:
            raise
        except TypeError as error:
            option = _unexpected_keyword(error)
            if option in _ZERO_IS_NOTHING and given.get(option) == 0:
                del given[option]
            elif option in given:
                raise ModelError(_unknown_option(name, option)) from error
            else:
                raise ModelError(_cannot_build(name, given, error)) from error
        except (
            AssertionError,
            ValueError,
            RuntimeError,
            NotImplementedError,
            KeyError,
            IndexError,
            AttributeError,
        ) as error:
            raise ModelError(_cannot_build(name, given, error)) from error
    _check_nothing_swallowed(name, model, options)
    return fix_drop_path(model)  # timm's ResNeSt blocks drop their input


def _unexpected_keyword(error: TypeError) -> str:
    """Return the name that Python, or one of timm's models in its own words, did not expect; else an empty string."""
    match = re.search(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'", str(error))
    return match[1] if match else ""


def _check_nothing_swallowed(name: str, model: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise if an option is unknown to everybody that the network was built by, or was dropped because it is None."""
    parameters = inspect.signature(type(model).__init__).parameters
    candidates = [k for k in options if k not in parameters and k not in _BUILDER_OPTIONS and k not in _ZERO_IS_NOTHING]
    if not candidates:
        return
    known = _known_options(name)
    for option in candidates:
        if option not in known and (options[option] is None or _swallows_options(name)):
            raise ModelError(_unknown_option(name, option))


def _cannot_build(name: str, options: Mapping[str, Any], error: Exception) -> str:
    """Say that the network cannot be built so; timm's own words are added where it has any."""
    shown = ", ".join(f"{k}={v!r}" for k, v in options.items() if k not in ("num_classes", "in_chans", "cache_dir"))
    words = " ".join(str(error).split())
    return f"model '{name}' cannot be built" + (f" with {shown}" if shown else "") + (f": {words}" if words else "")


def _fetch(name: str, info: WeightsInfo, options: Mapping[str, Any]) -> nn.Module:
    """Return timm's network with its published weights, for the bands and classes they were made for.

    timm knows how to rename and resize the tensors of every one of its architectures, so it builds the network that the
    tensors are then taken from.
    """
    cached = locate(info, options.get("cache_dir"))
    apart = {*_FEATURE_OPTIONS, "num_classes", "in_chans", *_ZERO_IS_NOTHING}
    same = {k: v for k, v in options.items() if k not in apart and v is not None}
    overlay = {"file": str(cached)} if cached is not None and not info.custom_format else None
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **same)
    except TypeError as error:
        option = _unexpected_keyword(error)
        raise ModelError(_unknown_option(name, option) if option else _cannot_build(name, same, error)) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if cached is not None:
            raise ModelError(
                f"{cached}: the cached weights of '{info.name}' cannot be read; delete the file: {error}"
            ) from error
        raise ModelError(no_network(info, "no usable network")) from error


def _as_features(whole: nn.Module, features: nn.Module) -> nn.Module:
    """Copy the tensors of a whole network into its feature extractor, whose keys timm prefixes or flattens."""
    state = {key.replace(".", "_"): tensor for key, tensor in whole.state_dict().items()}
    copied = {}
    for key in features.state_dict():
        tensor = state.get(key.removeprefix("model.").replace(".", "_"))
        if tensor is None:
            raise ModelError(
                f"features_only: the weights cannot be handed to this kind of extractor (no source for {key})"
            )
        copied[key] = tensor
    features.load_state_dict(copied)
    return features
