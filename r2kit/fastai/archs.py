"""The archs of the family, and what fastai asks about them.

An arch is a function, one for each name in `r2kit.catalog`; its weights, bands and options are those of
`r2kit.create_model`. By function or by name the learner's model is the same:

- `model[0]` is the network up to its global pool, stage by stage, so that `unet_learner` finds its sizes;
- three parameter groups: stem and early stages, the last two stages, head;
- images are normalised with the mean and std of the weights. Only the form by name can know those of a local file; the
  form by function warns where they are others than the network's usual ones;
- `n_in` other than 3 starts from adapted weights by `create_model`'s rule: the RGB kernels in turn, scaled. (fastai's
  own rule would start the other bands at zero.)

fastai asks for published weights unless told otherwise. Where none exist, as for all of Res2NetPlus, the learner starts
from random weights and a warning says so: fastai has then frozen a body that knows nothing.

Importing this module adds the archs, their names and our functions in timm's registry to fastai's `model_meta`. One
thing in fastai is replaced: `create_timm_model`, for the names of the family only, as it would ask timm for weights
that do not exist or cannot be reached, and fail. Any other name reaches fastai's own function unchanged.

What timm registers for our names, such as `r2kit.backbones.res2netplus.res2netplus50`, works as an arch too, with
``pretrained=False``.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import fastai.vision.learner as fastai_learner
import timm
from fastai.callback.hook import has_params
from fastai.layers import in_channels
from fastai.torch_core import L, params
from torch import Tensor, nn

from r2kit.backbones import create_model
from r2kit.backbones.blresnet import BigLittleNet
from r2kit.backbones.published import weights_info
from r2kit.backbones.weights import LoadReport
from r2kit.catalog import CATALOG, CatalogEntry

Arch = Callable[..., nn.Module]

ARCHS = tuple(entry.name for entry in CATALOG)
"""Names of the archs, each a function of this module."""

__all__ = ["ARCHS", "cut_body", "three_groups", *ARCHS]


# -- the parts that fastai asks `model_meta` for -----------------------------------------------------------------------


class _BigLittleStem(nn.Module):
    """What a Big-Little network does between its first convolution and its first stage.

    It has the modules that the network's own method works with, under the same names.
    """

    def __init__(self, net: BigLittleNet) -> None:
        super().__init__()
        children = dict(net.named_children())
        names = list(children)
        for name in names[names.index("act1") + 1 : names.index("layer1")]:
            self.add_module(name, children[name])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 64, H/2, W/2) to (B, 64, H/4, W/4)."""
        return BigLittleNet.forward_stem(self, x)  # type: ignore[arg-type]


def cut_body(model: nn.Module) -> nn.Sequential:
    """Return everything in front of the global pool, as the sequence that fastai walks through.

    Args:
        model: A network of the family. If fastai has replaced its first convolution because of `n_in`, and it was built
            by an arch of this module, it is built again for that many bands, by the rule of `r2kit.create_model`.

    Returns:
        The stem's modules and the stages, under the names they have in the network. It computes `forward_features`.
    """
    rebuild = getattr(model, "for_bands", None)
    if rebuild is not None and in_channels(model) != 3:
        model = rebuild(in_chans=in_channels(model))
    body = nn.Sequential()
    for name, child in model.named_children():
        if name == "global_pool":
            break
        if not isinstance(model, BigLittleNet) or name in ("conv1", "bn1", "act1") or name.startswith("layer"):
            body.add_module(name, child)
        elif "stem" not in dict(body.named_children()):
            body.add_module("stem", _BigLittleStem(model))
    return body


def three_groups(model: nn.Module) -> L:
    """Return the parameters of a learner's model in three groups, from early to late.

    Args:
        model: Body first, then whatever makes up the head: the model of `vision_learner` or `unet_learner`.

    Returns:
        Lists of parameters: stem and early stages; the body's last two stages; head.
    """
    parts = [child for child in model[0].children() if has_params(child)]  # type: ignore[index]
    return L(nn.ModuleList(parts[:-2]), nn.ModuleList(parts[-2:]), model[1:]).map(params)  # type: ignore[index]


# -- archs -------------------------------------------------------------------------------------------------------------


def _build(
    name: str, pretrained: bool | str | Path, *, num_classes: int, in_chans: int, options: dict[str, Any]
) -> nn.Module:
    """Build a network; where published weights are asked for and none exist, warn and start from random ones."""
    if pretrained is True and weights_info(name) is None:
        warnings.warn(
            f"no weights of '{name}' have been published: it starts from random weights, and what fastai freezes knows "
            "nothing; call learn.unfreeze() before fitting, or give pretrained=False or "
            "pretrained='path/to/file.safetensors'",
            stacklevel=4,
        )
        pretrained = False
    return create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options)


