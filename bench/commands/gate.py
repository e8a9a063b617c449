"""The command `gate`, defined without heavy imports so that `--help` stays quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ...commands.options import Finite
from ...errors import ConfigError
from ...option_groups import Argument, Grouped

if TYPE_CHECKING:
    from ..gate.budgets import Budgets
    from ..gate.verdict import Verdict

_PATH = click.Path(path_type=Path)
EXAMPLES: Final = """\b
Examples:
  crepe-deploy gate base.json new.json --budgets budgets.yaml
  crepe-deploy gate run.json --pruned packed --budgets budgets.yaml --markdown comment.md
  crepe-deploy gate base.json new.json --max-slowdown 0.05 --host-mismatch ratios
  crepe-deploy gate run.json --calibrate dense-again
  crepe-deploy gate run.json --suggest-budgets
"""


@click.command("gate", cls=Grouped, epilog=EXAMPLES)
@click.argument("baseline", cls=Argument, type=_PATH, help="The run to compare with, or with --pruned the only one.")
@click.argument("candidate", cls=Argument, type=_PATH, required=False, help="The run that is judged.")
@click.option(
    "--budgets",
    type=_PATH,
    default=None,
    help="YAML or JSON: how much worse is allowed; --suggest-budgets prints some.",
)
@click.option("--max-slowdown", type=Finite(), default=None, metavar="FRACTION", help="One budget for all latencies.")
@click.option("--pruned", multiple=True, metavar="NAME", help="Within one run: gate this candidate against dense.")
@click.option("--candidate", "names", multiple=True, metavar="NAME", help="Of two runs: gate only this candidate.")
@click.option(
    "--host-mismatch",
    type=click.Choice(["refuse", "ratios"]),
    default="refuse",
    show_default=True,
    help="Two machines: INVALID, or compare only ratios within each run.",
)
@click.option(
    "--below-noise",
    type=click.Choice(["invalid", "warn"]),
    default="invalid",
    show_default=True,
    help="A budget below the noise: INVALID, or held to what can be told, INCONCLUSIVE where that is kept.",
)
@click.option(
    "--calibrate",
    default=None,
    metavar="NAME",
    help="Store with the run what its baseline and NAME, the same model again, differ by.",
)
@click.option(
    "--suggest-budgets",
    is_flag=True,
    help="Print budgets from the noise of the run BASELINE, with --pruned NAME for NAME against dense.",
)
@click.option("--junit", type=_PATH, default=None, help="Write JUnit XML here.")
@click.option("--markdown", type=_PATH, default=None, help="Write a comment for a pull request here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
def gate_command(
    baseline: Path, candidate: Path | None, calibrate: str | None, suggest_budgets: bool, junit: Path | None,
    markdown: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Judge measurements against budgets: CANDIDATE against BASELINE, or the --pruned of one run against its dense.

    Files are those of `crepe-deploy bench`, or pytest-benchmark's JSON, or folders of that, one file a round.
    Exit codes: 0 PASS, 3 FAIL, 4 INCONCLUSIVE, 1 INVALID, 2 unusable input.
    """
    if calibrate is not None:
        _calibrate(baseline, candidate, calibrate, as_json, options | {"suggest_budgets": suggest_budgets})
        return
    if suggest_budgets:
        _suggest(baseline, candidate, as_json, options | {"junit": junit, "markdown": markdown})
        return
    from ...store.files import check_output_file
    from ..gate import render
    from ..gate.gates import raise_for

    for path in filter(None, (junit, markdown)):
        check_output_file(path, overwrite=True)
    verdict = _judge(baseline, candidate, **options)
    render.write(verdict, junit, markdown)
    render.show(verdict, as_json)
    raise_for(verdict, printed=as_json)


def _judge(
    baseline: Path, candidate: Path | None, *, budgets: Path | None, max_slowdown: float | None,
    pruned: tuple[str, ...], names: tuple[str, ...], host_mismatch: Any, below_noise: Any,
) -> Verdict:  # fmt: skip
    from ..gate.gates import Options, gate_files, gate_pruned
    from ..run.result import load_run

    limits = _limits(budgets, max_slowdown)
    if candidate is None:
        if not pruned:
            raise ConfigError("give CANDIDATE to compare two files, or --pruned NAME to compare within one run")
        if names or host_mismatch != "refuse":
            raise ConfigError("--candidate and --host-mismatch are for two files")
        return gate_pruned(load_run(baseline), pruned, limits, below_noise=below_noise)
    if pruned:
        raise ConfigError("--pruned compares within one run; leave CANDIDATE out, or choose with --candidate")
    return gate_files(baseline, candidate, limits, Options(names, host_mismatch, below_noise))


def _limits(budgets: Path | None, max_slowdown: float | None) -> Budgets | float:
    from ..gate.budgets import load_budgets

    if budgets is not None and max_slowdown is None:
        return load_budgets(budgets)
    if max_slowdown is not None and budgets is None:
        return max_slowdown
    raise ConfigError("give either --budgets FILE or --max-slowdown FRACTION")


def _calibrate(run: Path, candidate: Path | None, name: str, as_json: bool, options: dict[str, Any]) -> None:
    from ..gate.gates import calibrate
    from ..run.statistics import detectable

    _judges_nothing("--calibrate", candidate, options, ("budgets", "pruned", "max_slowdown", "suggest_budgets"))
    noise = calibrate(run, name)
    if as_json:
        click.echo(json.dumps({"run": str(run), "noise": noise}, indent=2))
        return
    click.echo(f"{run}: noise of {len(noise)} figures stored")
    for place, width in noise.items():
        click.echo(f"  {place}: ±{width:.2%}; budgets from {detectable(width):.1%}")


def _suggest(run: Path, candidate: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    from ..gate.suggest import suggest
    from ..run.result import load_run

    _judges_nothing("--suggest-budgets", candidate, options, ("budgets", "max_slowdown", "names", "junit", "markdown"))
    if len(options["pruned"]) > 1:
        raise ConfigError("--suggest-budgets takes --pruned once: each candidate has limits of its own")
    found = suggest(load_run(run), str(run), *options["pruned"])
    if as_json:
        document = {"run": str(run), "gate": found.gate, "budgets": found.content, "warnings": found.warnings}
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo(found.text, nl=False)


def _judges_nothing(option: str, candidate: Path | None, options: dict[str, Any], others: tuple[str, ...]) -> None:
    """Refuse what only a verdict could use. Raises ConfigError."""
    given = [
        "--candidate" if name == "names" else f"--{name.replace('_', '-')}"
        for name in others
        if options[name] not in (None, (), False)
    ]
    if candidate is not None or given:
        text = "CANDIDATE" if candidate is not None else ", ".join(given)
        raise ConfigError(f"{option} takes one run and judges nothing: leave {text} out")
