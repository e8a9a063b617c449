"""The interface of a format."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ...errors import ConfigError
from ...progress import Meter
from ...pruning.config import PruneConfig
from ...store.companions import copy_companions
from ...store.manifest import Manifest, TensorRecord
from ...store.pieces import Pieces
from .foreign import plain

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Source:
    """The checkpoint that is exported.

    manifest: its own, or, of a plain model folder, what is known of it. parent: sha256 of its manifest's file, None
    without one. fresh: this process wrote and hashed it just now and is about to remove it, so that its hashes are not
    compared again and its files may be linked.
    """

    folder: Path
    manifest: Manifest
    parent: str | None
    fresh: bool = False


@dataclass(frozen=True)
class Words:
    """What the model card says of a format.

    truth: where it is smaller or faster, and where not. tags: for the front matter. done: what the export did to the
    model, for the title. layers: which layers `weight_bytes_over_dense` is about. use: Markdown, how to load and serve
    it, `MODEL` standing for the folder or its hub id and `INSTALL` for what pip installs of crepe-deploy. library: of
    the front matter.
    """

    truth: str
    tags: tuple[str, ...] = ()
    done: str | None = None
    layers: str = "packed"
    use: str = ""
    library: str = "transformers"


@dataclass(frozen=True)
class Written:
    """What an export found while it wrote and compared, for the manifest.

    fingerprints: sha256 by name of the tensors written, to compare with what is on disk. hashes: sha256 of the files
    that were read back whole. metrics, config: joined to the source's. tensors: the records, where they changed.
    """

    fingerprints: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorRecord] | None = None


@dataclass(frozen=True)
class Exporter(ABC, Generic[Plan]):
    """A format, and by its fields the options that it takes: strings with defaults.

    name: on the command line and in the manifest. reads: the formats of sources that it takes. words: for the card.
    suffixes: of the files that hold its weights. stale: metrics of the source that no longer hold. needs_manifest:
    whether the source must be a checkpoint of ours.
    """

    name: ClassVar[str]
    words: ClassVar[Words]
    reads: ClassVar[tuple[str, ...]] = ("dense",)
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors",)
    stale: ClassVar[tuple[str, ...]] = ("left_dense",)
    needs_manifest: ClassVar[bool] = True

    def check(self) -> None:
        """Refuse values of options and missing libraries, before anything is read. Raises ConfigError, MissingExtra."""

    def check_pruning(self, model: Path, config: PruneConfig) -> None:
        """Refuse before `model` is pruned by `config` what would be refused after. Raises InputError."""

    def check_source(self, source: Source) -> None:
        """Refuse a source of a format that this one does not read. Raises ConfigError."""
        if source.manifest.format not in self.reads:
            raise ConfigError(
                f"{source.folder} is {_article(source.manifest.format)} checkpoint; --format {self.name} reads "
                f"{' or '.join(self.reads)}: export the one that it came from"
            )

    def foreign(self, folder: Path) -> Manifest:
        """What stands for the manifest of a folder that has none, where `needs_manifest` is false."""
        return plain(folder)

    def weights(self, source: Source, folder: Path) -> contextlib.AbstractContextManager[Path]:
        """The folder whose weights are read: the source's, or a copy beside `folder` that is removed after."""
        return contextlib.nullcontext(source.folder)

    @abstractmethod
    def plan(self, source: Source, weights: Path) -> Plan:
        """All that can be known from headers, whatever the format wants to carry. Raises InputError."""

    @abstractmethod
    def room(self, plan: Plan) -> int:
        """Bytes that the weights will take."""

    @abstractmethod
    def steps(self, plan: Plan) -> int:
        """How many ticks `write` and `compare` will give."""

    @abstractmethod
    def write(self, plan: Plan, folder: Path, tick: Meter, pieces: Pieces) -> Written:
        """Write the weights into the existing `folder`, which holds nothing but what `pieces` has noted of it."""

    def companions(self, plan: Plan, weights: Path, folder: Path) -> None:
        """Write the small files beside the weights."""
        copy_companions(weights, folder)

    @abstractmethod
    def compare(self, plan: Plan, written: Written, folder: Path, tick: Meter) -> Written:
        """Read back what is on disk and compare it with what was meant; `written` and what was found besides.

        Raises ParityError, VerifyError.
        """

    @abstractmethod
    def size(self, plan: Plan, folder: Path) -> Mapping[str, Any]:
        """The manifest's `size`: at least `weight_bytes_over_dense` and `what`."""

    def words_of(self, manifest: Manifest) -> Words:
        """What the card says of this export."""
        return self.words


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
