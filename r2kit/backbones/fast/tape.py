"""Calls of kernels written down once and made again.

A unit of a network calls some dozen kernels, and around each stands Python that finds the kernel, makes room and fills
in its arguments. For maps of one size all that comes out the same every time but for the places in memory. So the
second time the calls are written down, with where each pointer comes from: from what the function is given, from room
it made, or from what stays where it is (weights, statistics). From then on room is made, the pointers are filled in,
and the kernels are called. Room that is not handed out is one piece, in which values lie over each other that are not
needed at the same time.

What was written down holds only for the same function, sizes, strides and constants; the caller answers for that with
a key. A function that does anything else than to call kernels, to make room and to look at parts of tensors, be it that
torch computes something, is not written down, and runs as it stands each time.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from r2kit.backbones.fast import memory, native

Values = tuple[Tensor | None, ...]

_WORD = 8  # bytes; every field of a kernel's arguments is a number or a pointer of that size
_LINE = 65 * 64  # values in the common piece begin with a line of the cache, and not all at one place of the first one
_MOST = 16  # keys that one `Tapes` keeps: a size of images has one at inference and two in training

_LOOKS = frozenset(
    f"aten::{name}"
    for name in (
        *("alias", "as_strided", "detach", "empty", "empty_strided", "expand", "flatten", "lift_fresh", "narrow"),
        *("new_empty", "permute", "_reshape_alias", "select", "set_", "slice", "split", "squeeze", "t", "transpose"),
        *("unbind", "unsqueeze", "view"),
    )
)
"""Operators that compute nothing."""


class _Watch(TorchDispatchMode):
    """Notice whether torch computes anything."""

    computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in _LOOKS:
            self.computed = True
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Output:
    """Where a value that is handed out lies: some input as it is, or a part of a piece."""

    source: int  # an input, or a piece counted from the last input on
    geometry: tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]] | None  # offset, shape and strides in values


class _NotOnTapeError(Exception):
    """A pointer leads to where nobody knows what will stand next time."""


class Tape:
    """Some calls of kernels; see the module. Threads may play one at the same time.

    Args:
        calls: As heard from `native`.
        pieces: Room made meanwhile, likewise.
        inputs: What the function was given.
        outputs: What it returned.
        constants: Tensors that it may read and write, and that stay where they are.

    Raises:
        _NotOnTapeError: If a pointer or an output leads elsewhere.
    """

    def __init__(
        self,
        calls: Sequence[native.Call],
        pieces: Sequence[Tensor],
        inputs: Values,
        outputs: Values,
        constants: Iterable[Tensor | None],
    ) -> None:
        if not calls:
            raise _NotOnTapeError
        spans = [_span(t) for t in inputs]
        fixed = [_span(t) for t in constants if t is not None]
        _refuse_overlaps(spans, fixed)
        known = [*spans, *(_span(piece) for piece in pieces)]
        self._calls: list[tuple[Any, int, tuple[Any, ...]]] = []
        words: list[np.ndarray] = []
        at: list[int] = []
        sources: list[int] = []
        offsets: list[int] = []
        used: dict[int, tuple[int, int]] = {}  # first and last call that a piece is used in
        length = 0
        for number, call in enumerate(calls):
            found = np.frombuffer(bytes(call.args), np.int64).copy()
            for place in _pointers(type(call.args)):
                pointer = int(found[place])
                if pointer == 0:
                    continue
                source = _find(pointer, known)
                if source is not None:
                    at.append(length + place)
                    sources.append(source)
                    offsets.append(pointer - known[source][0])
                    if source >= len(inputs):
                        used[source] = (used.get(source, (number, number))[0], number)
                elif _find(pointer, fixed) is None:
                    raise _NotOnTapeError
            self._calls.append((call.function, length * _WORD, call.more))
            words.append(found)
            length += len(found)
        self._words = np.concatenate(words)
        self._at, self._offsets = np.array(at), np.array(offsets, np.int64)
        self._outputs = [None if t is None else _output(t, known, len(inputs)) for t in outputs]
        handed = {output.source for output in self._outputs if output is not None}
        self._handed = {source: known[source][1] for source in sorted(handed) if source >= len(inputs)}
        inner = {source: span for source, span in used.items() if source not in handed}
        self._common, places = _lay_out({source: (known[source][1], *span) for source, span in inner.items()})
        # Where a pointer's piece begins: an input, a piece of its own, or a place in the common one.
        own = {source: len(inputs) + i for i, source in enumerate(self._handed)}
        common = len(inputs) + len(own)
        self._which = np.array([s if s < len(inputs) else own.get(s, common) for s in sources], np.int64)
        self._offsets += np.array([places.get(source, 0) for source in sources], np.int64)

    def play(self, inputs: Values) -> Values:
        """Call the kernels for other inputs, of the sizes and strides of the first ones, and return the outputs."""
        storages = {source: memory.storage(size) for source, size in self._handed.items()}
        common = memory.storage(self._common) if self._common else None
        bases = [0 if t is None else t.data_ptr() for t in inputs]
        bases += [storage.data_ptr() for storage in storages.values()]
        bases.append(0 if common is None else common.data_ptr())
        words = self._words.copy()
        words[self._at] = np.array(bases, np.int64)[self._which] + self._offsets
        start = words.ctypes.data
        for function, offset, more in self._calls:
            function(start + offset, *more)
        outputs: list[Tensor | None] = []
        for output in self._outputs:
            if output is None:
                outputs.append(None)
            elif output.geometry is None:
                outputs.append(inputs[output.source])
            else:
                dtype, offset, shape, strides = output.geometry
                made = torch.empty(0, dtype=dtype, device="cpu")  # whatever the default device is
                outputs.append(made.set_(storages[output.source], offset, shape, strides))
        return tuple(outputs)


class Tapes:
    """The tapes of one unit, by key: what comes again with a key a third time is played."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Tape | bool] = {}  # True: seen once; False: cannot be written down

    def run(
        self,
        key: Hashable,
        function: Callable[..., Values],
        inputs: Values,
        constants: Iterable[Tensor | None],
    ) -> Values:
        """Return ``function(*inputs)``.

        Args:
            key: Everything that its calls depend on, but for the values in memory and their places.
            function: Calls kernels and returns tensors.
            inputs: On a CPU, or None.
            constants: Tensors that it may read and write besides, and that stay where they are.
        """
        tape = self._found.get(key)
        if isinstance(tape, Tape):
            return tape.play(inputs)
        if tape is False:
            return function(*inputs)
        if tape is None:  # a size that comes once is not worth writing down
            if len(self._found) >= _MOST:
                self._found.clear()
            self._found[key] = True
            return function(*inputs)
        outputs, made = _record(function, inputs, constants)
        self._found[key] = False if made is None else made
        return outputs


