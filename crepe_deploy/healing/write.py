"""A healed folder: the pruned one with what was trained in place, its zeros counted on the disk, its manifest true."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from crepe_deploy.errors import VerifyError
from crepe_deploy.pattern import parse_record
from crepe_deploy.store.audit import check_pattern
from crepe_deploy.store.checkpoint import INDEX_NAME, CheckpointReader
from crepe_deploy.store.files import disk_errors
from crepe_deploy.store.manifest import LINEAGE, Manifest, TensorRecord, hash_folder, inherit, save_manifest, versions
from crepe_deploy.store.readback import ReadBack, check_fingerprint
from crepe_deploy.store.writing import CheckpointWriter, Planned

CARD = "README.md"
_STALE = ("parity", "greedy", "left_dense")  # what a manifest measured of other weights


def planned_like(reader: CheckpointReader) -> dict[str, Planned]:
    """The tensors of a folder, in files of the same names."""
    return {info.name: Planned(info.file.name, info.dtype, info.shape) for info in reader}


def write_folder(
    source: Path, manifest: Manifest, best: Path, trained: set[str], folder: Path, healed: Mapping[str, Any]
) -> Manifest:
    """Write `source` into `folder` with the tensors of `best` in place of its own; the manifest that was saved.

    trained: their names. healed: what the manifest is to say of the training. Raises VerifyError where a zero of
    `source` is none, or a pattern does not hold, DiskFullError, ParityError.
    """
    reader, changed = CheckpointReader(source), CheckpointReader(best)
    with CheckpointWriter(folder, planned_like(reader), fingerprint=True) as writer:
        for info in reader:
            writer.write(info.name, (changed if info.name in trained else reader).load(info.name))
    _copy_rest(source, manifest, folder, {path.name for path in reader.files})
    records, hashes = _counted(reader, manifest, folder, writer.fingerprints)
    parent = inherit(source, folder)
    metrics = {name: value for name, value in manifest.metrics.items() if name not in _STALE}
    if manifest.tensors:
        size = sum(record.shape[0] * record.shape[1] for record in records.values())
        zeros = sum(record.zeros for record in records.values())
        metrics |= {"sparsity_of_pruned_tensors": zeros / size, "mean_layer_error": None}
    written = manifest.model_copy(
        update={
            "stage": "heal",
            "versions": versions(),
            "config": {**manifest.config, "healed": dict(healed)},
            "tensors": records,
            "metrics": metrics,
            "parent": parent,
            "files": hash_folder(folder, hashes),
        }
    )
    save_manifest(folder, written)
    return written


def _copy_rest(source: Path, manifest: Manifest, folder: Path, weights: set[str]) -> None:
    """Everything that the manifest accounts for besides weights, card and lineage, remote code included."""
    for name in manifest.files:
        if name not in (*weights, INDEX_NAME, CARD) and not name.startswith(f"{LINEAGE}/"):
            with disk_errors(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)


def _counted(
    reader: CheckpointReader, manifest: Manifest, folder: Path, fingerprints: Mapping[str, str]
) -> tuple[dict[str, TensorRecord], dict[str, str]]:
    """The record of every pruned tensor as it is found on the disk, and the files' hashes."""
    counted: dict[str, TensorRecord] = {}
    files = ReadBack(folder)
    for info, stored in files:
        check_fingerprint(folder, info.name, stored, fingerprints)
        if info.name in manifest.tensors:
            counted[info.name] = _record(info.name, reader.load(info.name), stored, manifest.tensors[info.name])
    return {name: counted[name] for name in manifest.tensors}, files.hashes


def _record(name: str, before: Tensor, after: Tensor, record: TensorRecord) -> TensorRecord:
    lost = int((after[before == 0] != 0).sum())
    if lost:
        raise VerifyError(f"'{name}' has lost {lost} of its zeros in healing")
    weight = after.T.contiguous() if record.transposed else after
    zeros = check_pattern(name, weight, parse_record(record.pattern))
    unknown = {"layer_error": None, "layer_error_weighting": "unknown"}  # it was of the weights before
    return record.recounted(name, zeros, after.shape).model_copy(update=unknown)
