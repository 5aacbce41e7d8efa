"""Which part of a network a parameter belongs to: the stem, a stage, a block, or the head.

The home of the answer is timm's `group_matcher`; a network around a timm backbone (a decoder, a detector) is asked
through the backbone inside it, and everything outside the backbone is its head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import nn

Ordinal = tuple[float, ...]
_HEAD: Ordinal = (float("inf"),)


class Parts:
    """The parts of a network, numbered from the input to the head.

    Args:
        model: A network with timm's `group_matcher`, one that holds such a backbone or timm's `features_only` form of
            one, or any with timm's `get_classifier`, whose backbone is then one part.
        coarse: Stem, stages, head; else stem, blocks, head.

    Raises:
        ValueError: If no backbone is found.
    """

    def __init__(self, model: nn.Module, *, coarse: bool = True) -> None:
        prefix, backbone = _find_backbone(model)
        inside = _matcher(backbone, coarse)
        head = _classifier_names(model)

        def ordinal(name: str) -> Ordinal:
            return _HEAD if name in head or not name.startswith(prefix) else inside(name[len(prefix) :])

        # Norms without parameters of their own have statistics, which are frozen with their part.
        names = {name for name, _ in model.named_parameters()}
        names |= {f"{name}.weight" for name, module in model.named_modules() if is_norm(module)}
        self.number: dict[str, int] = group_with_matcher(
            ((name, name) for name in sorted(names)), ordinal, reverse=True
        )
        self.count: int = max(self.number.values()) + 1
        """Number of parts, the head included."""

    @property
    def head(self) -> int:
        """Number of the last part."""
        return self.count - 1

    def of_norm(self, name: str) -> int:
        """Return the part of a BatchNorm by its module's name."""
        return self.number[f"{name}.weight"]


class AsTimm:
    """What timm's functions for parameter groups ask of a network, for any network that `Parts` understands.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the network's parameters."""
        return self._model.named_parameters()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return what gives the number of a parameter's part."""
        return Parts(self._model, coarse=coarse).number.__getitem__


def is_norm(module: nn.Module) -> bool:
    """Whether the module keeps statistics of batches."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _find_backbone(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the prefix and the module of the backbone: the largest one that says what its stages are."""
    found = [(name, module) for name, module in model.named_modules() if _has_stages(module)]
    if found:
        name, module = max(found, key=lambda pair: _size(pair[1]))  # the outermost of equals: the first
        return f"{name}." if name else "", module
    if hasattr(model, "get_classifier"):
        return "", model
    raise ValueError("the network has no backbone that says what its stages are")


def _has_stages(module: nn.Module) -> bool:
    return hasattr(module, "group_matcher") or isinstance(getattr(module, "return_layers", None), dict)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _classifier_names(model: nn.Module) -> set[str]:
    """Return the names of the classifier's parameters; none where the network has no classifier."""
    if not hasattr(model, "get_classifier"):
        return set()
    classifier = model.get_classifier()  # type: ignore[operator]
    members = classifier if isinstance(classifier, tuple) else (classifier,)
    ids = {id(parameter) for member in members for parameter in member.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def _matcher(backbone: nn.Module, coarse: bool) -> Callable[[str], Ordinal]:
    """Return the place of a name within the backbone; names that nobody knows go to the end of the backbone."""
    if hasattr(backbone, "group_matcher"):
        return _compiled(backbone.group_matcher(coarse=coarse))  # type: ignore[operator]
    layers = getattr(backbone, "return_layers", None)
    if not isinstance(layers, dict):
        return lambda name: (0.0,)
    ends = [str(name) for name in layers]
    stage: dict[str, float] = {}
    for name, _ in backbone.named_children():  # in the order of the forward pass; a stage ends with its feature
        stage[name] = float(len([end for end in ends if end in stage]))

    def place(name: str) -> Ordinal:
        child, _, rest = name.partition(".")
        block = rest.partition(".")[0]
        whole = coarse or stage[child] == 0.0 or not block.isdigit()  # the stem is one
        return (stage[child],) if whole else (stage[child], float(block))

    return place


def _compiled(matcher: Any) -> Callable[[str], Ordinal]:
    """Return timm's matcher as a function; timm sends what no pattern matches to the end, and so does this."""
    if not isinstance(matcher, dict):
        return lambda name: _tuple(matcher(name))
    patterns: list[tuple[re.Pattern[str], int, Iterable[float] | None]] = []
    for position, entry in enumerate(matcher.values()):
        for pattern, suffix in entry if isinstance(entry, tuple | list) else [(entry, None)]:
            if pattern is not None:
                patterns.append((re.compile(pattern), position, suffix))

    def place(name: str) -> Ordinal:
        for pattern, position, suffix in patterns:
            if match := pattern.match(name):
                numbers = (float(group) for group in match.groups() if group is not None)
                return (float(position), *numbers, *(suffix or ()))
        return (float(len(matcher)), *MATCH_PREV_GROUP)  # with whatever comes last before the head

    return place


def _tuple(value: Any) -> Ordinal:
    return tuple(value) if isinstance(value, Iterable) else (value,)
