"""Every command's help: quick, and with examples that parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from crepe_deploy.exporting.registry import EXPORTERS

from crepe_deploy.cli import add_outer_commands, cli, run
from crepe_deploy.option_groups import GROUPS, Argument

add_outer_commands()


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below `group` with the words that call it."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(cli))
EXAMPLES = [
    line.strip()
    for command in (cli, *COMMANDS.values())
    for line in (command.epilog or "").splitlines()
    if line.strip().startswith("crepe-deploy")
]
HELP = """
import sys
from crepe_deploy import cli

for path in {paths!r}:
    assert cli.run([*path, "--help"]) == 0, path
    loaded = {{"torch", "transformers", "numpy", "pydantic"}} & set(sys.modules)
    assert not loaded, (path, loaded)
"""


def test_no_help_needs_torch() -> None:
    code = HELP.format(paths=[(), *COMMANDS])
    help_text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in COMMANDS:
        assert f"Usage: crepe-deploy {' '.join(command)}" in help_text


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_examples_of_itself(path: tuple[str, ...]) -> None:
    own = " ".join(path).removesuffix(" run")  # `bench` runs by default
    assert any(line.startswith(f"crepe-deploy {own} ") or line == f"crepe-deploy {own}" for line in EXAMPLES)
    assert (COMMANDS[path].epilog or "").startswith("\b\nExamples:\n")


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_parse(line: str) -> None:
    arguments = shlex.split(line)[1:]
    command: click.Command = cli
    context = cli.make_context("crepe-deploy", arguments)
    while isinstance(command, click.Group) and (words := [*context._protected_args, *context.args]):
        name, chosen, rest = command.resolve_command(context, words)
        assert chosen is not None and name is not None, line
        command = chosen
        context = command.make_context(name, rest, parent=context)
    assert context.params


OPTIONS = [
    (" ".join(path), option) for path, command in COMMANDS.items() for option in command.params
    if isinstance(option, click.Option)
]  # fmt: skip
# Options whose name means another thing in another command.
OTHERWISE = {
    "--budgets", "--calib-length", "--calib-samples", "--format", "--heal", "--json", "--max-tokens", "--method",
    "--minutes", "--out", "--overwrite", "--resume", "--seed", "--sparsity", "--text", "--top-k", "--window", "--dtype",
}  # fmt: skip


def test_every_option_says_what_it_is() -> None:
    assert [(name, option.name) for name, option in OPTIONS if not option.help] == []


def test_an_option_is_worded_alike_wherever_it_means_the_same() -> None:
    words: dict[str, set[str | None]] = {}
    for _, option in OPTIONS:
        words.setdefault(option.opts[0], set()).add(option.help)
    assert {name for name, helps in words.items() if len(helps) > 1} <= OTHERWISE


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=" ".join)
def test_a_help_screen_says_all_that_it_lists(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "None]" not in shown and not re.search(r"[a-z,]\.\.\.$", shown, re.MULTILINE)
    assert not re.search(r"\bconfigs/", shown), "which nobody has who installed the wheel"
    command = COMMANDS.get(path, cli)
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    assert all(isinstance(one, Argument) and one.text for one in arguments)
    if arguments:
        heads = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
        assert heads[0] == "Arguments:"
        loose = shown[shown.index("\nOptions:") :].splitlines()[2:] if "\nOptions:" in shown else []
        assert all(line.startswith(("  -", "   ", "  Examples")) or not line for line in loose)


@pytest.mark.parametrize("typed", ["--sparcity", "--sparsty", "--sparity"])
def test_of_a_misspelt_option_the_nearest_alone_is_suggested(capsys: pytest.CaptureFixture[str], typed: str) -> None:
    assert run(["prune", "model", typed, "2:4"]) == 2
    said = capsys.readouterr().err
    assert "--sparsity" in said and "--granularity" not in said


def test_options_stand_in_groups_that_a_table_has(capsys: pytest.CaptureFixture[str]) -> None:
    named = [name for names in GROUPS.values() for name in names.split()]
    assert len(set(named)) == len(named)
    assert set(named) <= {str(option.name) for _, option in OPTIONS}
    for path, command in COMMANDS.items():
        loose = [option.name for option in command.params if isinstance(option, click.Option)]
        if len(loose) > 8 and path != ("bench", "init-ci"):
            assert set(map(str, loose)) <= set(named), path
    assert run(["prune", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.rstrip(":") for line in lines if line.rstrip(":") in GROUPS and line.endswith(":")]
    assert heads == ["What to prune", "How to prune", "Calibration", "Running", "Output"]
    assert sum(line.strip().startswith("--calib ") for line in lines) == 1


def test_formats_are_the_registrys_wherever_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("export", "prune-and-export"):
        assert run([command, "--help"]) == 0
        assert ", ".join(EXPORTERS) in " ".join(capsys.readouterr().out.split())
        assert run([command, "none", "--out", "out", "--format", "none"]) == 2
        assert f"known: {', '.join(EXPORTERS)}" in capsys.readouterr().err
