"""Small files appear whole or not at all, and where they cannot be is said before work starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crepe_deploy.errors import OutputError
from crepe_deploy.store.files import check_output_file, write_json, write_text


def test_a_file_that_cannot_be_is_refused_early(tmp_path: Path) -> None:
    there = tmp_path / "run.json"
    there.write_text("{}")
    assert check_output_file(there, overwrite=True) == there
    assert check_output_file(tmp_path / "new" / "run.json", overwrite=False)
    with pytest.raises(OutputError, match="--overwrite"):
        check_output_file(there, overwrite=False)
    with pytest.raises(OutputError, match="choose another"):
        check_output_file(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        check_output_file(there / "below.json", overwrite=False)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1} and path.read_text(encoding="utf-8").endswith("}\n")
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(path / "below", "x")
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(path.parent, "x")
    assert list(path.parent.iterdir()) == [path] and list(tmp_path.iterdir()) == [path.parent]


def test_writing_a_small_file_loads_no_torch() -> None:
    code = "import sys, crepe_deploy.store.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_killed_process_left_of_a_file_goes_when_it_is_written_again(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".x.json.crepe-deploy-{ended.pid}"
    others = [tmp_path / f".x.json.crepe-deploy-{name}" for name in ("1", "y", "9" * 30)]
    for path in (left, *others):
        path.write_text("half")
    write_text(tmp_path / "x.json", "{}")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x.json", *others])
