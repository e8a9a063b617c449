"""Writing checkpoints: planned safetensors files filled tensor by tensor, and folders that appear whole or not."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.errors import CrepeError

from .checkpoint import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME, TensorInfo, bytes_of, fingerprint
from .files import disk_errors, write_json
from .pieces import Noted, Pieces


@dataclass(frozen=True)
class Planned:
    """One tensor to be written: its file name, dtype and shape."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


class CheckpointWriter:
    """Writes the planned tensors into `root` in any order, holding none of them in memory.

    Every file is allocated at its full size on entry, so a full disk is met before the work. On leaving without an
    error, every planned tensor must have been written; files are fsynced and the index is written last.
    fingerprints: sha256 by name of what was written, where `fingerprint` asks for it, for `readback.prove_written`.
    resume: files that are there already, of an equal plan, are gone on with; `keep` says what they hold.
    pieces: where every file that is whole is noted, with its notes; those that are noted and hold what was noted are
    kept. noted: whether this may be noted of the tensor of a name.
    beside: planned files that are no part of the checkpoint, with their metadata: an index tells them from it.
    Raises DiskFullError, OutputError, CrepeError.
    """

    def __init__(
        self, root: Path, plan: Mapping[str, Planned], *, fingerprint: bool = False, resume: bool = False,
        pieces: Pieces | None = None, noted: Noted = lambda _, note: note is None,
        beside: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:  # fmt: skip
        self.root = root
        self.fingerprints: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        self._fingerprint = fingerprint or pieces is not None
        self._new = 0 if resume or pieces is not None else os.O_EXCL
        self._pieces = pieces
        self._noted = noted
        self._beside = beside or {}
        self.plan = dict(plan)
        self._offsets: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._pending = set(self.plan)
        self._names: dict[str, list[str]] = {}
        for name, planned in self.plan.items():
            self._names.setdefault(planned.file, []).append(name)

    def __enter__(self) -> CheckpointWriter:
        try:
            for file in sorted(self._names):
                self._allocate(file)
            self._keep_pieces()
        except BaseException:
            self._close()
            raise
        return self

    def _allocate(self, file: str) -> None:
        names = self._names[file]
        header: dict[str, Any] = {"__metadata__": dict(self._beside.get(file, {"format": "pt"}))}
        position = 0
        for name in names:
            planned = self.plan[name]
            end = position + planned.size_bytes
            header[name] = {
                "dtype": DTYPE_NAMES[planned.dtype],
                "shape": list(planned.shape),
                "data_offsets": [position, end],
            }
            self._offsets[name] = position
            position = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        start = 8 + len(raw)
        for name in names:
            self._offsets[name] += start
        with disk_errors(self.root):
            handle = os.open(self.root / file, os.O_CREAT | self._new | os.O_RDWR | os.O_NOFOLLOW, 0o644)
            self._files[file] = handle
            _reserve(handle, start + position)
            os.pwrite(handle, struct.pack("<Q", len(raw)) + raw, 0)

    def _keep_pieces(self) -> None:
        if self._pieces is None:
            return
        for file, names in self._names.items():
            entry = self._pieces.shard(file, names, self._noted)
            if entry is not None and self.keep(entry["sha256"]):
                self.notes |= entry["notes"]

    def left(self, infos: Iterable[TensorInfo], skipped: Callable[[], None] = lambda: None) -> Iterator[TensorInfo]:
        """Those of the source's tensors that are not yet written; `skipped` is called for each of the others."""
        for info in infos:
            if info.name in self._pending:
                yield info
            else:
                skipped()

    @property
    def pending(self) -> list[str]:
        """What is planned and not yet written, in the order of the plan."""
        return [name for name in self.plan if name in self._pending]

    def write(self, name: str, tensor: Tensor, note: Any = None) -> None:
        """Write one planned tensor; its dtype and shape must be as planned, and each is written once.

        note: goes to `notes`, also of a resumed run.
        """
        planned = self.plan[name]
        if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape or name not in self._pending:
            raise CrepeError(f"'{name}' was planned as {planned} and written as {tensor.dtype} {tuple(tensor.shape)}")
        tensor = tensor.detach().contiguous()
        if self._fingerprint:
            self.fingerprints[name] = fingerprint(tensor)
        if tensor.numel():
            view = bytes_of(tensor)
            with disk_errors(self.root):
                _write_exactly(self._files[planned.file], view, self._offsets[name])
        if note is not None:
            self.notes[name] = note
        self._pending.discard(name)
        if self._pieces is not None and self._pending.isdisjoint(names := self._names[planned.file]):
            notes = {one: self.notes[one] for one in names if one in self.notes}
            self._pieces.note_shard(planned.file, {one: self.fingerprints[one] for one in names}, notes)

    def keep(self, fingerprints: Mapping[str, str]) -> bool:
        """Whether the files hold these tensors, by sha256; then they count as written."""
        if not all(fingerprint(self.read(name)) == expected for name, expected in fingerprints.items()):
            return False
        self.fingerprints |= fingerprints
        self._pending -= fingerprints.keys()
        return True

    def read(self, name: str) -> Tensor:
        """What the files hold of a planned tensor, written or not. Raises OutputError."""
        planned = self.plan[name]
        tensor = torch.empty(planned.shape, dtype=planned.dtype)
        if tensor.numel():
            view, done = bytes_of(tensor), 0
            with disk_errors(self.root):
                while done < len(view):
                    place = self._offsets[name] + done
                    done += os.preadv(self._files[planned.file], [view[done : done + (1 << 30)]], place)
        return tensor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._pending:
                    raise CrepeError(
                        f"{len(self._pending)} planned tensors were not written: {sorted(self._pending)[:3]}"
                    )
                with disk_errors(self.root):
                    for handle in self._files.values():
                        os.fsync(handle)
                self._write_index()
        finally:
            self._close()

    def _write_index(self) -> None:
        if set(self._files) == {SINGLE_NAME}:
            return
        part = {name: planned for name, planned in self.plan.items() if planned.file not in self._beside}
        total = sum(planned.size_bytes for planned in part.values())
        weight_map = {name: part[name].file for name in sorted(part)}
        write_json(self.root / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _close(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()


def _reserve(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _write_exactly(handle: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done : done + (1 << 30)], offset + done)
