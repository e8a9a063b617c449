"""`export`: a pruned checkpoint in another format."""

from __future__ import annotations

from pathlib import Path

from crepe_deploy.progress import Progress, silent
from crepe_deploy.store.checkpoint import require_folder
from crepe_deploy.store.manifest import Manifest

from .inputs import export_options


def export(
    source: str | Path, out: str | Path | None = None, *, format: str = "dense", onnx_flavor: str | None = None,
    precision: str | None = None, overwrite: bool = False, progress: Progress | None = None,
) -> Manifest:  # fmt: skip
    """Write the pruned checkpoint folder `source` in another format into `out`, and return its manifest.

    out: default SOURCE/../FORMAT; appears whole and verified or not at all. format: "dense", "packed" (docs/format.md),
    "int8", "onnx", or "deci" for widths per layer. onnx_flavor, precision: of an ONNX graph, "portable" or "genai", and
    "fp32", "fp16" or "int4". progress: told pieces of work done and in all.
    Raises ConfigError, CheckpointError, OutputError, UnsupportedModel, MissingExtra (exit code 2) before writing;
    VerifyError, ParityError, DiskFullError (1).
    """
    from crepe_deploy.exporting.pipeline import export_checkpoint

    require_folder(Path(source))
    target = Path(out) if out is not None else Path(source).resolve().parent / format
    options = export_options(onnx_flavor, precision)
    return export_checkpoint(
        Path(source), target, format, overwrite=overwrite, step=progress or silent, options=options
    )
