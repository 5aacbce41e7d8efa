"""Checkpoint files: written whole or not at all, each with a checksum, the one before kept."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from r2kit.errors import RunError

# A checkpoint of torch is a zip file, and a zip file may end in a comment: there the checksum stands. One file holds
# both, so no kill can leave a checkpoint with the checksum of another; torch and unzip read it as any other.
_MARK = b"r2kit sha256 "
_COMMENT = len(_MARK) + 64
_END = 2 + _COMMENT  # the two bytes of the comment's length, and the comment


def write_checkpoint(
    state: dict[str, Any], path: Path, *, previous: Path | None = None, also: Path | None = None
) -> None:
    """Write a checkpoint so that a kill, or a full disk, at any moment leaves the files of before or the new one.

    Args:
        state: Tensors and plain values.
        path: The file; its folder must exist.
        previous: Where the file of before goes; None replaces it.
        also: A second name for the same checkpoint, in place before `path` is.

    Raises:
        RunError: If the file cannot be written; what stood at the three paths still stands there.
    """
    draft = path.with_name(f".{path.name}.part")
    twin = None if also is None else also.with_name(f".{also.name}.part")
    try:
        draft.unlink(missing_ok=True)  # what a kill left behind; were it a link, its file would be written over
        with draft.open("wb") as file:
            torch.save(state, file)
        _seal(draft)
        if also is not None and twin is not None:
            twin.unlink(missing_ok=True)
            _link(draft, twin)
            os.replace(twin, also)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(draft, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into a RuntimeError
        for part in (draft, twin):
            if part is not None:
                part.unlink(missing_ok=True)  # gives a full disk its room back
        if isinstance(error, RuntimeError) and _reason(error) is None:
            raise
        raise RunError(
            f"{path}: the checkpoint cannot be written: {_reason(error)}; those of before are untouched: make "
            f"room, or make the folder writable, and go on with r2kit resume {path.parent.parent}"
        ) from None


def is_whole(path: Path) -> bool:
    """Whether a file holds what its checksum was made of: not half-written, no bit flipped."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - _END
            if size <= 0:
                return False
            file.seek(size)
            end = file.read()
            if end[:2] != struct.pack("<H", _COMMENT) or not end[2:].startswith(_MARK):
                return False
            return _digest(file, size) == end[2 + len(_MARK) :]
    except OSError:
        return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint, on the CPU.

    Raises:
        RunError: If the file is missing, half-written or damaged, or holds code.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint; start again with r2kit finetune ... --overwrite")
    if not is_whole(path):
        raise RunError(
            f"{path}: damaged: it does not match its checksum; start again with r2kit finetune ... --overwrite"
        )
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(
            f"{path}: holds something else than tensors and plain values, and opening that could run code; start again "
            "with r2kit finetune ... --overwrite"
        ) from error
    return content


def first_whole(candidates: Iterable[Path]) -> tuple[Path | None, list[Path]]:
    """Return the first checkpoint that is whole, None if there is none, and the damaged ones before it."""
    damaged: list[Path] = []
    for path in candidates:
        if is_whole(path):
            return path, damaged
        if path.exists():
            damaged.append(path)
    return None, damaged


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to a file, by `write_checkpoint` and `read_checkpoint`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: dict[str, Path | None] | None = None
    ) -> None:
        """Write a checkpoint; `storage_options` are the keyword arguments of `write_checkpoint`."""
        write_checkpoint(checkpoint, Path(path), **(storage_options or {}))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, on the CPU, never running code from it."""
        return read_checkpoint(Path(path))


def _seal(path: Path) -> None:
    """Put the checksum behind a zip file without a comment, and the whole on the disk."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END) - 2
        digest = _digest(file, size)
        file.seek(size)
        file.write(struct.pack("<H", _COMMENT) + _MARK + digest)
        file.flush()
        os.fsync(file.fileno())


def _digest(file: Any, size: int) -> bytes:
    """Return the SHA-256 of the first `size` bytes of an open file, in hexadecimal."""
    file.seek(0)
    sha = hashlib.sha256()
    while size > 0:
        block = file.read(min(size, 1 << 20))
        if not block:
            break
        sha.update(block)
        size -= len(block)
    return sha.hexdigest().encode()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, so that a power cut does not undo a rename."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException | None) -> str | None:
    """Return what the operating system said, from an error or from those that led to it; None if it said nothing."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__context__
    return None
