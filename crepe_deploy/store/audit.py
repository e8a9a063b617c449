"""What a checkpoint's tensors really hold: zeros, and the sparsity pattern found by counting."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.errors import VerifyError
from crepe_deploy.pattern import NM, Pattern, parse_record, zero_count

from .checkpoint import CheckpointReader
from .manifest import MANIFEST_NAME, TensorRecord, load_manifest

GROUP_SIZES = (4, 8, 16, 32)


@dataclass(frozen=True)
class TensorAudit:
    """One tensor as counted.

    pattern: the one its manifest records, where the count confirms it; otherwise the finest N:M that every group of
    the input dimension holds, or None. pattern_from: "manifest", or "zeros" for one that comes from counting alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    sparsity: float
    pattern: str | None
    pattern_from: str | None = None


def count_zeros(tensor: Tensor) -> int:
    """Entries equal to zero, negative zero included."""
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        tensor = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])
    elif tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return tensor.numel() - int(torch.count_nonzero(tensor))


def most_nonzeros(weight: Tensor, m: int) -> int:
    """The largest number of non-zeros in any group of m consecutive columns of weight (out, in), in % m == 0."""
    return int((weight != 0).view(weight.shape[0], -1, m).sum(-1, dtype=torch.int16).amax())


def held_pattern(weight: Tensor) -> str | None:
    """The N:M with the smallest M among 4, 8, 16, 32 that holds with at least one zero in each group."""
    for m in GROUP_SIZES:
        if weight.shape[1] % m == 0 and weight.numel() and (n := most_nonzeros(weight, m)) < m:
            return f"{n}:{m}"
    return None


def holds(weight: Tensor, pattern: Pattern) -> bool:
    """Whether weight (out, in), or each of (experts, out, in), has the zeros that `pattern` asks for, where it does."""
    if weight.ndim == 3:
        return weight.numel() > 0 and all(holds(one, pattern) for one in weight)
    if weight.ndim != 2 or not weight.numel():
        return False
    if isinstance(pattern, NM):
        return weight.shape[1] % pattern.m == 0 and most_nonzeros(weight, pattern.m) <= pattern.n
    if pattern.granularity == "matrix":
        return count_zeros(weight) >= zero_count(pattern, *weight.shape)
    return int((weight == 0).sum(-1).amin()) >= zero_count(pattern, 1, weight.shape[1])


def check_pattern(name: str, weight: Tensor, pattern: Pattern) -> int:
    """Count the zeros of weight (out, in); raise VerifyError naming it when `pattern` does not hold."""
    if not holds(weight, pattern):
        raise VerifyError(f"{name}: its written zeros do not hold the pattern {pattern}")
    return count_zeros(weight)


def inspect_folder(root: Path) -> list[dict[str, Any]]:
    """Audit every tensor of a checkpoint folder, one in memory at a time. Raises CheckpointError."""
    reader, records = CheckpointReader(root), recorded(root)
    return [asdict(audit(info.name, reader.load(info.name), records.get(info.name))) for info in reader]


def recorded(root: Path) -> dict[str, TensorRecord]:
    """The records of the folder's manifest by tensor name; none where it has no manifest. Raises CheckpointError."""
    return load_manifest(root).tensors if (root / MANIFEST_NAME).is_file() else {}


def audit(name: str, tensor: Tensor, record: TensorRecord | None) -> TensorAudit:
    """Count one tensor, dense, in the shape of its file."""
    zeros = count_zeros(tensor)
    pattern, origin = _pattern(tensor, record)
    return TensorAudit(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        zeros=zeros,
        sparsity=zeros / max(tensor.numel(), 1),
        pattern=pattern,
        pattern_from=origin,
    )


def named_pattern(weight: Tensor, stated: str | None) -> tuple[str | None, str | None]:
    """The pattern of weight (out, in), and where it comes from: the one stated, where it holds, or the one counted."""
    if stated is not None and holds(weight, parse_record(stated)):
        return stated, "manifest"
    counted = held_pattern(weight.flatten(0, -2))
    return counted, "zeros" if counted else None


def _pattern(tensor: Tensor, record: TensorRecord | None) -> tuple[str | None, str | None]:
    if not tensor.numel() or tensor.ndim != (2 if record is None else len(record.shape)):
        return None, None
    weight = tensor.mT.contiguous() if record is not None and record.transposed else tensor
    if weight.is_floating_point() and weight.dtype.itemsize > 1:
        return named_pattern(weight, None if record is None else record.pattern)
    held = record is not None and holds(weight, parse_record(record.pattern))
    return (record.pattern, "manifest") if record is not None and held else (None, None)
