"""Files of packed weights with random bytes in them."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch
from crepe_deploy.exporting.formats.unpacking import load_packed

from crepe_deploy.errors import CrepeError
from crepe_deploy.packed.config import PackedConfig
from crepe_deploy.store.checkpoint import CheckpointReader


def read_spoilt(packed: Path, scratch: Path, name: str, config: PackedConfig) -> None:
    """Read the weight `name` 60 times with four bytes of its file changed: it is read or refused, and nothing else."""
    whole = (packed / "model.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        data = bytearray(whole)
        for position in torch.randint(12_000, (4,), generator=generator).tolist():
            data[position] = int(torch.randint(256, (1,), generator=generator))
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (scratch / "model.safetensors").write_bytes(data)
        with contextlib.suppress(CrepeError):
            load_packed(CheckpointReader(scratch), name, config)
