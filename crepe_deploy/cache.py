"""The user's cache folder: converted GGUF files, built kernels, speed measurements. All of it can be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/crepe-deploy`, else `~/.cache/crepe-deploy`; not created."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "crepe-deploy"
