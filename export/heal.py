"""Healing where folders are made: a greedy prompt and a card that are true of them; healing before an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..healing.config import HealConfig
from ..healing.heal import heal
from ..progress import Say, Show
from ..store.manifest import Manifest, load_manifest, save_manifest
from ..store.sources import Model
from ..store.work import JOURNAL, work_folder
from .frame.card import CARD_NAME
from .frame.greedy import with_greedy
from .prune import seal as with_card


def seal(source: Path, folder: Path, manifest: Manifest) -> Manifest:
    """Renew in `folder` what `source`, from which it was healed, has of both; the manifest that was saved."""
    before = load_manifest(source)
    if "greedy" in before.metrics:
        manifest = with_greedy(folder, manifest)
    if CARD_NAME in before.files:
        return with_card(folder, manifest)
    save_manifest(folder, manifest)
    return manifest


@dataclass(frozen=True)
class Healing:
    """What was just pruned is healed before anything is made of it; fields as of `healing.heal.heal`."""

    dense: Model
    config: HealConfig
    texts: Sequence[str | Path]
    field: str
    show: Show
    say: Say
    device: torch.device

    def record(self) -> dict[str, Any]:
        """What decides what is made, for telling runs apart."""
        return {"config": self.config.record(), "texts": [str(text) for text in self.texts], "field": self.field}

    def __call__(self, folder: Path) -> Path:
        """Heal the pruned folder; returns the healed one beside it. One that is there is not healed again.

        Raises as `heal` does.
        """
        healed = folder.with_name(f"{folder.name}-healed")
        if not healed.exists():
            heal(
                folder, self.dense, healed, self.config, self.texts, self.field,
                resume=(work_folder(healed) / JOURNAL).exists(), overwrite=False, show=self.show, say=self.say,
                seal=partial(seal, folder), device=self.device,
            )  # fmt: skip
        return healed
