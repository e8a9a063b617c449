"""`export`: a pruned checkpoint in another format."""

from __future__ import annotations

from pathlib import Path

from crepe_deploy.progress import Progress, Say, silent
from crepe_deploy.store.folders import resolved
from crepe_deploy.store.manifest import Manifest
from crepe_deploy.store.sources import is_model_name

from .inputs import check_base_model, export_options, find_model, output


def default_out(source: str | Path, format: str) -> Path:
    """SOURCE/../FORMAT; of a hub id, a GGUF file or a snapshot in the hub's cache ./NAME-FORMAT."""
    folder = resolved(Path(source))
    if is_model_name(str(source)):
        return Path(f"{folder.name.removesuffix('.gguf')}-{format}")
    if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
        return Path(f"{folder.parent.parent.name.rpartition('--')[2]}-{format}")
    return folder.parent / format


def export(
    source: str | Path, out: str | Path | None = None, *, format: str = "dense", onnx_flavor: str | None = None,
    precision: str | None = None, quantise: str | None = None, base_model: str | None = None,
    resume: bool = False, overwrite: bool = False, revision: str | None = None, progress: Progress | None = None,
    say: Say | None = None,
) -> Manifest:  # fmt: skip
    """Write the pruned checkpoint `source` in another format into `out`, and return its manifest.

    source: a folder, a hub id (`revision`: its branch, tag or commit) or a GGUF file, as `model` of `prune`.
    out: default as `default_out`; appears whole and verified or not at all. format: "dense", "packed" (docs/format.md),
    "int8", "onnx", "gguf", or "deci" for widths per layer. onnx_flavor, precision: of an ONNX graph, "portable" or
    "genai", and "fp32", "fp16" or "int4". quantise: of a GGUF file, "auto" (as stored), "f32", "f16", "bf16", "q8_0",
    "q5_0" or "q4_0". base_model: hub id of the parent, for the model card.
    resume: go on with OUT.work, which a stopped run leaves (on the command line exit code 75): the same bytes, and
    files of weights that are whole are kept. progress: told pieces of work done and in all.
    Raises ConfigError, CheckpointError, OutputError, UnsupportedModel, MissingExtra (exit code 2) before writing;
    VerifyError, ParityError, DiskFullError (1).
    """
    from crepe_deploy.exporting.pipeline import export_checkpoint
    from crepe_deploy.exporting.registry import build

    check_base_model(base_model)
    target = Path(out) if out is not None else default_out(source, format)
    options = export_options(onnx_flavor, precision, quantise)
    build([format], options)
    with output(target, source, overwrite=overwrite):
        folder = find_model(source, revision, say).folder
        return export_checkpoint(
            folder, target, format, resume=resume, overwrite=overwrite, step=progress or silent, options=options,
            base_model=base_model,
        )  # fmt: skip
