"""Reading sharded safetensors folders: headers first and checked whole, then one tensor at a time.

Tensors are read with plain file reads rather than memory maps, so that resident memory is what was asked for and
nothing else. Nothing here writes; see `writing.py`.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError, UnsupportedModel

from .reading import is_folder, open_file, parse_json, read_bytes, read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_CONFIG_BYTES = 16 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
UNREAD = ("F4", "F6_E2M3", "F6_E3M2")  # of safetensors, several values in a byte
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, dtype, shape, and absolute byte offset."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check one safetensors header against the file's size. Raises CheckpointError."""
    try:
        with open_file(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{path}: {file_bytes} bytes is too short for a safetensors file")
            (header_bytes,) = struct.unpack("<Q", start)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: its header claims {header_bytes} bytes and the file has {file_bytes}: "
                    "it is truncated or not a safetensors file; download it again"
                )
            header = parse_json(file.read(header_bytes), f"{path}: its safetensors header")
    except OSError as error:
        raise CheckpointError(f"{path}: its safetensors header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is not a table of tensors")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    infos = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
    _check_layout(path, list(infos.values()), data_start, file_bytes)
    return infos


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if isinstance(entry, dict) and entry.get("dtype") in UNREAD:
        raise UnsupportedModel(f"{path}: tensor '{name}' is {entry['dtype']}, a dtype that is not read")
    try:
        dtype = DTYPES[entry["dtype"]]
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor '{name}' has a malformed header entry ({error!r})") from error
    size_bytes = math.prod(shape) * dtype.itemsize
    if min((begin, *shape), default=0) < 0 or end - begin != size_bytes:
        raise CheckpointError(f"{path}: tensor '{name}' of shape {shape} does not fit its offsets {begin}..{end}")
    return TensorInfo(name, path, dtype, shape, data_start + begin, size_bytes)


def _check_layout(path: Path, infos: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    position = data_start
    for info in sorted(infos, key=lambda info: (info.offset, info.size_bytes)):
        if info.offset != position:
            raise CheckpointError(f"{path}: tensor '{info.name}' overlaps another one or leaves a hole before it")
        position += info.size_bytes
    if position != file_bytes:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes and the file has {file_bytes}: "
            "the file is truncated or damaged; download it again"
        )


def require_folder(root: Path) -> None:
    """Raise CheckpointError unless there is such a folder."""
    if not is_folder(root):
        what = "there is no such folder" if not root.exists() else "it is a file"
        raise CheckpointError(f"{root} is not a model folder: {what}")


