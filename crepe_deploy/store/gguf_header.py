"""The header of a GGUF file, walked over before gguf's own reader takes it.

That reader makes an object of every entry that a count in the file promises, also where the file ended long before:
a few bytes would make it take all memory.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

from crepe_deploy.errors import CheckpointError

from .reading import open_file

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
HEADER_BYTES: Final = 24
MOST_ENTRIES: Final = 1 << 22  # of arrays, together: vocabularies with their scores, types and merges have 2 million
MOST_AXES: Final = 8
MOST_DEPTH: Final = 4
MOST_NAME: Final = 1024  # bytes of a tensor's name; gguf's own readers allow 64
_SIZES: Final = (1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)  # by type: 8 is a text, 9 an array
_TEXT: Final = 8


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor. shape: as the file has it, (in, out). kind: number of its storage type. offset:
    of its data, from where the data begins."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Bytes that a header takes, and its table of tensors."""

    size: int
    tensors: list[Entry]


def check_header(path: Path) -> Header:
    """What a header holds. Raises CheckpointError unless `path` begins as GGUF and its header ends within it, with
    counts within reason."""
    with open_file(path) as file:
        try:
            head = file.read(HEADER_BYTES)
            _check_start(path, head)
            return _Walk(path, file).header(*struct.unpack("<QQ", head[8:]))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _check_start(path: Path, head: bytes) -> None:
    if head[:4] != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {head[:4]!r} instead of {MAGIC!r}")
    if len(head) < HEADER_BYTES:
        raise CheckpointError(f"{path} is truncated: {len(head)} bytes, less than a GGUF header ({HEADER_BYTES})")
    version = struct.unpack("<I", head[4:8])[0]
    if version not in VERSIONS:
        raise CheckpointError(f"{path} is GGUF version {version}; versions {VERSIONS[0]} to {VERSIONS[-1]} are read")


class _Walk:
    """Goes over what the counts promise, a step for each part that has its own length; never beyond the file."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.entries = 0

    def header(self, tensors: int, fields: int) -> Header:
        """Every field, then what is said of every tensor."""
        for _ in range(fields):
            self._text()
            self._value(self._number("<I"), 0)
        table = [self._entry() for _ in range(tensors)]
        return Header(self.file.tell(), table)

    def _entry(self) -> Entry:
        length = self._number("<Q")
        if length > MOST_NAME:
            raise self._damaged(f"a tensor with a name of {length} bytes")
        name = self.file.read(length).decode(errors="replace")
        axes = self._number("<I")
        if axes > MOST_AXES:
            raise self._damaged(f"a tensor of {axes} axes")
        shape = tuple(self._number("<Q") for _ in range(axes))
        return Entry(name, shape, self._number("<I"), self._number("<Q"))

    def _value(self, kind: int, depth: int) -> None:
        if kind >= len(_SIZES) or depth > MOST_DEPTH:
            raise self._damaged(f"a field of type {kind}" if kind >= len(_SIZES) else "arrays in arrays")
        size = _SIZES[kind]
        if kind == _TEXT:
            self._text()
        elif size is not None:
            self._skip(size)
        else:
            kind, count = self._number("<I"), self._number("<Q")
            self.entries += count
            if self.entries > MOST_ENTRIES:
                raise self._damaged(f"arrays of {self.entries} entries")
            size = _SIZES[kind] if kind < len(_SIZES) else None
            if size is not None:
                self._skip(size * count)
            else:
                for _ in range(count):
                    self._value(kind, depth + 1)

    def _text(self) -> None:
        self._skip(self._number("<Q"))

    def _number(self, layout: str) -> int:
        size = struct.calcsize(layout)
        data = self.file.read(size)
        if len(data) < size:
            raise self._damaged("its header goes on beyond its end")
        return int(struct.unpack(layout, data)[0])

    def _skip(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise self._damaged("its header goes on beyond its end")
        self.file.seek(count, os.SEEK_CUR)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or truncated ({self.size} bytes): {what}; download it again")
