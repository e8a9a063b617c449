"""Writing checkpoints: planned safetensors files filled tensor by tensor, and folders that appear whole or not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .checkpoint import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME, bytes_of
from .errors import CrepeError, DiskFullError, OutputError

DISK_MARGIN_BYTES = 64 << 20


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
    Raises DiskFullError, OutputError, CrepeError.
    """

    def __init__(self, root: Path, plan: Mapping[str, Planned]) -> None:
        self.root = root
        self.plan = dict(plan)
        self._offsets: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._pending = set(self.plan)

    def __enter__(self) -> CheckpointWriter:
        try:
            for file in sorted({planned.file for planned in self.plan.values()}):
                self._allocate(file)
        except BaseException:
            self._close()
            raise
        return self

    def _allocate(self, file: str) -> None:
        names = [name for name, planned in self.plan.items() if planned.file == file]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
            handle = os.open(self.root / file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            self._files[file] = handle
            _reserve(handle, start + position)
            os.pwrite(handle, struct.pack("<Q", len(raw)) + raw, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor; its dtype and shape must be as planned, and each is written once."""
        planned = self.plan[name]
        if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape or name not in self._pending:
            raise CrepeError(f"'{name}' was planned as {planned} and written as {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.numel():
            view = bytes_of(tensor.detach().contiguous())
            with disk_errors(self.root):
                _write_exactly(self._files[planned.file], view, self._offsets[name])
        self._pending.discard(name)

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
        total = sum(planned.size_bytes for planned in self.plan.values())
        weight_map = {name: self.plan[name].file for name in sorted(self.plan)}
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


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors under `path` into DiskFullError or OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise DiskFullError(f"the disk is full while writing {path}: free some room and run again") from error
        raise OutputError(f"{path} cannot be written: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file, fsynced and renamed."""
    partial = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def require_disk(path: Path, size_bytes: int) -> None:
    """Raise DiskFullError unless the file system of `path` (which need not exist) has room for `size_bytes`."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size_bytes + DISK_MARGIN_BYTES:
        raise DiskFullError(
            f"{path} needs {size_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: free some room"
        )


def check_output(out: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output that exists (unless `overwrite`), equals an input, or lies around or inside one."""
    place = out.resolve()
    for path in inputs:
        source = path.resolve()
        if place == source or source.is_relative_to(place) or place.is_relative_to(source):
            raise OutputError(f"output {out} and input {path} are one folder or lie inside each other; choose another")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists: give another --out, or --overwrite to replace it")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} exists and is not a folder")
    if not os.access(next(parent for parent in place.parents if parent.exists()), os.W_OK):
        raise OutputError(f"{out} cannot be created: its parent folder is not writable")


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield `OUT.partial/`, renamed to `out` on success and removed on any failure, Ctrl-C included."""
    check_output(out, overwrite=overwrite)
    partial = out.with_name(out.name + ".partial")
    with disk_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
    try:
        yield partial
        with disk_errors(out):
            _swap(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, out: Path) -> None:
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    handle = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)
