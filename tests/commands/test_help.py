"""Every command's help: quick, and with examples that parse."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from crepe_deploy.cli import add_outer_commands, cli

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