def _warn_of_other_statistics(name: str, model: nn.Module) -> None:
    """Say when a local file wants its images normalised otherwise than fastai does for a function."""
    report = cast("LoadReport | None", model.load_report)
    pre = report.preprocessing if report is not None else None
    if report is None or pre is None or pre.origin != "file":
        return
    usual = [*_statistics(name)[0], *_statistics(name)[1]]
    wanted = [*pre.mean, *pre.std]
    if len(wanted) == len(usual) and all(abs(a - b) < 1e-3 for a, b in zip(wanted, usual, strict=True)):
        return
    mean, std = ([round(value, 4) for value in values] for values in (pre.mean, pre.std))
    warnings.warn(
        f"the weights in {report.source} want images with mean {mean} and std {std}, which fastai cannot know of an "
        f"arch that is a function: write vision_learner(dls, '{name}', ...), or give normalize=False and put "
        "Normalize.from_stats(mean, std) into batch_tfms",
        stacklevel=3,
    )


def _statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std that the network's images are usually normalised with."""
    cfg = timm.get_pretrained_cfg(name)
    return tuple(cfg.mean), tuple(cfg.std)


def _make_arch(entry: CatalogEntry) -> Arch:
    """Return the arch function of one network."""
    name = entry.name

    def arch(
        pretrained: bool | str | Path = False, *, num_classes: int = 1000, in_chans: int = 3, **timm_options: Any
    ) -> nn.Module:
        model = _build(name, pretrained, num_classes=num_classes, in_chans=in_chans, options=timm_options)
        _warn_of_other_statistics(name, model)
        given = False if model.load_report is None else pretrained
        # What `cut_body` calls for another `n_in`; a plain attribute, not a part of the network.
        rebuild = functools.partial(create_model, name, pretrained=given, num_classes=num_classes, **timm_options)
        object.__setattr__(model, "for_bands", rebuild)
        return model

    arch.__name__ = arch.__qualname__ = name  # with the module's name it is what a pickle stores
    arch.__doc__ = f"""Build `{name}` ({entry.family}), an arch for fastai.

    Args:
        pretrained: True for published weights; with a warning, random ones where none exist. Or a path to a file.
        num_classes: Outputs of the classifier, which fastai cuts off.
        in_chans: Bands of the image. fastai asks for 3, and `cut_body` gives it `n_in`.
        **timm_options: As `r2kit.create_model` takes and checks them.

    Raises:
        ModelError: If published weights cannot be reached, a file does not fit, or an option cannot be honoured.
    """
    return arch


# -- by name -----------------------------------------------------------------------------------------------------------

_fastai_create_timm_model = inspect.unwrap(fastai_learner.create_timm_model)  # the original, if this module is reloaded
_HEAD_OPTIONS = tuple(inspect.signature(fastai_learner.add_head).parameters)[3:]


@functools.wraps(_fastai_create_timm_model)
def _create_timm_model(
    arch: str,
    n_out: int,
    cut: Any = None,
    pretrained: bool | str | Path = True,
    n_in: int = 3,
    custom_head: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a learner's model and timm's configuration of its weights; as there, `cut` is unused."""
    if arch.partition(".")[0] not in ARCHS:
        options["custom_head"] = custom_head
        return _fastai_create_timm_model(arch, n_out, cut, pretrained, n_in, **options)
    head_options = {option: options.pop(option) for option in _HEAD_OPTIONS if option in options}
    model = _build(arch, pretrained, num_classes=0, in_chans=n_in, options=options)
    whole = fastai_learner.add_head(cut_body(model), model.num_features, n_out, head=custom_head, **head_options)
    return whole, model.pretrained_cfg  # type: ignore[return-value]


def _register() -> None:
    """Make the archs, and make them known to fastai."""
    tagged = timm.list_models([f"{name}.*" for name in ARCHS], include_tags=True)
    for entry in CATALOG:
        arch = _make_arch(entry)
        globals()[entry.name] = arch
        meta = {"cut": cut_body, "split": three_groups, "stats": _statistics(entry.name)}
        keys = [arch, entry.name, *(name for name in tagged if name.startswith(f"{entry.name}."))]
        if entry.owner == "r2kit":
            keys.append(timm.model_entrypoint(entry.name))
        fastai_learner.model_meta.update(dict.fromkeys(keys, meta))
    fastai_learner.create_timm_model = _create_timm_model


_register()
