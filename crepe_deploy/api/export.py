"""`export`: a pruned checkpoint in another format."""

from __future__ import annotations

from pathlib import Path

from crepe_deploy.progress import Progress, silent
from crepe_deploy.store.manifest import Manifest


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
    from crepe_deploy.exporting.onnx.support import OnnxOptions
    from crepe_deploy.exporting.pipeline import export_checkpoint

    target = Path(out) if out is not None else Path(source).resolve().parent / format
    onnx = OnnxOptions(onnx_flavor or "portable", precision or "fp32")
    return export_checkpoint(Path(source), target, format, overwrite=overwrite, step=progress or silent, onnx=onnx)
