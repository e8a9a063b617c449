"""What a checkpoint's tensors really hold: zeros, and the sparsity pattern found by counting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointReader
from .errors import VerifyError
from .manifest import MANIFEST_NAME, TensorRecord, load_manifest
from .pattern import NM, Pattern, zero_count

GROUP_SIZES = (4, 8, 16, 32)


@dataclass(frozen=True)
class TensorAudit:
    """One tensor as counted. `pattern`: the finest N:M that every group of the input dimension holds, or None."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    sparsity: float
    pattern: str | None


def count_zeros(tensor: Tensor) -> int:
    """Entries equal to zero, negative zero included."""
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


def check_pattern(name: str, weight: Tensor, pattern: Pattern) -> int:
    """Count the zeros of weight (out, in); raise VerifyError naming it when `pattern` does not hold."""
    zeros, asked = count_zeros(weight), zero_count(pattern, *weight.shape)
    if zeros < asked:
        raise VerifyError(f"{name}: {zeros} zeros were counted where pattern {pattern} asks for {asked}")
    if isinstance(pattern, NM) and most_nonzeros(weight, pattern.m) > pattern.n:
        raise VerifyError(f"{name}: a group of {pattern.m} holds more than {pattern.n} non-zeros")
    return zeros


def inspect_folder(root: Path) -> list[dict[str, Any]]:
    """Audit every tensor of a checkpoint folder, one in memory at a time. Raises CheckpointError."""
    return [asdict(audit) for audit in _audits(root)]


def _audits(root: Path) -> Iterator[TensorAudit]:
    reader = CheckpointReader(root)
    records: dict[str, TensorRecord] = {}
    if (root / MANIFEST_NAME).is_file():
        records = load_manifest(root).tensors
    for info in reader:
        tensor = reader.load(info.name)
        stored_transposed = info.name in records and records[info.name].transposed
        weight = tensor.T if stored_transposed else tensor
        zeros = count_zeros(tensor)
        yield TensorAudit(
            name=info.name,
            shape=info.shape,
            dtype=str(info.dtype).removeprefix("torch."),
            zeros=zeros,
            sparsity=zeros / max(tensor.numel(), 1),
            pattern=held_pattern(weight.contiguous()) if weight.ndim == 2 and weight.is_floating_point() else None,
        )
