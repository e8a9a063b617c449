"""The kernels run under Triton's interpreter, on the CPU; only their own import sees the variable that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crepe_deploy.packed.cuda import dispatch, launch

pytest.importorskip("triton")


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    """Import the kernels for the interpreter, before anything else in this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        launch.kernels()
    assert launch.interpreted()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of measurements, and measuring allowed."""
    monkeypatch.setenv("CREPE_DEPLOY_TUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.TUNER.reread()
    yield tmp_path / "crepe-deploy" / "plans"
    dispatch.TUNER.reread()
