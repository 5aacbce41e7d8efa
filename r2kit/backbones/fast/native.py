"""Compiles the C++ kernels of this folder once, keeps them on disk, and calls them through ctypes.

A kernel file is a Python module with its source in a string. The library is compiled for the very processor it runs on,
against nothing but the C++ standard library and OpenMP, so that compiling takes a few seconds and no Python or torch
headers are needed. The file name is made from the source, the compiler's version and the processor's abilities: what
fits is found again, what does not is compiled anew. Where there is no compiler, `NativeUnavailableError` says so, and
the caller keeps the plain form.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2kit.cache import cache_folder

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")


class NativeUnavailableError(Exception):
    """The kernels cannot be compiled or loaded here; the text is one line that says why."""


@functools.cache
def load(source: str) -> ctypes.CDLL:
    """Return the library made from `source`, compiling it if no earlier process has.

    The first call with a source takes a few seconds, later ones some hundredths of a second.

    Raises:
        NativeUnavailableError: If there is no compiler, it fails, or the library cannot be loaded.
    """
    compiler, macros = _compiler()
    name = hashlib.sha256("\n".join((source, *_FLAGS, macros)).encode()).hexdigest()[:20]
    library = cache_folder() / "kernels" / f"{name}.so"
    if not library.is_file():
        _compile(compiler, source, library)
    try:
        # torch is loaded already, so the OpenMP library is torch's own and there is one pool of threads.
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailableError(f"the compiled kernels cannot be loaded: {error}") from None


class Call(NamedTuple):
    """One call of a kernel.

    Attributes:
        function: Of a library.
        args: Its first argument, handed over by reference; every field takes eight bytes.
        more: Numbers that it takes besides.
    """

    function: Any
    args: ctypes.Structure
    more: tuple[int, ...]


class Heard(NamedTuple):
    """What a thread did.

    Attributes:
        calls: Of kernels.
        pieces: Room that it made for them.
    """

    calls: list[Call]
    pieces: list[Tensor]


class _Listener(threading.local):
    heard: Heard | None = None


_LISTENER = _Listener()


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Collect what this thread calls and what room it makes meanwhile; the room is kept so long."""
    before, _LISTENER.heard = _LISTENER.heard, Heard([], [])
    try:
        yield _LISTENER.heard
    finally:
        _LISTENER.heard = before


def hear_of(piece: Tensor) -> None:
    """Tell whoever listens of room that was made."""
    if _LISTENER.heard is not None:
        _LISTENER.heard.pieces.append(piece)


def call(source: str, name: str, dtype: torch.dtype, args: ctypes.Structure, *more: int) -> None:
    """Call a kernel.

    Args:
        source: Of its library.
        name: Of its function, less the type behind it.
        dtype: 32- or 64-bit floats.
        args: Its first argument.
        more: Numbers that it takes besides.
    """
    function = function_of(source, name, dtype)
    if _LISTENER.heard is not None:
        _LISTENER.heard.calls.append(Call(function, args, more))
    function(ctypes.byref(args), *more)


@functools.cache
def function_of(source: str, name: str, dtype: torch.dtype) -> Any:
    """Return a kernel: of its library, under its name and the type behind it."""
    function = getattr(load(source), f"{name}_{'float' if dtype == torch.float32 else 'double'}")
    function.argtypes, function.restype = (ctypes.c_void_p,), None  # an address is no int; what follows is
    return function


def has_wide_vectors() -> bool:
    """Whether the kernels use vectors of 64 bytes (AVX-512).

    Raises:
        NativeUnavailableError: If there is no compiler.
    """
    return "#define __AVX512F__ " in _compiler()[1]


def threads() -> int:
    """Return the number of threads a kernel should use: torch's."""
    return torch.get_num_threads()


@functools.cache
def _compiler() -> tuple[str, str]:
    """Return a compiler and its macros, which hold its version and what -march=native means on this processor."""
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise NativeUnavailableError("no C++ compiler found (g++ or clang++)")
    return compiler, _run([compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])


def _compile(compiler: str, source: str, library: Path) -> None:
    """Compile into a draft and rename it, so that processes that start together never see half a file."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            code, draft = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            code.write_text(source, encoding="utf-8")
            _run([compiler, *_FLAGS, str(code), "-o", str(draft)])
            os.replace(draft, library)
    except OSError as error:
        raise NativeUnavailableError(f"{library.parent}: {error.strerror or error}") from None


def _run(command: list[str]) -> str:
    """Return what a compiler prints.

    Raises:
        NativeUnavailableError: If it cannot be started or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
        raise NativeUnavailableError(f"{command[0]} failed: {first}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{command[0]}: {error}") from None
    return done.stdout
