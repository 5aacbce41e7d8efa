"""Making the tensors of a file fit a network: prefixes, names of published files, classifier, bands, and what is wrong.

Everything here works on plain mappings of names to tensors; `weights` reads and writes the files.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from r2kit.backbones._weight_file import few
from r2kit.errors import ModelError, did_you_mean

__all__ = [
    "InChansRule",
    "State",
    "adapt_first_conv",
    "architecture_of",
    "check_in_chans_rule",
    "drop_dead_projections",
    "fit_classifier",
    "fit_first_conv",
    "fitting_variant",
    "mismatch",
    "rename_published_plus",
    "strip_prefix",
    "without_memory",
]

InChansRule = Literal["repeat", "mean", "zero", "random"]
"""How kernels for some bands become kernels for others; see `adapt_first_conv`."""

State = dict[str, Tensor]


def check_in_chans_rule(rule: str) -> None:
    """Raise `ModelError` unless `rule` is an `InChansRule`."""
    rules = get_args(InChansRule)
    if rule not in rules:
        raise ModelError(f"in_chans_rule: got '{rule}', allowed: {', '.join(rules)}{did_you_mean(rule, rules)}")


def adapt_first_conv(
    weight: Tensor,
    fresh: Tensor,
    rule: InChansRule = "repeat",
    rgb_bands: Sequence[int] | None = None,
) -> tuple[Tensor, str]:
    """Make kernels for n bands from kernels for m bands.

    - ``repeat``: the kernels in turn, R G B R G B ..., times m/n, so that equal bands give the same response as before
      (timm's rule).
    - ``mean``: every band gets the mean kernel, times m/n.
    - ``zero``: the m kernels as they are, and zeros for the other bands: the network first sees only RGB.
    - ``random``: the m kernels as they are; the other bands keep their random initialisation.

    As many bands as kernels only change their places. One band always gets the sum of the kernels, because a grey image
    is R = G = B. With fewer bands than kernels no band is left for ``zero`` and ``random``, and they do what ``repeat``
    does.

    Args:
        weight: (O, m, kH, kW), from the file.
        fresh: (O, n, kH, kW), as initialised.
        rule: See above.
        rgb_bands: Which of the n bands take kernels 0, 1, .. m-1, for example (3, 2, 1) for red, green and blue of
            Sentinel-2; the first m bands if None. Not for ``mean``, and not with fewer bands than kernels.

    Returns:
        The (O, n, kH, kW) kernels, and the rule in words.

    Raises:
        ModelError: If `rgb_bands` does not name m different bands below n.
    """
    m, n = weight.shape[1], fresh.shape[1]
    names = "RGB kernels" if m == 3 else f"kernels of {m} bands"
    if m == n and (rgb_bands is None or tuple(rgb_bands) == tuple(range(n))):
        return weight.to(fresh.dtype), f"{names} as they are"
    kernels = weight.to(torch.float32)
    if rgb_bands is not None and m <= n:
        bands = [int(band) for band in rgb_bands]
        if len(bands) != m or len(set(bands)) != m or not all(0 <= band < n for band in bands):
            raise ModelError(f"rgb_bands: must name {m} different bands between 0 and {n - 1}, got {list(rgb_bands)}")
    else:
        bands = list(range(min(m, n)))
    placed = f" on bands {', '.join(map(str, bands))}" if rgb_bands is not None and m <= n else ""

    if m == n:
        out, text = torch.empty_like(kernels), f"{names}{placed}"
        out[:, bands] = kernels
    elif n == 1:
        out, text = kernels.sum(1, keepdim=True), f"{names} summed for one band"
    elif rule == "mean":
        out = kernels.mean(1, keepdim=True).expand(-1, n, -1, -1) * (m / n)
        text = f"{names} averaged, repeated x{n}, scaled by {m}/{n}"
    elif rule == "repeat" or n < m:
        source = [-1] * n
        for kernel, band in enumerate(bands):
            source[band] = kernel
        turn = 0
        for band in range(n):
            if source[band] < 0:
                source[band], turn = turn % m, turn + 1
        out = kernels[:, source] * (m / n)
        text = f"{names}{placed} repeated in turn for {n} bands, scaled by {m}/{n}"
    else:
        out = (
            torch.zeros_like(fresh, dtype=torch.float32) if rule == "zero" else fresh.detach().to(torch.float32).clone()
        )
        out[:, bands] = kernels.to(out.device)
        rest = "zero" if rule == "zero" else "randomly initialised"
        text = f"{names}{placed or ' on the first ' + str(m) + ' bands'}, the other {n - m} bands {rest}"
    return out.to(fresh.dtype).contiguous(), text


# -- names -------------------------------------------------------------------------------------------------------------


def strip_prefix(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[State, State]:
    """Take the prefix off under which most of the model's keys are found; return (inside, outside of it)."""
    votes: Counter[str] = Counter()
    for name in state:
        start = 0
        while True:
            if name[start:] in wanted:
                votes[name[:start]] += 1
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    if not votes:
        return dict(state), {}
    prefix = max(votes, key=lambda p: (votes[p], -len(p)))
    inside = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
    outside = {name: t for name, t in state.items() if not name.startswith(prefix)}
    return inside, outside


def rename_published_plus(state: State, model: nn.Module, source: str) -> State:
    """Name the stem of a file of the published Res2NetPlus code (res2fg.py) as `res2netplus50_res2fg` does.

    Its stem is three modules of convolution, Mish, BN; ours is timm's ``conv1`` and ``bn1``::

        conv1.0 -> conv1.0    conv2.0 -> conv1.3    conv3.0 -> conv1.6     (convolutions)
        conv1.2 -> conv1.2    conv2.2 -> conv1.5    conv3.2 -> bn1         (BatchNorm)

    Its first version put the BN before Mish (``conv1.1``), and so computes something else under nearly the same names.
    `res2netplus50` has the same tensors as `res2netplus50_res2fg` and computes something else from them, so only the
    names can tell that a file is of this code.
    """
    if not {"conv1.0.weight", "conv2.0.weight", "conv3.0.weight"} <= state.keys():
        return state
    if "conv1.1.running_mean" in state:
        raise ModelError(
            f"{source}: written by the first version of res2fg.py, which normalises before Mish; no registered variant "
            "computes that, so train again with 'res2netplus50'"
        )
    if architecture_of(model) != "res2netplus50_res2fg":
        raise ModelError(
            f"{source}: written by the published Res2NetPlus code, which does not compute '{architecture_of(model)}'; "
            "the file fits 'res2netplus50_res2fg'"
        )
    moves = {
        "conv1.0": "conv1.0",
        "conv1.2": "conv1.2",
        "conv2.0": "conv1.3",
        "conv2.2": "conv1.5",
        "conv3.0": "conv1.6",
        "conv3.2": "bn1",
    }
    out: State = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        out[f"{moves[module]}.{leaf}" if module in moves else name] = tensor
    return out


def drop_dead_projections(state: State, model: nn.Module) -> tuple[State, State]:
    """Split off the projections of the authors' DLA trees that are computed and then overwritten.

    A tree of several levels projects its shortcut, and the tree inside it does so again. timm builds the inner one
    only, with the same name and result.
    """
    dead = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.+)\.project\.[01]\.\w+", name)
        if (
            match
            and _has(model, f"{match[1]}.tree1.tree1")
            and isinstance(model.get_submodule(f"{match[1]}.project"), nn.Identity)
        ):
            dead[name] = tensor
    return {name: t for name, t in state.items() if name not in dead}, dead


