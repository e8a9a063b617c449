"""What a stopped run goes on from, in OUT.work: the newest state and the best weights, each whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError
from crepe_deploy.store.checkpoint import SINGLE_NAME, CheckpointReader
from crepe_deploy.store.files import disk_errors
from crepe_deploy.store.writing import CheckpointWriter, Planned

PARTIAL = "step-partial"


def save(work: Path, name: str, tensors: Iterable[tuple[str, Tensor]], plan: Mapping[str, Planned]) -> None:
    """Write a folder of tensors, as planned, in place of what a stop left of it. Raises DiskFullError."""
    partial = work / PARTIAL
    with disk_errors(work):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with CheckpointWriter(partial, plan) as writer:
            for key, tensor in tensors:
                writer.write(key, tensor.to("cpu", plan[key].dtype))
        shutil.rmtree(work / name, ignore_errors=True)
        partial.rename(work / name)


def planned(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Planned]:
    """Tensors as they are, in one file."""
    return {key: Planned(SINGLE_NAME, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors}


@torch.no_grad()
def load(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill tensors with what was saved of them. Raises CheckpointError."""
    reader = CheckpointReader(folder)
    for key, tensor in tensors:
        stored = reader.load(key)
        if stored.shape != tensor.shape:
            raise CheckpointError(f"{folder} is of another run: '{key}' has shape {tuple(stored.shape)}")
        tensor.copy_(stored)


def keep_only(work: Path, names: Iterable[str]) -> None:
    """Remove every state and every best but these."""
    kept = set(names)
    with disk_errors(work):
        for path in [*work.glob("step-*"), *work.glob("best-*")]:
            if path.name not in kept:
                shutil.rmtree(path)