def _record(
    function: Callable[..., Values], inputs: Values, constants: Iterable[Tensor | None]
) -> tuple[Values, Tape | None]:
    """Run a function and return what it returned, and its calls if they can be made again."""
    with native.listening() as heard, _Watch() as watch:
        outputs = function(*inputs)
    if watch.computed:
        return outputs, None
    try:
        return outputs, Tape(heard.calls, heard.pieces, inputs, outputs, constants)
    except _NotOnTapeError:
        return outputs, None


def _span(tensor: Tensor | None) -> tuple[int, int]:
    """Return where a tensor begins and how many bytes it reaches over."""
    if tensor is None or tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _refuse_overlaps(inputs: Sequence[tuple[int, int]], constants: Sequence[tuple[int, int]]) -> None:
    """Inputs that lie over each other or over a constant this time might not do so the next.

    Raises:
        _NotOnTapeError: If some do.
    """
    pairs = [*itertools.combinations(inputs, 2), *itertools.product(inputs, constants)]
    if any(a < b + b_size and b < a + a_size for (a, a_size), (b, b_size) in pairs):
        raise _NotOnTapeError


def _find(pointer: int, spans: Sequence[tuple[int, int]]) -> int | None:
    return next((i for i, (start, size) in enumerate(spans) if start <= pointer < start + size), None)


def _pointers(args: type[ctypes.Structure], start: int = 0) -> list[int]:
    """Return which words of a kernel's arguments are pointers."""
    found = []
    for name, kind, *_ in args._fields_:
        place = start + getattr(args, name).offset // _WORD
        if kind is ctypes.c_void_p:
            found.append(place)
        elif issubclass(kind, ctypes.Structure):
            found += _pointers(kind, place)
    return found


def _output(tensor: Tensor, known: Sequence[tuple[int, int]], inputs: int) -> _Output:
    source = _find(tensor.data_ptr(), known)
    if source is None:
        raise _NotOnTapeError
    start, size = known[source]
    offset = tensor.data_ptr() - start
    if source < inputs:
        if offset or _span(tensor)[1] != size:
            raise _NotOnTapeError
        return _Output(source, None)
    shape, strides = tuple(tensor.shape), tensor.stride()
    return _Output(source, (tensor.dtype, offset // tensor.element_size(), shape, strides))


def _lay_out(pieces: dict[int, tuple[int, int, int]]) -> tuple[int, dict[int, int]]:
    """Return the bytes that values need which are used from one call to another, and where each begins.

    Args:
        pieces: For each value its bytes, and its first and last call.
    """
    placed: list[tuple[int, int, int, int]] = []  # start, end, first, last
    places: dict[int, int] = {}
    for source, (size, first, last) in sorted(pieces.items(), key=lambda item: (item[1][1], item[0])):
        need, start = -(-size // _LINE) * _LINE, 0
        for begin, end, since, until in sorted(placed):
            if since <= last and first <= until and start + need > begin:
                start = max(start, end)
        placed.append((start, start + need, first, last))
        places[source] = start
    return max((end for _, end, _, _ in placed), default=0), places
