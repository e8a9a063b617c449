"""--json on every command: an error is one JSON document on stdout, with the exit code that it has without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from crepe_deploy import cli
from crepe_deploy.nearest import meant, unknown


def commands(group: click.Group = cli.cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words that call each command."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


cli.add_outer_commands()
COMMANDS = list(commands())
NOTHING = {"doctor", "clean"}  # takes nothing that could be missing


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """The document of a command that fails, whose code is that without --json."""
    code = cli.run([*arguments])
    out, err = capsys.readouterr()
    assert code != 0 and err and not out
    assert cli.run([*arguments, "--json"]) == code
    out, again = capsys.readouterr()
    assert again == err
    document = json.loads(out)
    assert document["code"] == code and document["error"]
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_json_and_says_its_usage_errors_so(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    if command[-1] not in NOTHING:
        assert failed(capsys, *command)["kind"] == "MissingParameter"
    words = command if command[-1] == "serve" else (*command, "--nonsense")  # serve passes options on
    assert failed(capsys, *words, *(["x", "--port", "x"] if command[-1] == "serve" else []))["code"] == 2


@pytest.mark.parametrize("command", ["verify", "inspect", "export", "plan", "eval", "serve", "report", "gate", "prune"])
def test_an_error_of_ours_is_a_document(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    more = {
        "report": ["--out", str(tmp_path / "out")],
        "prune": ["--out", str(tmp_path / "out")],
        "eval": ["--text", str(tmp_path / "none.txt")],
        "gate": ["--max-slowdown", "0.1", "--pruned", "x"],
    }
    document = failed(capsys, command, str(tmp_path / "none"), *more.get(command, []))
    assert str(document["kind"]).endswith("Error") and "none" in str(document["error"])


def test_what_nobody_foresaw_names_the_details(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_root: Path) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("crepe_deploy.store.manifest.verify", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.run(["verify", str(tmp_path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "ZeroDivisionError" and Path(document["details"]).is_file()
    assert "report it at https://" in document["error"]


def test_a_stop_is_a_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_root: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crepe_deploy.store.manifest.verify", stop)
    assert cli.run(["verify", ".", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["code"] == 130


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["prun", "x"], "'prune'"),
        (["prune", "x", "--out", "y", "--sparsty", "2:4"], "'--sparsity'"),
        (["prune", "x", "--out", "y", "--method", "wunda"], "'wanda'"),
        (["prune", "x", "--out", "y", "--allocate", "olw"], "'owl'"),
        (["prune", "x", "--out", "y", "--recipe", "bset"], "'best'"),
        (["prune", "x", "--out", "y", "--param", "exponnt=1"], "'exponent'"),
        (["prune-and-export", "x", "--out", "y", "--format", "pakced"], "'packed'"),
    ],
)
def test_a_near_miss_is_told_what_was_meant(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], nearest: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert cli.run(arguments) == 2
    err = capsys.readouterr().err
    assert nearest in err.lower() and "did you mean" in err.lower(), err


def test_what_is_near_nothing_gets_no_suggestion() -> None:
    assert meant("zzz", ["wanda", "ria"]) == "" and meant("WANDA", ["wanda"]) == "; did you mean 'wanda'?"
    assert unknown("method", "x", ["wanda"]) == "method 'x' is unknown; known: wanda"
