"""The command `plan`, and the lines that it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from crepe_deploy.option_groups import Grouped

from .inspect import expert_lines
from .options import (
    Count,
    chosen_sparsity_options,
    device_option,
    json_option,
    model_argument,
    print_result,
    revision_option,
    say,
    values_option,
)

if TYPE_CHECKING:
    from crepe_deploy.api.plan import Plan

EXAMPLES = """\b
Examples:
  crepe-deploy plan models/llama
  crepe-deploy plan models/llama --sparsity 16:32
  crepe-deploy plan models/llama --sparsity 16:32 --values int4
  crepe-deploy plan pruned --heal
  crepe-deploy plan HuggingFaceTB/SmolLM2-135M --sparsity 0.6 --granularity matrix --json
"""


@click.command("plan", cls=Grouped, epilog=EXAMPLES)
@model_argument
@chosen_sparsity_options
@values_option
@click.option("--calib-samples", type=Count(1), default=None, help="Default: 64, as is chosen.")
@click.option("--calib-length", type=Count(2), default=None, help="Default: 512, as is chosen.")
@device_option
@revision_option
@click.option("--heal", is_flag=True, help="Say what memory healing will take too.")
@json_option
def plan_command(model: str, as_json: bool, **options: Any) -> None:
    """Say what pruning MODEL will need and what each target will gain, without reading a weight."""
    from crepe_deploy.api.plan import plan

    result = plan(model, say=say, **options)
    print_result(result, as_json, lines(result))


def lines(result: Plan) -> list[str]:
    """The plan for a reader at a terminal."""
    if experts := result.get("experts"):
        peak = result["peak_memory_estimate_bytes"] / 1e6
        return [
            f"{result['model']}, on {result['device']}: {result['checkpoint_bytes'] / 1e6:,.0f} MB",
            *expert_lines(experts),
            f"  peak memory above the libraries, at most about: {peak:,.0f} MB",
            f"  {result['advice']}",
        ]
    megabytes = {
        "checkpoint": result["checkpoint_bytes"],
        "packed checkpoint (lower is better)": result["packed_checkpoint_bytes"],
        "disk needed while pruning, twice the checkpoint": result["disk_needed_bytes"],
    }
    to = result["pattern"] + (f" and {result['values']}" if "values" in result else "")
    text = [f"{result['model']} to {to}: {result['prunable_tensors']} tensors, on {result['device']}"]
    text += [f"  {label}: {size / 1e6:,.0f} MB" for label, size in megabytes.items()]
    text.append(_memory(result))
    text.append(
        "  bytes of the pruned tensors, packed over dense (lower is better): "
        f"{result['pruned_tensors_packed_over_dense']:.4f}"
    )
    for label in ("does_not_divide", "not_packable"):
        if names := result[label]:
            text.append(f"  {label.replace('_', ' ')}: {len(names)} tensors, for example {names[0]}")
    text += [f"  {target}: {truth}" for target, truth in result["targets"].items()]
    for options, size in result.get("heal_memory_estimate_bytes", {}).items():
        text.append(f"  heal, {options}: {size / 1e6:,.0f} MB of memory above the libraries")
    return [*text, f"  {result['advice']}"]


def _memory(result: Plan) -> str:
    """The most memory that is needed at once, and what for where there is more than pruning."""
    pruning, writing = (
        result[name] / 1e6 for name in ("peak_memory_estimate_bytes", "calib_self_memory_estimate_bytes")
    )
    if "calib" not in result["chosen"]:
        return f"  memory above the libraries, at most about: {pruning:,.0f} MB"
    return (
        f"  memory above the libraries, at most about: {max(pruning, writing):,.0f} MB ({writing:,.0f} MB while the "
        f"model writes text of its own, --calib self, then {pruning:,.0f} MB while it is pruned)"
    )
