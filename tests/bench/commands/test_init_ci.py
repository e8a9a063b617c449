"""The workflow that init-ci writes: YAML that GitHub reads, with command lines that crepe-deploy accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from crepe_deploy.bench.commands.init_ci import WORKFLOW, init_ci, init_ci_command, template

from crepe_deploy.cli import add_outer_commands, cli
from crepe_deploy.errors import ConfigError, OutputError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "bench it.yaml").write_text("name: x\n")
    (tmp_path / "budgets.yaml").write_text("memory: {weights: 0.0}\n")
    return tmp_path


def written(repository: Path, **options: Any) -> dict[str, Any]:
    path = init_ci(repository, Path("bench it.yaml"), Path("budgets.yaml"), **options)
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def steps(document: dict[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = document["jobs"]["gate"]["steps"]
    return steps


def command_lines(document: dict[str, Any]) -> list[list[str]]:
    lines = [line.strip() for step in steps(document) for line in step.get("run", "").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("crepe-deploy ")]


def test_github_reads_it(repository: Path) -> None:
    document = written(repository)
    assert set(document) == {"name", True, "permissions", "concurrency", "jobs"}  # YAML 1.1 reads `on` as true
    assert set(document[True]) == {"pull_request"}
    assert document["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert list(document["jobs"]) == ["gate"], "one job, so one machine for base and head"
    for step in steps(document):
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"uses", "run", "name", "id", "with", "env", "if", "working-directory", "continue-on-error"}
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


def test_nothing_a_stranger_writes_reaches_a_shell(repository: Path) -> None:
    for step in steps(written(repository)):
        for expression in re.findall(r"\${{(.*?)}}", step.get("run", "")):
            assert expression.strip() == "github.event.pull_request.base.sha"


def test_every_command_line_parses(repository: Path) -> None:
    add_outer_commands()
    lines = command_lines(written(repository))
    assert [line[0] for line in lines] == ["bench", "bench", "gate", "report"]
    for name, *arguments in lines:
        command = cli.commands[name]
        context = command.make_context(name, list(arguments), resilient_parsing=False)
        if isinstance(command, click.Group):
            sub, _, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert sub is not None and command.commands[sub].make_context(sub, rest)
    assert lines[0][1] == "bench it.yaml"
    assert lines[2][3:] == [
        "--budgets", "budgets.yaml", "--junit", "$RUNNER_TEMP/gate/junit.xml", "--markdown",
        "$RUNNER_TEMP/gate/comment.md",
    ]  # fmt: skip


def test_the_gate_step_keeps_the_exit_code_and_lets_inconclusive_pass(repository: Path, tmp_path: Path) -> None:
    import subprocess

    script = next(step["run"] for step in steps(written(repository)) if step.get("id") == "gate")
    fake = tmp_path / "bin" / "crepe-deploy"
    fake.parent.mkdir()
    for code, wanted in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 0)):
        fake.write_text(f"#!/bin/sh\nexit {code}\n")
        fake.chmod(0o755)
        environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "RUNNER_TEMP": str(tmp_path)}
        assert subprocess.run(["bash", "-e", "-c", script], env=environment, check=False).returncode == wanted


def test_what_can_be_chosen_arrives(repository: Path) -> None:
    document = written(repository, prepare="make model", runner="gpu-box", requirement="./wheel[bench]")
    assert document["jobs"]["gate"]["runs-on"] == "gpu-box"
    runs = "\n".join(step.get("run", "") for step in steps(document))
    assert runs.count("make model") == 2 and "pip install './wheel[bench]'" in runs
    assert "@" not in re.sub(r"uses: \S+", "", (repository / WORKFLOW).read_text()).replace("${{", "")


def test_an_existing_workflow_stays_unless_it_may_be_replaced(repository: Path) -> None:
    written(repository)
    (repository / WORKFLOW).write_text("mine\n")
    with pytest.raises(OutputError, match="--overwrite"):
        written(repository)
    assert (repository / WORKFLOW).read_text() == "mine\n"
    written(repository, overwrite=True)
    assert (repository / WORKFLOW).read_text() != "mine\n"


@pytest.mark.parametrize(
    "options",
    [
        {"prepare": "a\nb"},
        {"prepare": "${{ secrets.X }}"},
        {"runner": "a]\nb"},
        {"runner": "[x"},
        {"requirement": "a\nb"},
    ],
)
def test_texts_that_would_break_the_file_are_refused(repository: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        written(repository, **options)
    assert not (repository / WORKFLOW).exists()


def test_files_must_be_in_the_repository(repository: Path) -> None:
    for scenario in (Path("missing.yaml"), repository / "budgets.yaml", Path("../x.yaml")):
        with pytest.raises(ConfigError, match="no file in"):
            init_ci(repository, scenario, Path("budgets.yaml"))


def test_the_command_line_writes_it(repository: Path) -> None:
    arguments = ["bench it.yaml", "--budgets", "budgets.yaml", "--root", str(repository)]
    init_ci_command.main(arguments, standalone_mode=False)
    assert (repository / WORKFLOW).is_file()


def test_the_template_needs_no_more_than_its_placeholders() -> None:
    names = re.findall(r"@[A-Z]+@", template())
    assert set(names) == {"@RUNNER@", "@REQUIREMENT@", "@SCENARIO@", "@BUDGETS@", "@PREPARE@"}
