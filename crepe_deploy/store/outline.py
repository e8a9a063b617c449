"""A folder that stands for a model of which only the headers are known: weight files that are a header and a hole."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crepe_deploy.errors import CheckpointError, UnsupportedModel

from .files import disk_errors


def write_hole(path: Path, header: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a safetensors file of this header, and of nothing where its tensors would be. Raises DiskFullError."""
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
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
