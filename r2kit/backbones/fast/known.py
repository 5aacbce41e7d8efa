"""What was found out about a module, remembered until anything in it changes.

To look at every part of a unit of a network takes longer than to ask whether all is as it was: the same tensors in the
same places, the same numbers and names, modules of the same classes, no hook more or less. Whoever holds anything of
which that cannot be said (a tensor that is no parameter, a function, a list, a number of another library) is looked at
anew each time. What tensors hold does not matter: it is read where they lie.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from r2kit.backbones.mish import MishBeta

Found = TypeVar("Found")

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""What makes a module do more than its `forward`."""
_STATES = 4  # that are remembered of a module: it is trained and evaluated in turn
_PLAIN = frozenset((bool, int, float, str, type(None)))
_SLOTS = frozenset(name for name, value in nn.Module().__dict__.items() if type(value) not in _PLAIN) | {
    "_reversed_padding_repeated_twice"  # made from `padding`
}
"""What every module has, and is looked at by name or says nothing about what it computes."""


class _Known(NamedTuple):
    """What was found out about a module: for its tensors, in each of its states."""

    tensors: list[Any]
    states: dict[tuple[Any, ...], Any]


_NOTHING: Any = object()
_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


class _UnknownError(Exception):
    """A module holds what nobody here knows the meaning of."""


def remembered(module: nn.Module, dtype: torch.dtype, make: Callable[[], Found]) -> Found:
    """Return what `make` returns, from before if nothing has changed since.

    Args:
        module: What it looks at.
        dtype: Of what the module is given.
        make: Called without arguments.
    """
    tensors: list[Any] = []
    values: list[Any] = [dtype]
    try:
        _describe(module, tensors, values)
        state, known = tuple(values), _KNOWN.get(module)
        if known is None or known.tensors != tensors:  # other weights: those from before are let go
            known = _KNOWN[module] = _Known(tensors, {})
    except _UnknownError:
        forget(module)
        return make()
    found: Found = known.states.get(state, _NOTHING)
    if found is _NOTHING:
        found = make()
        for old in list(known.states)[: 1 - _STATES]:
            known.states.pop(old, None)
        known.states[state] = found
    return found


def forget(module: nn.Module) -> None:
    """Let go of what was found out about a module, and of its tensors with it."""
    _KNOWN.pop(module, None)


def _describe(module: nn.Module, tensors: list[Any], values: list[Any]) -> None:
    """Collect what a module and those in it are made of.

    Args:
        module: That one.
        tensors: Which tensors there are, where they lie and how.
        values: Everything else.

    Raises:
        _UnknownError: If it holds anything of which nobody can say whether it has changed.
    """
    own = module.__dict__
    if "_parameters" not in own:  # a scripted one keeps its own elsewhere
        raise _UnknownError
    values.append(type(module))
    for name, value in own.items():
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(one) in _PLAIN for one in value)):
            values += (name, value)
        elif name not in _SLOTS:
            raise _UnknownError
    values += [bool(own[hooks]) for hooks in HOOKS]
    for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
        if tensor is None:
            tensors.append(None)
        elif type(tensor) not in (nn.Parameter, Tensor) or tensor.layout is not torch.strided:
            raise _UnknownError
        elif (
            tensor.grad_fn is not None or tensor.__dict__
        ):  # what it was made from, or holds on to, is not ours to keep
            raise _UnknownError
        else:
            tensors += (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.shape)
    if type(module) is MishBeta:
        values.append(float(module.beta))
    for name, child in own["_modules"].items():
        values.append(name)
        if child is not None:
            _describe(child, tensors, values)
