"""A disk that refuses the samples of a search, whichever of its file calls fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.strikes import environment

STRUCK = """
import sys
from pathlib import Path
import torch
from crepe_deploy.errors import CrepeError
from crepe_deploy.searching.statistics import Band, LayerSample, _through_disk
from tests.faults.strikes import Counter, arm

root = Path(sys.argv[1])
(root / "samples").mkdir()
one = torch.ones(4)
layer = LayerSample("a", 4, (Band(torch.ones(4, 4), 0, 4, 0),), one, one, one, one)
for event in range(1, 9):
    arm(root, event, sys.argv[2], Counter())()
    try:
        _through_disk(root / "samples" / f"block-{event}.safetensors", [layer])
    except CrepeError as error:
        print("refused")
    else:
        print("read")
"""


@pytest.mark.parametrize("kind", ["EACCES", "EIO", "ENOSPC"])
def test_a_sample_that_the_disk_refuses_is_named(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", STRUCK, str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0 and "refused" in done.stdout, done.stderr
