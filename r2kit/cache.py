"""Where r2kit keeps what it can make again."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from r2kit.errors import DataError


def cache_folder() -> Path:
    """Return the cache folder: ``$R2KIT_CACHE``, else the platform's own place. It may not exist yet."""
    if chosen := os.environ.get("R2KIT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "r2kit" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "r2kit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r2kit"


def build_folder(folder: Path, write: Callable[[Path], None], what: str) -> Path:
    """Fill a folder of the cache: it appears whole or not at all, also when several processes build it at once.

    Args:
        folder: The folder, not there yet.
        write: Fills the empty folder that it is given.
        what: What it holds, for messages.

    Raises:
        DataError: If it cannot be written.
    """
    draft = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        write(draft)
        draft.chmod(0o755)  # mkdtemp makes it private; the cache may be shared
        os.rename(draft, folder)
    except OSError as error:
        if not folder.is_dir():  # a real failure; otherwise another process finished first
            raise DataError(
                f"{folder.parent}: cannot write {what}: {error.strerror or error}; set the environment variable "
                "R2KIT_CACHE to a folder with room"
            ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
    return folder
