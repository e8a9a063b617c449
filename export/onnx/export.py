"""Export `onnx`: a graph that runs, says what its checkpoint says, and claims no speed that zeros do not give."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ...errors import ConfigError
from ...model.architecture import load_config
from ...progress import Progress, silent, ticker
from ...store.checkpoint import CheckpointReader
from ...store.companions import copy_companions
from ...store.files import disk_errors, require_disk
from ...store.manifest import MANIFEST_NAME, Manifest, hash_folder, save_manifest, sha256_file, verify
from ..card import write_card
from ..dense import export_dense
from ..greedy import greedy_of
from .checks import finish_graph
from .genai import build_genai
from .inspect import GRAPH_NAME
from .parity import own_greedy, prove
from .portable import DATA_NAME, build_portable
from .recount import recount
from .support import DEFAULT, OnnxOptions, check_model, check_options

DTYPES: Final = {"fp32": "float32", "fp16": "float16", "int4": "int4"}
_BYTES: Final = {"fp32": 4.0, "fp16": 2.0, "int4": 1.5}  # of each weight on the disk, at most; int4 keeps tables fp32
_STAGES: Final = 5
PADDING: Final = {
    "portable": "prompts of different lengths may share a batch, padded on the left",
    "genai": "the prompts of a batch must have one length: its attention gives left-padded rows wrong answers",
}


def export_onnx(
    source: Path, folder: Path, *, link: bool = False, step: Progress = silent, options: OnnxOptions = DEFAULT
) -> Manifest:
    """Write the graph of a pruned checkpoint into the existing, empty `folder`, prove it, and record the proof.

    link: nothing to do here. A packed source is unpacked beside `folder` first, and the manifest says so. Raises
    ConfigError, MissingExtra, UnsupportedModel, DiskFullError before any work, VerifyError, ParityError after.
    """
    check_options(options)
    parent = verify(source)
    check_source(source, parent)
    with _dense(source, folder, parent) as dense:
        check_model(load_config(dense), options.flavor)
        _require_room(dense, folder, options.precision)
        tick = ticker(step, _STAGES)
        build = build_portable if options.flavor == "portable" else build_genai
        build(dense, folder, options.precision)
        copy_companions(dense, folder)
        tick()
        graph = finish_graph(folder, _metadata(source, parent, options))
        tick()
        sparsity = recount(folder, parent, options.flavor, options.precision)
        tick()
        parity = prove(folder, dense, options.precision, options.flavor)
        tick()
        greedy = _greedy(dense, folder, parent, options)
        size = _size(dense, folder)
        tick()
    record = {
        "flavor": options.flavor,
        "precision": options.precision,
        "padding": PADDING[options.flavor],
        "source": "packed, unpacked tensor by tensor for this export" if parent.format == "packed" else parent.format,
        "graph": graph,
        "sparsity": sparsity,
        "parity": parity,
    }
    return _finish(source, folder, parent, {"onnx": record, "greedy": greedy, "size": size})


def check_source(source: Path, parent: Manifest) -> None:
    """Raise ConfigError for a format that holds no unrounded weights."""
    if parent.format not in ("dense", "packed"):
        raise ConfigError(
            f"{source} has the format {parent.format}; --format onnx reads a dense or packed checkpoint, so export the "
            "one it came from"
        )


@contextlib.contextmanager
def _dense(source: Path, folder: Path, parent: Manifest) -> Iterator[Path]:
    """The source itself, or a packed one's dense copy, streamed beside the output and removed after."""
    if parent.format != "packed":
        yield source
        return
    copy = folder.with_name(folder.name + ".unpacked")
    try:
        with disk_errors(copy):
            shutil.rmtree(copy, ignore_errors=True)  # left by a run that was killed
            copy.mkdir()
        export_dense(source, copy)
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _require_room(source: Path, folder: Path, precision: str) -> None:
    elements = sum(info.size_bytes // info.dtype.itemsize for info in CheckpointReader(source))
    require_disk(folder, int(elements * _BYTES[precision]))


def _metadata(source: Path, parent: Manifest, options: OnnxOptions) -> dict[str, str]:
    """What the graph file itself says of its origin; the hash is that of the checkpoint's manifest."""
    revision = f" @ {parent.source.revision}" if parent.source.revision else ""
    return {
        "base_model": parent.source.id + revision,
        "method": str(parent.config["method"] or "unknown"),
        "pattern": str(parent.config["pattern"]),
        "sparsity": f"{parent.metrics.get('sparsity_of_pruned_tensors', 0.0):.6f}",
        "source_manifest_sha256": sha256_file(source / MANIFEST_NAME),
        "flavor": options.flavor,
        "precision": options.precision,
        "made_with": f"crepe-deploy {parent.versions['crepe-deploy']}",
    }


def _greedy(dense: Path, folder: Path, parent: Manifest, options: OnnxOptions) -> dict[str, Any]:
    """What a server of this folder must answer: the checkpoint's own words, or, of rounded weights, the graph's."""
    greedy = greedy_of(dense, parent, lambda: None)
    if options.precision == "int4":
        greedy = own_greedy(folder, greedy)
    return {**greedy, "checkpoint_dtype": DTYPES[options.precision]}


def _size(dense: Path, folder: Path) -> dict[str, Any]:
    before = sum(path.stat().st_size for path in CheckpointReader(dense).files)
    after = sum((folder / name).stat().st_size for name in (GRAPH_NAME, DATA_NAME))
    return {
        "graph_bytes": after,
        "file_bytes_over_dense": after / before,
        "weight_bytes_over_dense": after / before,
        "what": "bytes of the graph and its weights over the dense checkpoint's files; zeros are stored",
    }


def _finish(source: Path, folder: Path, parent: Manifest, metrics: dict[str, Any]) -> Manifest:
    kept = {name: value for name, value in parent.metrics.items() if name != "left_dense"}
    update = {
        "stage": "export",
        "format": "onnx",
        "parent": sha256_file(source / MANIFEST_NAME),
        "metrics": {**kept, **metrics},
    }
    manifest = parent.model_copy(update=update)
    write_card(folder, manifest)
    manifest = manifest.model_copy(update={"files": hash_folder(folder)})
    save_manifest(folder, manifest)
    return manifest
