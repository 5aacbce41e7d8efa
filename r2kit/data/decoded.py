"""Decoded images on disk, for files that cost more to decode than to read: compressed rasters, large JPEGs.

A file's place in the cache is made from its path, size and modification time and from what is read of it: a changed
file has another place, so that nothing is out of date. Images appear whole or not at all (written aside, then renamed),
so that any number of processes share one cache. It stays below a limit: the images of one source either all fit or are
not cached, and where a new source needs the room, those written longest ago give way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r2kit.cache import cache_folder
from r2kit.data.stacks import files_of

_FORMAT = 1  # raise when the reader starts to give other pixels for the same file


class DecodedImages:
    """The cache of one source; picklable for loader processes.

    Args:
        expected: Bytes of all images of the source once decoded.
        limit: Largest size of the whole cache in bytes.
        what: What is read of a file besides its path, e.g. the bands.

    Attributes:
        active: Whether the images fit below the limit, so that they are cached at all.
    """

    def __init__(self, expected: int, limit: int, what: Any) -> None:
        self.folder = cache_folder() / "decoded"
        self.active = 0 < expected <= limit
        self._keep = limit - expected
        self._what = repr((_FORMAT, what))

    def make_room(self) -> None:
        """Delete what was written longest ago, so that all images of the source fit below the limit."""
        _make_room(self.folder, self._keep)

    def read(self, path: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the decoded image of a file from the cache, else decode and keep it.

        Args:
            path: The file.
            decode: Decodes it; what it raises, this raises.

        Raises:
            DataError: As `decode` does; also for a file that has gone.
        """
        if not self.active:
            return decode()
        try:
            stamps = [os.stat(file) for file in files_of(path)]
        except OSError:
            return decode()  # which says what is wrong with it
        stamp = "\0".join(f"{status.st_size}\0{status.st_mtime_ns}" for status in stamps)
        stamp = f"{os.path.abspath(path)}\0{stamp}\0{self._what}"
        name = hashlib.sha256(stamp.encode()).hexdigest()
        place = self.folder / name[:2] / f"{name}.npy"
        try:
            image: np.ndarray = np.load(place, allow_pickle=False)
            return image
        except (OSError, ValueError, EOFError):  # not there yet, or damaged
            image = decode()
        draft = place.with_name(f".{name}.{os.getpid()}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                np.save(file, image, allow_pickle=False)
            os.replace(draft, place)
        except OSError:  # a full or read-only disk costs only time
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        return image


def trial(paths: Sequence[str], decode: Callable[[str], np.ndarray]) -> tuple[float, float]:
    """Return the median seconds of decoding one of some files, and of reading it decoded.

    The files have just been read by the check, as decoded ones have been written here: neither comes from the disk.
    """
    decoding, reading = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths):
            begin = time.perf_counter()
            image = decode(path)
            decoding.append(time.perf_counter() - begin)
            place = os.path.join(folder, f"{number}.npy")
            np.save(place, image, allow_pickle=False)
            begin = time.perf_counter()
            np.load(place, allow_pickle=False)
            reading.append(time.perf_counter() - begin)
    return statistics.median(decoding), statistics.median(reading)


def _make_room(folder: Path, keep: int) -> None:
    """Delete the images that were written longest ago until at most `keep` bytes are left."""
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):  # another process may delete it meanwhile
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= keep:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
