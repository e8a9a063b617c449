"""The genai flavour: onnxruntime-genai's own model builder, in a process of its own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from ...errors import CrepeError, DiskFullError

TAIL_LINES: Final = 15
# Symmetric codes: zero has a code of its own, so that a pattern of zeros outlives the rounding to 4 bits.
INT4_OPTIONS: Final = ("block_size=32", "is_symmetric=true", "accuracy_level=4")


def build_genai(source: Path, folder: Path, precision: str) -> None:
    """Build the graph of the dense checkpoint `source` in `folder`. Raises CrepeError with the end of its log."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.builder.") as cache:
        command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-m", source.name]
        command += ["-i", str(source), "-o", str(folder), "-p", precision, "-e", "cpu", "-c", cache]
        if precision == "int4":
            command += ["--extra_options", *INT4_OPTIONS]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=_environment()
        )
    if done.returncode:
        if os.strerror(errno.ENOSPC) in done.stdout:
            raise DiskFullError(f"the disk is full while writing {folder}: free some room and run again")
        tail = "\n".join(f"  {line}" for line in done.stdout.splitlines()[-TAIL_LINES:])
        raise CrepeError(f"onnxruntime-genai's model builder ended with code {done.returncode}:\n{tail}")


def _environment() -> dict[str, str]:
    """No hub and no code from a checkpoint: the builder reads the folder that it is given."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
