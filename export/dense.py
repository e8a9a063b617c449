"""Export `dense`: a Hugging Face folder with explicit zeros, which unmodified transformers and vLLM load.

It is no smaller and no faster than the dense model wherever the reader does not know about the zeros; the model card
says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, VerifyError
from ..pattern import parse_record
from ..progress import Progress, silent, ticker
from ..store.audit import check_pattern
from ..store.checkpoint import CheckpointReader
from ..store.files import disk_errors
from ..store.manifest import MANIFEST_NAME, Manifest, hash_folder, save_manifest, sha256_file, verify
from ..structural.check import is_structural
from .card import CARD_NAME, write_card
from .greedy import GREEDY_TOKENS, greedy_of
from .unpack import unpack_checkpoint


def export_dense(source: Path, folder: Path, *, link: bool = False, step: Progress = silent) -> Manifest:
    """Copy a pruned checkpoint into the existing, empty `folder`, recount its zeros there and add a model card.

    A packed source is unpacked, bit by bit what was packed.
    link: hard-link the files where the file system can, for a source that is about to be removed.
    step: told of every piece of work done.
    Raises VerifyError when the source differs from its manifest or a count differs, ConfigError for another format.
    """
    parent = verify(source)
    if parent.format not in ("dense", "packed"):
        raise ConfigError(f"{source} is an {parent.format} checkpoint; export the dense one that it came from")
    if parent.format == "packed":
        unpack_checkpoint(source, folder, parent)
    else:
        for name in parent.files:
            if name != CARD_NAME:
                _place(source / name, folder / name, link=link)
    tick = ticker(step, len(parent.tensors) + GREEDY_TOKENS)
    _recount(folder, parent, tick)
    greedy = greedy_of(folder, parent, tick)
    parent_hash = sha256_file(source / MANIFEST_NAME)
    update = {"stage": "export", "format": "dense", "parent": parent_hash, "metrics": _metrics(parent, greedy)}
    manifest = parent.model_copy(update=update)
    write_card(folder, manifest)
    manifest = manifest.model_copy(update={"files": hash_folder(folder)})
    save_manifest(folder, manifest)
    return manifest


def _place(source: Path, target: Path, *, link: bool) -> None:
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(source, target)
                return
            except OSError:
                pass  # another file system, or one without hard links: copy
        shutil.copyfile(source, target)


def _recount(folder: Path, parent: Manifest, tick: Callable[[], None]) -> None:
    reader = CheckpointReader(folder)
    for name, record in parent.tensors.items():
        stored = reader.load(name)
        weight = stored.T.contiguous() if record.transposed else stored
        zeros = check_pattern(name, weight, parse_record(record.pattern))
        if zeros != record.zeros:
            raise VerifyError(f"{folder / name}: {zeros} zeros were counted and the manifest says {record.zeros}")
        tick()


def _metrics(parent: Manifest, greedy: dict[str, Any]) -> dict[str, Any]:
    if is_structural(parent):
        return {**parent.metrics, "greedy": greedy}  # as small as before: nothing was removed or added here
    weight_bytes = {"weight_bytes_over_dense": 1.0}
    kept = {name: value for name, value in parent.metrics.items() if name != "left_dense"}
    return {
        **kept,
        "greedy": greedy,
        "size": {**weight_bytes, "what": "zeros are stored; no smaller, no faster by itself"},
    }
