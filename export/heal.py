"""What a healed folder still needs when its weights are written: a greedy prompt and a card that are true of them."""

from __future__ import annotations

from pathlib import Path

from ..store.manifest import Manifest, load_manifest, save_manifest
from .formats.dense import Dense
from .frame.card import CARD_NAME
from .frame.greedy import with_greedy
from .frame.run import finish


def seal(source: Path, folder: Path, manifest: Manifest) -> Manifest:
    """Renew in `folder` what `source`, from which it was healed, has of both; the manifest that was saved."""
    before = load_manifest(source)
    if "greedy" in before.metrics:
        manifest = with_greedy(folder, manifest)
    if CARD_NAME in before.files:
        return finish(folder, manifest, Dense().words_of(manifest), manifest.files)
    save_manifest(folder, manifest)
    return manifest