# -- the two parts that may differ -------------------------------------------------------------------------------------


def fit_classifier(
    state: State, wanted: Mapping[str, Tensor], model: nn.Module
) -> tuple[State, str, set[str], set[str]]:
    """Keep the file's classifier or leave it out.

    Returns:
        The remaining tensors, the decision in words, the model's tensors that stay as initialised, and the file's that
        are left out.
    """
    names = _classifier_names(model)

    def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            k: t
            for k, t in tensors.items()
            if k.rpartition(".")[0] in names and k.rpartition(".")[2] in ("weight", "bias")
        }

    theirs, ours = of(state), of(wanted)
    if not theirs:
        text = "none in the file: as initialised" if ours else "none"
        return state, text, set(ours), set()
    if theirs.keys() == ours.keys() and all(theirs[k].shape == ours[k].shape for k in ours):
        return state, f"kept ({_classes(theirs)} classes)", set(), set()
    rest = {k: t for k, t in state.items() if k not in theirs}
    if not ours:
        return rest, f"left out: {_classes(theirs)} classes in the file, the model has none", set(), set(theirs)
    if _classes(theirs) == _classes(ours) or _features(theirs) != _features(ours):
        return state, "", set(), set()  # not a matter of classes: let the strict check speak
    return (
        rest,
        f"as initialised: {_classes(theirs)} classes in the file, {_classes(ours)} in the model",
        set(ours),
        set(theirs),
    )


