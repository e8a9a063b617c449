"""Every causal class of transformers works, or is refused by name before any work: docs/architectures.md, repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.model import zoo
from tests.model.sweep import STEPS, check, row, sweep

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
QUICK = ("load", "walk", "statistics", "magnitude")


def test_the_page_has_every_model_type_of_this_transformers() -> None:
    assert f"transformers {transformers.__version__} that" in PAGE
    assert sorted(line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")) == sorted(zoo.TYPES)


@pytest.mark.parametrize("model_type", zoo.TYPES)
def test_it_is_walked_as_transformers_runs_it_or_refused(tmp_path: Path, model_type: str) -> None:
    outcomes = sweep(model_type, tmp_path / "work", QUICK)
    check(outcomes)
    expected = row(model_type, outcomes) if outcomes["load"] else f"| `{model_type}` | yes |"
    assert any(line.startswith(expected) for line in PAGE.splitlines()), expected


@pytest.mark.faults
@pytest.mark.parametrize("model_type", zoo.TYPES)
def test_every_step_works_or_is_refused(tmp_path: Path, model_type: str) -> None:
    outcomes = sweep(model_type, tmp_path / "work", tuple(STEPS))
    assert row(model_type, outcomes) in PAGE.splitlines()
