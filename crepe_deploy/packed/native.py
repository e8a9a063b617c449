"""Building and loading the C++ kernels: once per machine, into the user's cache directory.

The library is compiled at first use by the system's C++ compiler (`CXX`, else g++, clang++ or c++), one object per
instruction set, and linked against the torch that runs. Concurrent processes wait for each other at a file lock and
the result appears by one atomic rename. `CREPE_DEPLOY_CPU_ISA` forces an instruction set, or `torch` for none.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from crepe_deploy.errors import ConfigError, KernelError
from crepe_deploy.machine import cache_dir

ISA_VARIABLE: Final = "CREPE_DEPLOY_CPU_ISA"
TORCH_ISA: Final = "torch"
ISAS: Final = ("amx", "avx512bf16", "avx512", "avx2", "portable", TORCH_ISA)

_SOURCES: Final = Path(__file__).parent / "cpu"
_AVX2: Final = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi")
_AVX512: Final = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX512BF16: Final = (*_AVX512, "-mavx512bf16", "-mavx512vbmi2")
_X86_UNITS: Final[dict[str, tuple[str, ...]]] = {
    "amx": (*_AVX512BF16, "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": _AVX512BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
}
_LOG: Final = logging.getLogger("crepe_deploy")


@dataclass(frozen=True)
class Native:
    """The loaded kernels: `library` is their C interface, `supported` the instruction sets of this machine."""

    library: ctypes.CDLL
    path: Path
    compiler: str
    supported: tuple[str, ...]

    def use(self, isa: str) -> None:
        """Let every later call run the kernels of `isa`; raises KernelError when this machine lacks it."""
        if self.library.crepe_use(isa.encode()) != 0:
            raise KernelError(f"this machine cannot run the {isa} kernels; it can run {', '.join(self.supported)}")


@dataclass(frozen=True)
class Backend:
    """What serves packed linears in this process: `isa` (or `torch`), why, and the native kernels if any."""

    isa: str
    reason: str
    native: Native | None


@functools.cache
def backend() -> Backend:
    """The backend of this process, chosen once: the best instruction set, the one asked for, or torch with a reason.

    Raises ConfigError for an unknown `CREPE_DEPLOY_CPU_ISA`, KernelError when the one asked for cannot run.
    """
    asked = os.environ.get(ISA_VARIABLE, "")
    if asked and asked not in ISAS:
        raise ConfigError(f"{ISA_VARIABLE}={asked} is unknown; known: {', '.join(ISAS)}")
    if asked == TORCH_ISA:
        return Backend(TORCH_ISA, f"asked for by {ISA_VARIABLE}", None)
    try:
        native = load()
    except KernelError as error:
        if asked:
            raise
        _LOG.warning("packed linears run on torch, slower than dense: %s", error)
        return Backend(TORCH_ISA, str(error), None)
    isa = asked or native.supported[0]
    native.use(isa)
    return Backend(isa, f"asked for by {ISA_VARIABLE}" if asked else "the best this machine supports", native)


@functools.cache
def load() -> Native:
    """Build (when not cached) and load the kernels. Raises KernelError saying what is missing."""
    compiler = find_compiler()
    path = build(compiler)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the kernels in {path} cannot be loaded: {error}; delete that folder to rebuild") from error
    library.crepe_supported.restype = ctypes.c_char_p
    library.crepe_use.argtypes = [ctypes.c_char_p]
    library.crepe_relayout.restype = ctypes.c_int64
    library.crepe_relayout.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4
    library.crepe_decode.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
        *[ctypes.c_int64] * 5,
    ]
    library.crepe_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    supported = tuple(library.crepe_supported().decode().split())
    return Native(library, path, compiler, supported)


def find_compiler() -> str:
    """The C++ compiler: `CXX`, else the first of g++, clang++ and c++. Raises KernelError when there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        compiler = shutil.which(name) if name else None
        if compiler:
            return compiler
    raise KernelError("there is no C++ compiler to build the kernels with; install g++ (apt install g++) or set CXX")


def build(compiler: str) -> Path:
    """The shared library built from this package's sources for this torch and compiler, built now if absent.

    Raises KernelError with the compiler's own message, or when the cache directory cannot be written.
    """
    folder = cache_dir() / "kernels" / build_key(compiler)
    path = folder / "libcrepe.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _LOG.warning("building the CPU kernels, which takes a minute or so (once; kept in %s)", folder)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    _compile(compiler, Path(scratch)).replace(path)
    except OSError as error:
        raise KernelError(f"the kernels cannot be built in {folder}: {error}; set XDG_CACHE_HOME elsewhere") from error
    return path


def build_key(compiler: str) -> str:
    """A hash of everything the library depends on: sources, flags, torch, compiler, processor family."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    version = _run([compiler, "--version"])
    for part in (torch.__version__, compiler, version, platform.machine(), str(_X86_UNITS), str(_torch_flags())):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _compile(compiler: str, scratch: Path) -> Path:
    """Compile every unit into `scratch` and link them; returns the library's path there. Raises KernelError."""
    common = [compiler, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-w"]
    units: dict[str, tuple[str, ...]] = {"bind": _torch_flags(), "portable": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        units |= _X86_UNITS
    commands = [
        [*common, *flags, "-c", str(_SOURCES / f"{unit}.cpp"), "-o", str(scratch / f"{unit}.o")]
        for unit, flags in units.items()
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_run, commands))
    library = scratch / "libcrepe.so"
    objects = [str(scratch / f"{unit}.o") for unit in units]
    _run([compiler, "-shared", *objects, "-o", str(library), *_link_flags()])
    return library


def _torch_flags() -> tuple[str, ...]:
    include = Path(torch.__file__).parent / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return (
        "-fopenmp",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        "-isystem",
        str(include),
        "-isystem",
        str(include / "torch" / "csrc" / "api" / "include"),
    )


def _link_flags() -> list[str]:
    """Link torch, and the very OpenMP runtime torch brings, so that there is one pool of threads."""
    folder = Path(torch.__file__).parent / "lib"
    openmp = sorted(folder.glob("libgomp*.so*"))
    return [f"-L{folder}", "-ltorch_cpu", "-lc10", str(openmp[0]) if openmp else "-fopenmp"]


def _run(command: list[str]) -> str:
    """Run a compiler command and return what it prints. Raises KernelError with the end of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelError(f"the compiler {command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise KernelError(f"building the kernels failed: {' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout
