"""Building and choosing kernels: once, under a lock, never an unsupported instruction, never silently slow."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crepe_deploy.errors import ConfigError, KernelError
from crepe_deploy.packed import native

SCRIPT = """
import torch
from crepe_deploy.packed import dispatch
from crepe_deploy.packed.format import pack
from crepe_deploy.packed.linear import PackedLinear
mask = (torch.arange(64) % 2 == 0).repeat(20, 1)
values, bits = pack(torch.arange(20 * 64.0).view(20, 64), mask)
layer = PackedLinear.from_packed(values, bits, 1, 2)
x = torch.eye(64)[:5]
assert torch.equal(layer(x), x @ layer.to_dense().T)
assert all(torch.equal(a, b) for a, b in zip(layer.to_packed(), (values, bits)))
print(dispatch.describe()["isa"], dispatch.describe()["reason"])
"""


@pytest.mark.parametrize("isa", ["torch", "portable"])
def test_the_environment_forces_an_isa(isa: str) -> None:
    environment = {**os.environ, native.ISA_VARIABLE: isa}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, "asked", "for", "by", native.ISA_VARIABLE]


def test_an_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    with pytest.raises(ConfigError, match="sse9"):
        native.backend.__wrapped__()


def test_an_isa_this_machine_lacks_is_refused() -> None:
    with pytest.raises(KernelError, match="neon"):
        native.load().use("neon")


def test_no_compiler_means_torch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    with caplog.at_level(logging.WARNING):
        backend = native.backend.__wrapped__()
    assert backend.isa == "torch"
    assert "no C++ compiler" in backend.reason
    assert "install g++" in caplog.text
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    with pytest.raises(KernelError, match="no C\\+\\+ compiler"):
        native.backend.__wrapped__()


def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such flag" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelError, match="no such flag"):
        native.build(str(compiler))


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "crepe-deploy").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelError, match="XDG_CACHE_HOME"):
        native.build(native.find_compiler())


def test_concurrent_builds_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[Path] = []

    def compile_slowly(compiler: str, scratch: Path) -> Path:
        threading.Event().wait(0.2)
        compiled.append(scratch)
        (scratch / "libcrepe.so").write_text("library")
        return scratch / "libcrepe.so"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_compile", compile_slowly)
    compiler = native.find_compiler()
    threads = [threading.Thread(target=native.build, args=(compiler,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    path = native.build(compiler)
    assert path.read_text() == "library"
    assert sorted(file.name for file in path.parent.iterdir()) == ["libcrepe.so", "lock"]
