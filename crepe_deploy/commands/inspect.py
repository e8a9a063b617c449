"""The command `inspect`, and the lines that it prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from crepe_deploy.option_groups import MODEL, Argument, Grouped

from .options import json_option, print_result, revision_option, say

if TYPE_CHECKING:
    from crepe_deploy.api.inspect import TensorRow

EXAMPLES = """\b
Examples:
  crepe-deploy inspect out/dense
  crepe-deploy inspect out/onnx --json
"""


@click.command("inspect", cls=Grouped, epilog=EXAMPLES)
@click.argument("folder", cls=Argument, metavar="MODEL", help=MODEL)
@revision_option
@json_option
def inspect_command(folder: str, revision: str | None, as_json: bool) -> None:
    """Count the zeros of every tensor in MODEL, name the pattern that holds, and say the widths of uneven layers.

    MODEL is a folder, a hub id or a GGUF file, of which the header is read and its tensors listed."""
    from crepe_deploy.api.inspect import inspect

    result = inspect(folder, revision=revision, say=say)
    experts = expert_lines(result.experts) if result.experts else []
    damage = [f"damaged: {result.damage}"] if result.damage else []
    print_result(
        result.to_dict(), as_json, [*tensor_lines(result.tensors), *width_lines(result.layers or []), *experts, *damage]
    )


def tensor_lines(tensors: list[TensorRow]) -> list[str]:
    """What `inspect` counted: a header, a line a tensor, 'counted' where no manifest confirms its pattern, a total."""
    rows = [
        f"{_percent(tensor['sparsity']):>8}  {tensor['pattern'] or '-':>7}  {tensor['dtype']:>9}  "
        f"{tensor['shape']!s:>16}  {tensor['name']}{'  packed' if tensor.get('packed') else ''}"
        f"{'  ' + tensor['values'] if 'values' in tensor else ''}"
        f"{'  counted' if tensor['pattern_from'] == 'zeros' else ''}"
        for tensor in tensors
    ]
    pruned = [tensor for tensor in tensors if tensor["pattern"]]
    total = f"{len(tensors)} tensors, {len(pruned)} of them with a pattern"
    if entries := sum(math.prod(tensor["shape"]) for tensor in pruned):
        total += f", {sum(tensor['zeros'] or 0 for tensor in pruned) / entries:.2%} zeros in these"
    return [f"{'zeros':>8}  {'pattern':>7}  {'dtype':>9}  {'shape':>16}  tensor", *rows, total]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def expert_lines(experts: dict[str, Any]) -> list[str]:
    """The experts of a mixture, and what stays without some."""
    sizes = experts["parameters"]
    text = [
        f"  {experts['layers']} layers of {experts['experts']} experts, {experts['per_token']} for a token; parameters "
        f"held {sizes['held']:,}, active {sizes['active']:,}"
    ]
    return text + [f"  without {share} of them: {held:,} held" for share, held in experts["held_without"].items()]


def width_lines(layers: list[dict[str, Any]]) -> list[str]:
    """What each layer of a structurally pruned model kept, one line a layer."""
    return [
        f"layer {layer['layer']}: {layer['heads']} query heads, {layer['kv_heads']} KV heads, "
        f"{layer['intermediate']} neurons"
        for layer in layers
    ]
