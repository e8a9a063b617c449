"""The run of an export, for every format: verify, room, write, companions, compare, lineage, card, hash, save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...errors import VerifyError
from ...progress import Meter, Progress, part, silent
from ...store.files import clear, require_disk
from ...store.manifest import (
    MANIFEST_NAME,
    Manifest,
    hash_folder,
    inherit,
    load_manifest,
    save_manifest,
    sha256_file,
    verify,
)
from ...store.pieces import Pieces
from ...store.stock import check_tokenizer
from .card import check_record, write_card
from .exporter import Exporter, Source, Words

_CHANGED: Final = (
    "; where the weights were changed on purpose, as by fine-tuning, take manifest.json away: "
    "the folder is then exported as one that was made elsewhere"
)


def run(
    exporter: Exporter[Any], source: Source, target: Path, pieces: Pieces, *, step: Progress = silent,
    base_model: str | None = None,
) -> Manifest:  # fmt: skip
    """Export `source` into the existing `target`; returns the manifest that was written.

    pieces: of `target`, which a stopped run may have left there; what else is in it goes. step: told of every piece of
    work done. base_model: the hub id of the parent, for the card; None: as the source has it. Raises InputError for
    what the format does not take, DiskFullError, CheckpointError, ParityError, VerifyError.
    """
    clear(target, pieces.names)
    with exporter.weights(source, target) as weights:
        plan = exporter.plan(source, weights)
        require_disk(target, exporter.room(plan))
        tick = Meter(part(step, f"exporting as {exporter.name}"), exporter.steps(plan))
        written = exporter.write(plan, target, tick, pieces)
        exporter.companions(plan, weights, target)
        written = exporter.compare(plan, written, target, tick)
        size = exporter.size(plan, target)
    inherit(source.folder, target)
    parent = source.manifest
    kept = {name: value for name, value in parent.metrics.items() if name not in exporter.stale}
    update = {
        "stage": "export",
        "format": exporter.name,
        "parent": source.parent,
        "config": {**parent.config, **written.config, **({"base_model": base_model} if base_model else {})},
        "tensors": dict(parent.tensors if written.tensors is None else written.tensors),
        "metrics": {**kept, **written.metrics, "size": dict(size)},
    }
    manifest = parent.model_copy(update=update)
    return finish(target, manifest, exporter.words_of(manifest), written.hashes)


def read_source(exporter: Exporter[Any], folder: Path, *, fresh: bool) -> Source:
    """The source, every file compared with its manifest. Raises VerifyError, CheckpointError, ConfigError."""
    if not exporter.needs_manifest and not (folder / MANIFEST_NAME).exists():
        check_tokenizer(folder)
        return Source(folder, exporter.foreign(folder), None, fresh)
    try:
        manifest = load_manifest(folder) if fresh else verify(folder)
    except VerifyError as error:
        if exporter.needs_manifest:
            raise
        raise VerifyError(f"{error}{_CHANGED}") from error
    check_record(manifest)
    source = Source(folder, manifest, sha256_file(folder / MANIFEST_NAME), fresh)
    exporter.check_source(source)
    if not fresh:
        check_tokenizer(folder)
    return source


def finish(folder: Path, manifest: Manifest, words: Words, hashes: Mapping[str, str]) -> Manifest:
    """Write the card, hash what `hashes` does not know, and save the manifest, which is returned."""
    write_card(folder, manifest, words)
    manifest = manifest.model_copy(update={"files": hash_folder(folder, hashes)})
    save_manifest(folder, manifest)
    return manifest
