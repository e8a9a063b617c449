"""A folder that stands for a model of which only the headers are known: weight files that are a header and a hole."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from crepe_deploy.errors import CheckpointError, UnsupportedModel

from .files import disk_errors

MOST_BYTES: Final = 1 << 43  # of one file: what common file systems take


def write_hole(path: Path, header: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a safetensors file of this header, and of nothing where its tensors would be.

    The header is a stranger's, and checked by who reads the file; only its size is looked at here. Raises
    CheckpointError, DiskFullError.
    """
    end = 0
    for name, entry in header.items():
        match entry["data_offsets"]:
            case (int(), int() as last) if last <= MOST_BYTES:
                end = max(end, last)
            case offsets:
                raise CheckpointError(f"{path}: tensor '{name}' cannot lie at {offsets!r:.60}")
    text = json.dumps(header).encode()
    with disk_errors(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@contextmanager
def named(folder: Path, name: str) -> Iterator[None]:
    """Inside, what is refused is refused of `name`, and not of the folder that stands for it."""
    try:
        yield
    except (CheckpointError, UnsupportedModel) as error:
        said = str(error).replace(str(folder / "config.json"), name).replace(str(folder), name)
        raise type(error)(said) from error
