"""`verify`: whether a folder still is what its manifest says."""

from __future__ import annotations

from pathlib import Path

from crepe_deploy.store import manifest
from crepe_deploy.store.checkpoint import require_folder
from crepe_deploy.store.stock import check_tokenizer
from crepe_deploy.store.values import check_values
from crepe_deploy.structural.check import check_shapes, is_structural


def verify(folder: str | Path) -> manifest.Manifest:
    """Compare the sha256 of every file in a checkpoint folder with its manifest, and return that.

    Weights with scales beside them (values.safetensors) are compared with these: each is code * scale in every bit.
    After structural pruning every tensor's shape is compared with config.json too, and the tokenizer is loaded where
    there is one. Reads every byte once, such weights twice. Raises VerifyError (exit code 1) naming the first file or
    tensor that differs, CheckpointError (2) where there is no manifest, or the tokenizer does not work.
    """
    require_folder(Path(folder))
    record = manifest.verify(Path(folder))
    check_values(Path(folder))
    check_tokenizer(Path(folder))
    if is_structural(record):
        check_shapes(Path(folder))
    return record
