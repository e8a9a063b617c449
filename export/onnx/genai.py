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
from ...model.decoder import Decoder
from ...store.checkpoint import INDEX_NAME, SINGLE_NAME, read_config, shard_paths
from ...store.companions import copy_companions
from ...store.files import write_json

TAIL_LINES: Final = 15
# Symmetric codes: zero has a code of its own, so that a pattern of zeros outlives the rounding to 4 bits.
INT4_OPTIONS: Final = ("block_size=32", "is_symmetric=true", "accuracy_level=4")


def build_genai(source: Path, folder: Path, precision: str) -> None:
    """Build the graph of the dense checkpoint `source` in `folder`. Raises CrepeError with the end of its log."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.builder.") as cache:
        source = _said_plainly(source, Path(cache) / "source")
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


def _said_plainly(source: Path, folder: Path) -> Path:
    """`source`, or, where its config.json ties an output layer that is stored on its own, a copy that does not.

    The builder goes by config.json. The weights of the copy are links.
    """
    if not Decoder(source).ties.own:
        return source
    folder.mkdir()
    copy_companions(source, folder)
    write_json(folder / "config.json", {**read_config(folder), "tie_word_embeddings": False})
    names = [path.name for path in shard_paths(source)]
    for name in [*names, *([INDEX_NAME] if names != [SINGLE_NAME] else [])]:
        (folder / name).symlink_to((source / name).resolve())
    return folder


def _environment() -> dict[str, str]:
    """No hub and no code from a checkpoint: the builder reads the folder that it is given.

    No git either: it writes into the graph the commit of whatever repository the virtual environment lies in.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, **offline, "PYTHONWARNINGS": "ignore", "GIT_DIR": os.devnull}
