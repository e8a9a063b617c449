"""The interface of a foreign format that is read: made a dense checkpoint of ours first, which is then exported."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...store.folders import scratch_folder
from ...store.manifest import Manifest


class Importer(ABC):
    """A checkpoint format of others."""

    @abstractmethod
    def recognises(self, source: Path) -> bool:
        """Whether the folder claims to be of this format, or of a relative that is refused by name."""

    @abstractmethod
    def convert(self, source: Path, folder: Path) -> Manifest:
        """Write `source` as a dense checkpoint with a manifest into the existing, empty `folder`, proven bit by bit.

        Raises UnsupportedModel, CheckpointError, ParityError.
        """


@contextlib.contextmanager
def as_ours(importers: Sequence[Importer], source: Path, out: Path) -> Iterator[Path]:
    """Yield the folder to export: `source`, or of a foreign one its dense copy beside `out`, removed after."""
    importer = next((importer for importer in importers if importer.recognises(source)), None)
    if importer is None:
        yield source
        return
    with scratch_folder(out.with_name(out.name + ".unpacked")) as folder:
        importer.convert(source, folder)
        yield folder
