"""A run folder belongs to one live run."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks, and goes without
    fcntl = None  # type: ignore[assignment]

from r2kit.errors import RunError

NAME = ".lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run folder, made where it is missing, as long as the block runs or the process lives.

    The lock is the operating system's and ends with the process, however that ends, so none is ever stale. It is one
    that child processes do not inherit: the loader processes of a killed run, which need a moment to notice, do not
    keep it.

    Raises:
        RunError: If a live run holds the folder, or it cannot be written.
    """
    path = folder / NAME
    if fcntl is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link, perhaps a stranger's: what is opened here is emptied below.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; give another --out") from None
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder}: in use by a live run ({_holder(path)}); wait for it, or stop it") from None
        if not _is_file(handle, path):  # its holder took the file away between our two calls
            raise RunError(f"{folder}: another run ended there this moment; try again")
        who = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(who).encode())
        try:
            yield
        finally:
            with suppress(OSError):  # a folder that became read-only keeps the file, which holds nobody up
                path.unlink()
    finally:
        os.close(handle)


def _holder(path: Path) -> str:
    """Say who wrote a lock file."""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"


def _is_file(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except OSError:
        return False
