"""Kernel tests run without measuring, so that they are reproducible, and put the instruction set back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from crepe_deploy.packed import native
from crepe_deploy.packed.tuning.tuner import TUNE_VARIABLE


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(TUNE_VARIABLE, "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tests of threads ask for more; the others need not wait for a busy machine's cores
    yield
    torch.set_num_threads(threads)
    served = native.backend()
    if served.native is not None:
        served.native.use(served.isa)
