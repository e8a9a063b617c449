"""Each budgets file that is shipped decides, and passes, on the shipped run that it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from crepe_deploy.bench.commands.gate import gate_command

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "configs").glob("budgets*.yaml"))


def named_command(budgets: Path) -> list[str]:
    """The arguments of the gate that a budgets file says it passes."""
    (line,) = re.findall(r"^# +crepe-deploy gate (bench/results/.*)$", budgets.read_text(encoding="utf-8"), re.M)
    return shlex.split(line)


def test_there_are_some() -> None:
    assert len(SHIPPED) >= 3


@pytest.mark.parametrize("budgets", SHIPPED, ids=lambda path: path.stem)
def test_it_passes_with_a_decision(budgets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = named_command(budgets)
    assert Path(arguments[-1]) == budgets.relative_to(ROOT)
    result = CliRunner().invoke(gate_command, [*arguments, "--json"])
    verdict: dict[str, Any] = json.loads(result.stdout)
    assert {row["status"] for row in verdict["rows"]} == {"PASS"}, [
        row for row in verdict["rows"] if row["status"] != "PASS"
    ]
    assert result.exit_code == 0
