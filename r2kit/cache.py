"""Where r2kit keeps what it can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: ``$R2KIT_CACHE``, else the platform's own place. It may not exist yet."""
    if chosen := os.environ.get("R2KIT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "r2kit" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "r2kit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r2kit"
