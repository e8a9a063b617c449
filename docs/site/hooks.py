"""Hooks of mkdocs: pages made from the code (commands, errors, signatures, the notebook), links that leave `docs/`.

A generated page has one source: click for the commands, the docstrings of `crepe_deploy.errors` for troubleshooting.
"""

from __future__ import annotations

import inspect
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import crepe_deploy
from crepe_deploy import errors
from crepe_deploy.cli import add_outer_commands, cli
from crepe_deploy.project import project_url

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    pages = {
        "commands.md": commands(),
        "troubleshooting.md": troubleshooting(),
        "python.md": signatures(),
        "notebooks/first.md": notebook(ROOT / "docs" / "notebooks" / "first.ipynb"),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


# The address is not the theme's `repo_url`: for that it asks GitHub for stars whenever a page is read.
def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links to files outside `docs/` become links to the repository; a file that is not there ends the build."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def outside(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri} links to {path}, which does not exist")
        return f"]({project_url('Repository')}/blob/main/{path}{match[2] or ''})"

    return re.sub(r"\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)", outside, markdown)


def commands() -> str:
    """Every command's help as click has it."""
    add_outer_commands()
    parts = ["# Commands\n", "Made from the commands themselves: what `crepe-deploy COMMAND --help` prints.\n"]
    with click.Context(cli, info_name="crepe-deploy", terminal_width=82, **cli.context_settings) as parent:
        for name in sorted(cli.commands):
            parts += command(cli.commands[name], name, parent, "##")
    return "\n".join(parts)


def command(item: click.Command, name: str, parent: click.Context, level: str) -> list[str]:
    """One command, and those below it."""
    with click.Context(item, info_name=name.split()[-1], parent=parent) as context:
        parts = [f"{level} {name}\n", "```text", click.unstyle(item.get_help(context)), "```\n"]
        for below in item.list_commands(context) if isinstance(item, click.Group) else ():
            found = item.get_command(context, below)
            if found is not None:
                parts += command(found, f"{name} {below}", context, level + "#")
    return parts


def troubleshooting() -> str:
    """The error tree: each class with its exit code, its cause and its fix, from its docstring."""
    lines = [
        "# Troubleshooting\n",
        "A command that cannot do what it was asked says so in one line, `error: ...`, with the cause and the way out,",
        "and ends with an exit code. What the line says goes before this table. In Python the class is raised.\n",
        "| class | exit code | cause | fix |",
        "|---|---:|---|---|",
    ]
    tree = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.CrepeError)]
    for error in tree:
        cause, _, fix = " ".join((inspect.getdoc(error) or "").split()).partition(" Fix: ")
        if not fix:
            raise PluginError(f"errors.{error.__name__} does not say its fix")
        lines.append(f"| {error.__name__} | {error.exit_code} | {cause} | {fix} |")
    lines += [
        f"\nExit code {errors.EXIT_RESUMABLE}: stopped; the same command with `--resume` goes on.",
        f"Exit code {errors.EXIT_INTERRUPTED}: stopped by Ctrl-C, SIGTERM or SIGHUP; nothing was left to go on from.\n",
        "An unexpected error is a defect: its line names a file with the details, and",
        "`crepe-deploy --debug COMMAND` shows them. Please report it with that file.",
    ]
    return "\n".join(lines)


def signatures() -> str:
    """The public functions and classes, for mkdocstrings to fill in."""
    head = "# Python signatures\n\nExamples of each are in [the Python API](api.md).\n"
    modules = vars(crepe_deploy)["_MODULES"]
    names = [f"crepe_deploy.{modules[name]}.{name}" for name in crepe_deploy.__all__ if name in modules]
    return "\n".join([head, *(f"::: {name}\n" for name in names)])


def notebook(path: Path) -> str:
    """A notebook as a page: its text and its code, which the tests run."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    )
