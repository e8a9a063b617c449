"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crepe_deploy.option_groups import MODEL, Argument, Grouped

from .options import (
    base_model_option,
    format_option,
    json_option,
    onnx_options,
    overwrite_option,
    prepare_libraries,
    print_result,
    quantise_option,
    resumable_folder,
    resume_option,
    revision_option,
    say,
)

EXAMPLES = """\b
Examples:
  crepe-deploy export pruned --format packed
  crepe-deploy export pruned --format onnx --onnx-flavor genai --precision int4 --out served
  crepe-deploy export out/dense --format deci --out for-stock-vllm
  crepe-deploy export smaller --format gguf --quantise q8_0 --out for-llama.cpp
"""


@click.command("export", cls=Grouped, epilog=EXAMPLES)
@click.argument("source", cls=Argument, help=MODEL)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Default: SOURCE/../FORMAT; of a hub id or a GGUF file ./NAME-FORMAT.",
)
@format_option("One of:")
@onnx_options
@quantise_option
@base_model_option
@resume_option
@overwrite_option
@revision_option
@json_option
def export_command(source: str, out: Path | None, format: str, as_json: bool, **options: Any) -> None:
    """Export the pruned checkpoint SOURCE, a folder, a hub id or a GGUF file, into another format.

    Exit code 75 means stopped: the same command with --resume goes on.
    """
    prepare_libraries()
    from crepe_deploy.api.export import default_out, export
    from crepe_deploy.progress import progress

    target = out if out is not None else default_out(source, format)
    with resumable_folder(target), progress(f"exporting {source} as {format}", waits=True) as step:
        manifest = export(source, target, format=format, progress=step, say=say, **options)
    summary = {"out": str(target), "format": manifest.format, "size": manifest.metrics["size"]}
    limits = manifest.metrics.get(manifest.format, {}).get("limits", [])
    print_result(summary, as_json, [f"{target}: {manifest.format}, verified", *limits])
