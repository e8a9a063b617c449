"""The folder of `prune`: its model card, as every export has one."""

from __future__ import annotations

from pathlib import Path

from ..store.manifest import Manifest
from .formats.dense import Dense
from .frame.run import finish


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write the card of a dense checkpoint into `folder` and save its manifest, which is returned."""
    return finish(folder, manifest, Dense().words_of(manifest), manifest.files)
