"""The truth about an exported graph's zeros: what was pruned is found again in its initialisers, and who gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ...errors import VerifyError
from ...pattern import NM, parse_record
from ...store.audit import holds
from ...store.manifest import Manifest
from .inspect import BLOCK, matrices

GAIN: Final = (
    "none on CPU or CUDA: ONNX Runtime multiplies by stored zeros like by any other value; no smaller, no faster"
)
TENSORRT: Final = {
    "reads": "2:4 along the reduced axis of plain dense weights, on GPUs with sparse tensor cores",
    "trtexec": "--sparsity=enable",
    "builder_flag": "SPARSE_WEIGHTS",
    "onnxruntime_provider_option": "trt_sparsity_enable=1",
    "tested": "no: stated from their documentation",
}


def recount(folder: Path, parent: Manifest, flavor: str, precision: str) -> dict[str, Any]:
    """Count zeros and check the pattern of every pruned weight as the graph stores it; the manifest's `sparsity` part.

    A portable graph keeps the checkpoint's names, and every tensor is compared. A genai graph has names of its own
    and joins projections, so its blocks are compared as wholes: all zeros, and the pattern where all were pruned to
    one. Raises VerifyError naming what was lost.
    """
    found = _by_name if flavor == "portable" else _by_block
    counted = found(folder, parent, exact=precision == "fp32")
    patterns = sorted({record.pattern for record in parent.tensors.values()})
    tensorrt = TENSORRT if patterns == ["2:4"] and counted["pattern_holds_in"] else None
    return {"gain_in_onnxruntime": GAIN, "patterns": patterns, **counted, "tensorrt": tensorrt}


def _by_name(folder: Path, parent: Manifest, *, exact: bool) -> dict[str, Any]:
    missing = dict(parent.tensors)
    zeros, axes = 0, set()
    for audit, axis, weight in matrices(folder):
        record = missing.pop(audit.name, None)
        if record is None:
            continue
        if not holds(weight, parse_record(record.pattern)):
            raise VerifyError(f"{folder}: '{audit.name}' does not hold {record.pattern} along axis {axis} as stored")
        # Rounding to fewer bits makes zeros and unmakes none.
        if audit.zeros < record.zeros or (exact and audit.zeros != record.zeros):
            raise VerifyError(f"{folder}: '{audit.name}' has {audit.zeros} zeros; the checkpoint has {record.zeros}")
        zeros += audit.zeros
        axes.add(axis)
    if missing:
        raise VerifyError(f"{folder}: the graph has no weight '{next(iter(missing))}'")
    return {"zeros": zeros, "pattern_holds_in": len(parent.tensors), "of": len(parent.tensors), "axes": sorted(axes)}


def _by_block(folder: Path, parent: Manifest, *, exact: bool) -> dict[str, Any]:
    patterns = {record.pattern for record in parent.tensors.values()}
    shared = parse_record(patterns.pop()) if len(patterns) == 1 else None
    zeros, held, total, axes = 0, 0, 0, set()
    for audit, axis, weight in matrices(folder):
        if axis is None or not BLOCK.search(audit.name):
            continue
        zeros, total = zeros + audit.zeros, total + 1
        axes.add(axis)
        held += isinstance(shared, NM) and holds(weight, shared)
    expected = sum(record.zeros for record in parent.tensors.values())
    if zeros < expected:
        raise VerifyError(f"{folder}: {zeros} zeros are left in the blocks' matrices of {expected} in the checkpoint")
    everything = not any(name.endswith("_proj.weight") for name in parent.dense_tensors)
    if everything and isinstance(shared, NM) and held != total:
        raise VerifyError(f"{folder}: pattern {shared} holds in {held} of {total} matrices of the blocks as stored")
    return {"zeros": zeros, "pattern_holds_in": held, "of": total, "axes": sorted(axes)}
