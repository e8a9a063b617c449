"""What the commands print for people: the same dictionaries that `--json` prints, as lines."""

from __future__ import annotations

import json
from typing import Any


def report_lines(report: dict[str, Any]) -> list[str]:
    """What `prune-and-export` did."""
    seconds = sum(report["seconds"].values())
    recipe = f", recipe {report['recipe']}" if report["recipe"] else ""
    lines = [
        f"{report['pruned_tensors']} linear layers pruned to {report['pattern']} with {report['method']}{recipe}: "
        f"{report['sparsity_of_pruned_tensors']:.2%} zeros counted on disk, {seconds:.1f} s",
        f"reloaded logits differ by at most {report['parity']['max_abs_logit_difference']:.3g}",
    ]
    if report["steps"]:
        steps = ", ".join(f"{kind} {step['class'].lower()}" for kind, step in report["steps"].items())
        lines.insert(1, f"steps: {steps}; patterns: {_counts(report['patterns'])}")
    if found := report["rescale"]:
        lines.append(
            f"logits times {found['factor']:.3f}: mean KL to the dense model on held-out calibration windows "
            f"{found['kl_before']:.3f} -> {found['kl']:.3f}"
        )
    lines += report["limits"]
    for name, export in report["formats"].items():
        ratio = export["size"]["weight_bytes_over_dense"]
        size = f"{export['weight_file_bytes'] / 1e6:.0f} MB, pruned layers {ratio:.4g} of their dense bytes"
        lines.append(f"{name}: {export['path']} ({size})")
    return lines


def _counts(patterns: dict[str, int]) -> str:
    return ", ".join(f"{count} x {pattern}" for pattern, count in patterns.items())


def quality_lines(result: dict[str, Any]) -> list[str]:
    """What `eval` measured."""
    lines = []
    if "perplexity" in result:
        convention = ", ".join(f"{name}={value}" for name, value in result["convention"].items() if name != "sha256")
        lines += [f"perplexity {_interval(result['perplexity'])}", f"convention: {convention}"]
    if paired := result.get("paired"):
        lines.append(f"against {paired['reference']} (perplexity {_interval(paired['reference_perplexity'])}):")
        names = {
            "perplexity_ratio": "perplexity ratio",
            "kl_mean": "mean KL",
            "kl_p99": "p99 KL",
            "same_top": "same top token",
        }
        lines += [f"  {label} {_interval(paired[name])}" for name, label in names.items()]
    for name, task in result.get("tasks", {}).items():
        lines.append(f"{name}: {json.dumps(task)}")
    return lines


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"


def tensor_lines(tensors: list[dict[str, Any]]) -> list[str]:
    """What `inspect` counted, one line a tensor."""
    return [
        f"{tensor['sparsity']:8.2%}  {tensor['pattern'] or '-':>6}  {tensor['dtype']:>9}  "
        f"{tensor['shape']!s:>16}  {tensor['name']}"
        for tensor in tensors
    ]


def width_lines(layers: list[dict[str, Any]]) -> list[str]:
    """What each layer of a structurally pruned model kept, one line a layer."""
    return [
        f"layer {found['layer']}: {found['heads']} query heads, {found['kv_heads']} KV heads, "
        f"{found['intermediate']} neurons"
        for found in layers
    ]
