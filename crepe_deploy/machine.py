"""This machine as the tool sees it: the user's cache folder, and how much memory the process has used."""

from __future__ import annotations

import os
import resource
import stat
import sys
import tempfile
from pathlib import Path

from .errors import ConfigError

_STATUS = Path("/proc/self/status")


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/crepe-deploy`, else `~/.cache/crepe-deploy`; not created. All of it can be deleted.

    For a user without a home it is a folder of theirs among the temporary files, made here. Raises ConfigError where
    that is somebody else's.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "crepe-deploy"
    try:
        return Path.home() / ".cache" / "crepe-deploy"
    except RuntimeError:
        return _own_folder(Path(tempfile.gettempdir()) / f"crepe-deploy-{os.getuid()}")


def _own_folder(folder: Path) -> Path:
    """A folder that nobody else could have put anything into: what is kept there is run."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(f"there is no home, and {folder} cannot be made: {error}; set XDG_CACHE_HOME") from error
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022 or not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"there is no home, and {folder} is not this user's alone: set XDG_CACHE_HOME")
    return folder


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    From /proc where there is one: getrusage also counts what the parent had resident when it started this process.
    """
    if _STATUS.exists():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