def read_config(root: Path) -> dict[str, Any]:
    """`config.json` of a model folder. Raises CheckpointError."""
    path = root / "config.json"
    content = parse_json(read_bytes(path, limit=MAX_CONFIG_BYTES), path, lenient=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def shard_paths(root: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in order. Raises CheckpointError.

    The single file goes before an index, as in transformers. Names in an index must be plain file names of regular
    files inside the folder. A link is followed only where it stays inside the folder or is the whole-snapshot layout of
    the Hugging Face cache (../../blobs/).
    """
    index = root / INDEX_NAME
    if (root / SINGLE_NAME).exists() or not index.exists():
        if not (root / SINGLE_NAME).exists():
            raise CheckpointError(
                f"{root}: neither {SINGLE_NAME} nor {INDEX_NAME} is there; crepe-deploy reads safetensors only "
                "(convert pickled .bin weights with transformers' save_pretrained first)"
            )
        names = [SINGLE_NAME]
    else:
        names = indexed(root)
    return [_safe_shard(root, name) for name in names]


def indexed(root: Path) -> list[str]:
    """The files that the index of a folder names, in order, plain names all of them. Raises CheckpointError."""
    index = root / INDEX_NAME
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: 'weight_map' is missing or not a table of file names")
    names = sorted(set(weight_map.values()))
    if not names:
        raise CheckpointError(f"{index}: its 'weight_map' names no file")
    for name in names:
        if Path(name).name != name or name in {"", ".", ".."}:
            raise CheckpointError(f"{index}: file name '{name}' points outside the folder; refused")
        if len(name.encode(errors="replace")) > 255:
            raise CheckpointError(f"{index}: '{name:.40}...' is too long for the name of a file")
    return names


def _safe_shard(root: Path, name: str) -> Path:
    path = root / name
    require_inside(root, path)
    if not path.is_file():
        raise CheckpointError(f"{path}: this shard is missing; download the model again")
    return path


def require_inside(root: Path, path: Path) -> None:
    """Raise CheckpointError where `path`, below `root`, is a link that leads out of it, but for the hub's cache."""
    if path.is_symlink():
        try:
            target, home = path.resolve(), root.resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
            raise CheckpointError(f"{path} is a link that leads nowhere; refused") from error
        if not target.is_relative_to(home) and target.parent != home.parent.parent / "blobs":
            raise CheckpointError(f"{path} is a link to {target}, outside the model folder; refused")


class CheckpointReader:
    """A checkpoint folder whose headers have been read and checked.

    tensors: every tensor by name. Opening reads no tensor data. Raises CheckpointError.
    """

    def __init__(self, root: Path) -> None:
        require_folder(root)
        self.root = root
        self.files = shard_paths(root)
        self.tensors: dict[str, TensorInfo] = {}
        for path in self.files:
            for name, info in read_header(path).items():
                if name in self.tensors:
                    raise CheckpointError(f"{path}: tensor '{name}' is also in {self.tensors[name].file.name}")
                self.tensors[name] = info
        if not self.tensors:
            raise CheckpointError(f"{root}: its weight files hold no tensors")
        if self.files != [root / SINGLE_NAME]:
            self._check_index()

    def _check_index(self) -> None:
        for name, file in read_object(self.root / INDEX_NAME)["weight_map"].items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(f"{self.root / INDEX_NAME}: tensor '{name}' is not in {file}")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError naming the tensor when it is missing."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.root}: tensor '{name}' is missing")
        return self.tensors[name]

    def load(self, name: str) -> Tensor:
        """Read one tensor into fresh memory, in the file's dtype. Raises CheckpointError."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.size_bytes:
            view = bytes_of(tensor)
            try:
                with info.file.open("rb", buffering=0) as file:
                    file.seek(info.offset)
                    read_exactly(file, view, info)
            except OSError as error:
                raise CheckpointError(f"{info.file}: tensor '{name}' cannot be read: {error}") from error
        return tensor

    def load_finite(self, name: str) -> Tensor:
        """`load`, refusing NaN and infinity by the tensor's name."""
        tensor = self.load(name)
        if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise CheckpointError(
                f"{self.root}: tensor '{name}' holds NaN or infinite values; the checkpoint is damaged"
            )
        return tensor


class KeepingReader(CheckpointReader):
    """A reader for walks that come again: tensors for which `keep` says so are read once and stay in memory.

    What it gives is shared and must not be written to.
    """

    def __init__(self, root: Path, keep: Callable[[TensorInfo], bool]) -> None:
        super().__init__(root)
        self._keep = keep
        self._kept: dict[str, Tensor] = {}

    def load(self, name: str) -> Tensor:
        """As the base's, from memory where it was kept."""
        if name in self._kept:
            return self._kept[name]
        tensor = super().load(name)
        if self._keep(self.info(name)):
            self._kept[name] = tensor
        return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous, non-empty tensor as bytes; writing to it writes to the tensor."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal in dtype, shape and every bit, signs of zeros included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)


def same_stored(reader: CheckpointReader, first: str, second: str, piece: int = 16 << 20) -> bool:
    """Whether two tensors of a checkpoint are equal in dtype, shape and every byte, read a piece at a time."""
    infos = [reader.info(name) for name in (first, second)]
    if len({(info.dtype, info.shape) for info in infos}) > 1:
        return False
    with open_file(infos[0].file) as one, open_file(infos[1].file) as other:
        one.seek(infos[0].offset)
        other.seek(infos[1].offset)
        for done in range(0, infos[0].size_bytes, piece):
            size = min(piece, infos[0].size_bytes - done)
            if one.read(size) != other.read(size):
                return False
    return True


def fingerprint(tensor: Tensor) -> str:
    """Hex sha256 of the bytes of a contiguous tensor."""
    return hashlib.sha256(bytes_of(tensor) if tensor.numel() else b"").hexdigest()


def read_exactly(file: Any, view: memoryview, info: TensorInfo) -> None:
    """Fill `view` from an open file. Raises CheckpointError where the file ends before."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{info.file}: it ends inside tensor '{info.name}'; the file is truncated")
        done += count