def fit_first_conv(
    state: State, wanted: Mapping[str, Tensor], model: nn.Module, rule: InChansRule, rgb_bands: Sequence[int] | None
) -> str:
    """Adapt the first convolution in `state` to the model's bands, in place, and say how."""
    texts = []
    for name in _first_conv_names(model):
        key = f"{name}.weight"
        theirs, ours = state.get(key), wanted.get(key)
        if theirs is None or ours is None or theirs.ndim != 4 or ours.ndim != 4:
            continue
        moved = rgb_bands is not None and len(rgb_bands) == ours.shape[1] and list(rgb_bands) != sorted(rgb_bands)
        if theirs.shape == ours.shape and not moved:
            continue
        if theirs.shape[0] == ours.shape[0] and theirs.shape[2:] == ours.shape[2:]:
            state[key], text = adapt_first_conv(theirs, ours, rule, rgb_bands)
            texts.append(text)
    return texts[0] if texts else ""


def _classifier_names(model: nn.Module) -> set[str]:
    """Return the names of the classifier's modules, from timm's configuration of the model."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return {names} if isinstance(names, str) else set(names)


def _first_conv_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the convolutions that read the image, from timm's configuration of the model."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def architecture_of(model: nn.Module) -> str:
    """Return the registered name of `model`, or its class's."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _classes(classifier: Mapping[str, Tensor]) -> int:
    """Return the number of outputs of a classifier."""
    return int(next(iter(classifier.values())).shape[0])


def _features(classifier: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of what a classifier reads."""
    return next((tuple(t.shape[1:]) for k, t in classifier.items() if k.endswith(".weight")), ())


# -- saying what does not fit ------------------------------------------------------------------------------------------


def fitting_variant(state: Mapping[str, Tensor], like: str) -> str | None:
    """Return the registered variant whose tensors are those of `state`, classifier and number of bands apart.

    Args:
        state: Tensors with the keys of a backbone, without a prefix.
        like: The variants with the nearest names are tried first; it is not an answer itself.

    Returns:
        Its name, or None if no variant of the family fits.
    """
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    nearest = sorted(_family(), key=lambda name: -difflib.SequenceMatcher(None, like, name).ratio())
    return next((name for name in nearest if name != like and _Variant.of(name).fits(shapes)), None)


def mismatch(
    source: str,
    model: nn.Module,
    state: State,
    wanted: Mapping[str, Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
    unequal: Sequence[str],
) -> str:
    """Say in one line which tensors do not fit, and which registered variant would."""
    arch = architecture_of(model)
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({few(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} do not belong there ({few(unexpected)})")
    if unequal:
        shown = [f"{n} is {_shape(state[n])} in the file and {_shape(wanted[n])} in the model" for n in unequal]
        parts.append(f"{len(unequal)} have another shape ({few(shown, 2)})")
    fits = fitting_variant(state, arch)
    advice = f"the file fits '{fits}'" if fits else "no registered variant fits the file either"
    return f"{source}: does not fit '{arch}': {'; '.join(parts)}; {advice}"


class _SkipRandom(TorchFunctionMode):
    """Skips random initialisation, which takes most of the time of building a network that has no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor as it is where it would be drawn, and call everything else."""
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@functools.cache
def without_memory(name: str) -> nn.Module:
    """Return the network with its default options, on the meta device; it is shared, so leave it as it is."""
    with torch.device("meta"), _SkipRandom():
        return timm.create_model(name)


@dataclass(frozen=True)
class _Variant:
    """The shapes of a registered variant, and which of them may differ."""

    shapes: Mapping[str, tuple[int, ...]]
    classifiers: frozenset[str]
    first_convs: frozenset[str]

    @staticmethod
    @functools.cache
    def of(name: str) -> _Variant:
        """Note the shapes of the variant."""
        model = without_memory(name)
        shapes = {k: tuple(t.shape) for k, t in model.state_dict().items()}
        firsts = frozenset(f"{n}.weight" for n in _first_conv_names(model))
        return _Variant(shapes, frozenset(_classifier_names(model)), firsts)

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file with these shapes is of this variant, classifier and bands apart."""
        return self._comparable(shapes) == self._comparable(self.shapes)

    def _comparable(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Leave out what may differ."""
        return {
            name: shape[:1] + shape[2:] if name in self.first_convs else shape
            for name, shape in shapes.items()
            if name.rpartition(".")[0] not in self.classifiers and not name.endswith("num_batches_tracked")
        }


@functools.cache
def _family() -> tuple[str, ...]:
    """Return the names to compare a file with: ours, timm's of the same families, and the ResNets behind them."""
    ours = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("r2kit.")]
    baselines = ["resnet50", "resnet50d", "resnet101", "resnet101d", "resnet152"]
    return tuple(sorted({*ours, *timm.list_models(module=["res2net", "resnest", "dla"]), *baselines}))


def _has(model: nn.Module, name: str) -> bool:
    """Whether `model` has a submodule of that name."""
    return any(n == name for n, _ in model.named_modules())


def _shape(tensor: Tensor) -> str:
    """Return a shape for a person: ``32x3x3x3``."""
    return "x".join(map(str, tensor.shape)) or "a number"
