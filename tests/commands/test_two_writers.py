"""Two runs that write one output: every command refuses to be the second, at once and without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from crepe_deploy import cli
from crepe_deploy.cli import run
from crepe_deploy.store.folders import Claim, atomic_folder, held
from tests.commands.samples import enter_samples

TEXT = ("--calib", "text.txt", "--calib-samples", "2", "--calib-length", "16")
# A command with an output, as it is called in a folder of the samples, and the output.
COMMANDS: dict[str, tuple[str, ...]] = {
    "prune": ("prune", "model", "--method", "magnitude", "--out", "out"),
    "prune-and-export": ("prune-and-export", "model", "--method", "magnitude", "--out", "out"),
    "export": ("export", "pruned", "--out", "out"),
    "search": ("search", "model", *TEXT, "--text", "text.txt", "--text-samples", "1", "--text-length", "16", "--out",
               "out.json"),
    "tyr": ("tyr", "model", *TEXT, "--sparsity", "0.25", "--search-samples", "1", "--ffn-multiple", "8", "--out",
            "out"),
    "experts": ("experts", "mixtral", "--remove", "1", *TEXT, "--out", "out"),
    "heal": ("heal", "pruned", "--dense", "model", "--text", "text.txt", "--steps", "1", "--window", "16",
             "--batch-tokens", "32", "--out", "out"),
    "report": ("report", "run.json", "--out", "out"),
    "bench run": ("bench", "run", "model", "--engine", "transformers", "--out", "out.json"),
    "bench init-ci": ("bench", "init-ci", "suite.yaml", "--budgets", "budgets.yaml", "--requirement", "x"),
    "gate": ("gate", "run.json", "run.json", "--max-slowdown", "1", "--markdown", "out.md"),
}  # fmt: skip
OUTPUTS = {"bench init-ci": ".github/workflows/crepe-deploy.yml", "gate": "out.md"}


def commands_with_an_output(group: click.Group, name: str = "") -> Iterator[str]:
    """Every command that takes --out, and those that write a file by another name."""
    for command in group.commands.values():
        whole = f"{name} {command.name}".strip()
        if isinstance(command, click.Group):
            yield from commands_with_an_output(command, whole)
        elif whole in OUTPUTS or any("--out" in option.opts for option in command.params):
            yield whole


def output_of(name: str) -> str:
    return OUTPUTS.get(name) or COMMANDS[name][-1]


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_samples(tmp_path, monkeypatch)
    return tmp_path


def test_every_command_with_an_output_is_tried() -> None:
    cli.add_outer_commands()
    assert set(commands_with_an_output(cli.cli)) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_writer_of_an_output_is_refused(
    samples: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = Path(output_of(name))
    out.parent.mkdir(parents=True, exist_ok=True)
    with Claim(out):  # a lock that this process holds by another handle is as good as another process's
        before = sorted(samples.rglob("*"))
        capsys.readouterr()
        assert run(list(COMMANDS[name])) == 2
        assert "another run is writing" in capsys.readouterr().err
        assert sorted(samples.rglob("*")) == before


def test_a_hold_is_of_the_run_that_has_it_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"
    with held(out):
        assert (out.parent / ".out.crepe-deploy").exists()
        with atomic_folder(out) as folder:
            (folder / "file").write_text("x")
        assert (out.parent / ".out.crepe-deploy").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with held(tmp_path / "other" / "out"):
        pass
    assert not (tmp_path / "other").exists()
