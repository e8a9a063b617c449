"""Every command on every input of the library: what it must answer, one line where that is a refusal, nothing left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from crepe_deploy.bench import benchmark
from crepe_deploy.bench.run import measure
from crepe_deploy.bench.run.scenario import Scenario
from crepe_deploy.serve import launcher

from crepe_deploy.cli import run
from tests.field import makers  # noqa: F401 - fills the library
from tests.field.library import CASES, COMMANDS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Inputs made so far, by name."""
    return {}


def files_of(root: Path) -> dict[str, bytes]:
    """Every regular file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` and `bench` do all that they do before a server or a process that measures is started, and end well."""

    def checked(scenario: Scenario, *_: Any, **__: Any) -> None:
        measure.check(scenario)
        raise click.exceptions.Exit(0)

    monkeypatch.setattr(launcher, "require_vllm", lambda: None)
    monkeypatch.setattr(launcher, "run", lambda *_: None)
    monkeypatch.setattr(benchmark, "bench", checked)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", CASES)
def test_every_command_answers_every_input(
    tmp_path_factory: pytest.TempPathFactory,
    made: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    command: str,
) -> None:
    case, work = CASES[name], tmp_path_factory.mktemp(command)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    if name not in made:
        made[name] = case.make(tmp_path_factory.mktemp(name))
    place = made[name] if made[name].is_dir() else made[name].parent
    before = files_of(place)
    capsys.readouterr()
    code = run(COMMANDS[command](made[name], work))
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "unexpected" not in err and "Traceback" not in err
    assert files_of(place) == before, "the input was written to"
    word = case.answer(command)
    if word is None:
        assert (code, said) == (0, [])
        for manifest in work.rglob("manifest.json"):
            assert "lineage" in manifest.parts or run(["verify", str(manifest.parent)]) == 0
        return
    failed = word.startswith("1: ")
    assert code == (1 if failed else 2), err
    assert len(said) == 1 and word.removeprefix("1: ") in said[0], err
    assert sorted(path.name for path in work.iterdir()) == []
