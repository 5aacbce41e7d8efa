"""Memory for what the fast form writes, kept from step to step and in large pages.

A step makes some hundred maps and gradients and frees nearly all of them. malloc gives much of that back to the system
and asks for it again in the next step, and each page of 4 kB is then cleared and mapped anew: at 64 px, batch 32, some
19,000 times. Here pieces are cut from arenas that stay, which the system is asked to hold in pages of 2 MB
(`madvise`): a piece is the smallest free one that is large enough, and joins its free neighbours when its tensor is
gone. Arenas that go unused while other sizes are at work are given back.

Small tensors, other devices and systems without such pages have torch's own memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque

import numpy as np
import torch
from torch import Tensor

from r2kit.backbones.fast import native

SMALLEST = 128 * 1024
"""Bytes; what is smaller malloc keeps by itself."""
_GRAIN = 65 * 64  # an odd number of cache lines, so that pieces do not all begin at one place of the first cache
_ARENA = 64 * 1024 * 1024
_PAGE = 2 * 1024 * 1024
_CALM = 16  # times that everything was free and less than half had been used since the last time


class _Lent(weakref.ref[np.ndarray]):
    """A piece in use; `Arenas` hears of it when its tensor is gone."""

    __slots__ = ("size", "start")
    start: int
    size: int


class Arenas:
    """Pieces of memory for tensors; see the module. Any thread may ask and free; a forked process has its own copy."""

    _SPAN = 1 << 48  # places are counted over all arenas, each with a range of its own, so that no two are neighbours

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin anew; tensors keep the memory they have. A forked process must: any thread may have held the lock."""
        self._lock = threading.Lock()
        self._back: deque[_Lent] = deque()  # filled wherever a tensor happens to be freed, in `take` too
        self._clear()

    def _clear(self) -> None:
        self._arenas: list[np.ndarray] = []
        self._by_size: list[tuple[int, int]] = []  # size and start of the free pieces
        self._starts: dict[int, int] = {}  # from the start of each free piece to its size
        self._ends: dict[int, int] = {}  # from its end to its start
        self._lent: dict[int, _Lent] = {}  # by their starts
        self._used: int = 0
        self._most: int = 0  # since everything was free
        self._calm: int = 0

    @property
    def capacity(self) -> int:
        """Bytes asked of the system."""
        return sum(len(arena) for arena in self._arenas)

    def take(self, size: int) -> np.ndarray:
        """Return `size` bytes, 64-byte aligned, whatever stood there.

        Raises:
            OSError: If the system has no more.
        """
        need = -(-size // _GRAIN) * _GRAIN
        with self._lock:
            self._collect()
            at = bisect_left(self._by_size, (need, 0))
            if at == len(self._by_size):
                self._grow(need)
                at = bisect_left(self._by_size, (need, 0))
            free, start = self._by_size[at]
            self._forget(free, start)
            if free > need:
                self._note(free - need, start + need)
            arena, offset = divmod(start, self._SPAN)
            piece = self._arenas[arena][offset : offset + size]
            lent = _Lent(piece, self._back.append)
            lent.start, lent.size = start, need
            self._lent[start] = lent
            self._used += need
            self._most = max(self._most, self._used)
        return piece

    def _collect(self) -> None:
        """Take back the pieces whose tensors are gone."""
        if not self._back:
            return
        while self._back:
            lent = self._back.popleft()
            del self._lent[lent.start]
            self._used -= lent.size
            start, size = lent.start, lent.size
            if (before := self._ends.get(start)) is not None:
                size += self._starts[before]
                start = before
                self._forget(self._starts[before], before)
            if (after := self._starts.get(lent.start + lent.size)) is not None:
                self._forget(after, lent.start + lent.size)
                size += after
            self._note(size, start)
        if not self._used:
            self._calm = self._calm + 1 if 2 * self._most < self.capacity else 0
            self._most = 0
            if self._calm >= _CALM:
                self._clear()

    def _grow(self, need: int) -> None:
        size = -(-max(need, _ARENA) // _PAGE) * _PAGE
        # Private: a forked process must not write where its parent computes.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # the system was built without them; kept memory is still a gain
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._arenas.append(np.frombuffer(memory, np.uint8))
        self._note(size // _GRAIN * _GRAIN, (len(self._arenas) - 1) * self._SPAN)

    def _note(self, size: int, start: int) -> None:
        insort(self._by_size, (size, start))
        self._starts[start] = size
        self._ends[start + size] = start

    def _forget(self, size: int, start: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, start))]
        del self._starts[start], self._ends[start + size]


ARENAS = Arenas()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: ARENAS.renew())
_HAS_PAGES = hasattr(mmap, "MADV_HUGEPAGE")


def storage(size: int) -> torch.UntypedStorage:
    """Return `size` bytes on the CPU, not filled."""
    if size >= SMALLEST and _HAS_PAGES:
        try:
            return torch.from_numpy(ARENAS.take(size)).untyped_storage()
        except OSError:  # torch says better than we that there is no memory
            pass
    return torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()


def empty(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return a new tensor, channels-last, not filled, with the type and the device of another one.

    Args:
        like: That one.
        shape: (B, C, H, W).
    """
    size = like.element_size()
    for side in shape:
        size *= side
    if size >= SMALLEST and like.device.type == "cpu":
        # Not a view of those bytes: autograd would refuse that in-place operators change it.
        made = torch.empty(0, dtype=like.dtype, device="cpu").set_(storage(size), 0, shape, _strides(shape))
    else:
        made = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    native.hear_of(made)
    return made


def small(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new contiguous tensor of a few values, not filled.

    Args:
        shape: Of any length.
        like: Its type and device are taken.
        dtype: In place of that type.
    """
    made = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    native.hear_of(made)
    return made


def empty_like(x: Tensor) -> Tensor:
    """Return a new tensor of the size of (B, C, H, W), channels-last, not filled."""
    batch, chans, height, width = x.shape
    return empty(x, (batch, chans, height, width))


def _strides(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the strides of channels-last memory."""
    _, chans, height, width = shape
    return height * width * chans, 1, width * chans, chans
