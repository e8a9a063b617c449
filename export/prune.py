"""The folder of `prune`: its model card, as every export has one."""

from __future__ import annotations

from pathlib import Path

from ..store.manifest import Manifest
from .formats.dense import Dense
from .frame.run import finish


def seal(folder: Path, manifest: Manifest, base_model: str | None = None) -> Manifest:
    """Write the card of a dense checkpoint into `folder` and save its manifest, which is returned.

    base_model: the hub id of the parent, for the card; None: as the source has it.
    """
    if base_model is not None:
        manifest = manifest.model_copy(update={"config": {**manifest.config, "base_model": base_model}})
    return finish(folder, manifest, Dense().words_of(manifest), manifest.files)
