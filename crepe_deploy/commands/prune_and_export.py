"""The command `prune-and-export`, and the lines that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crepe_deploy.option_groups import Grouped

from .options import (
    base_model_option,
    format_option,
    heal_option,
    healed_line,
    onnx_options,
    prepare_libraries,
    print_result,
    prune_options,
    quantise_option,
    resumable_folder,
    say,
    values,
)

EXAMPLES = """\b
Examples:
  crepe-deploy prune-and-export models/llama --out out
  crepe-deploy prune-and-export models/llama --calib wiki.txt --out out
  crepe-deploy prune-and-export models/llama --method ria --sparsity 16:32 --calib wiki.txt --format packed --out out
  crepe-deploy prune-and-export models/llama --recipe best --calib wiki.txt --calib c4.txt --format packed --out out
  crepe-deploy prune-and-export model.gguf --method magnitude --sparsity 0.5 --format onnx --onnx-flavor genai --out out
"""


@click.command("prune-and-export", cls=Grouped, epilog=EXAMPLES)
@prune_options
@format_option(
    "Default: dense and packed, with onnx where that alone is served here; dense beside a named method. "
    "One or more, with commas between them, of:",
    default=None,
)
@onnx_options
@quantise_option
@heal_option
@base_model_option
def prune_and_export_command(out: Path, as_json: bool, **options: Any) -> None:
    """Prune MODEL and write OUT/FORMAT/ for each format, and OUT/report.json.

    What is left out is chosen for the machine, and said. Exit code 75 means stopped: the same command with --resume
    goes on, also to other formats.
    """
    prepare_libraries()
    from crepe_deploy.api.prune import prune_and_export
    from crepe_deploy.progress import progress

    with resumable_folder(out), progress(f"pruning {options['model']}", waits=True) as step:
        report = prune_and_export(out=out, progress=step, say=say, **values(options))
    print_result(report, as_json, lines(report))


def lines(report: dict[str, Any]) -> list[str]:
    """What `prune-and-export` did."""
    seconds = sum(report["seconds"].values())
    recipe = f", recipe {report['recipe']}" if report["recipe"] else ""
    text = [
        f"{report['pruned_tensors']} linear layers pruned to {report['pattern']} with {report['method']}{recipe}: "
        f"{report['sparsity_of_pruned_tensors']:.2%} zeros counted on disk, {seconds:.1f} s",
        "logits of the files, read again from the disk, differ from the pruned model's by at most "
        f"{report['parity']['max_abs_logit_difference']:.3g}",
    ]
    if report["steps"]:
        steps = ", ".join(f"{kind} {step['class'].lower()}" for kind, step in report["steps"].items())
        text.insert(1, f"steps: {steps}; patterns: {_counts(report['patterns'])}")
    if rescaled := report["rescale"]:
        text.append(
            f"logits times {rescaled['factor']:.3f}: mean KL to the dense model on held-out calibration windows "
            "(lower is better) "
            f"{rescaled['kl_before']:.3f} -> {rescaled['kl']:.3f}"
        )
    if healed := report.get("healed"):
        text.append(healed_line(healed))
    text += report["limits"]
    for name, export in report["formats"].items():
        ratio = export["size"]["weight_bytes_over_dense"]
        size = f"bytes of the pruned layers over dense, lower is better: {ratio:.4g}"
        text.append(f"{name}: {export['path']} ({export['weight_file_bytes'] / 1e6:.0f} MB; {size})")
    return text


def _counts(patterns: dict[str, int]) -> str:
    return ", ".join(f"{count} x {pattern}" for pattern, count in patterns.items())
