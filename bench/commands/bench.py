"""The command `bench`, defined without heavy imports so that `--help` stays quick."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ...commands.options import Count, resumable_folder, resume_option, say
from ...errors import ConfigError, CrepeError
from ...option_groups import Argument, Grouped, SummedGroup
from .init_ci import init_ci_command

if TYPE_CHECKING:
    from ..gate.budgets import Budgets
    from ..run.scenario import Scenario

NAME: Final = "bench"  # of a scenario of models
DEFAULT_POINTS: Final = "1x64+32,4x64+32,1x512+1*2"
EXAMPLES: Final = """\b
Examples:
  crepe-deploy bench models/llama out/packed
  crepe-deploy bench models/llama out/packed --rounds 12 --aa --out run.json
  crepe-deploy bench run models/llama out/packed --text wiki.test.txt --engine transformers
  crepe-deploy bench scenario.yaml --gate budgets.yaml --max-rounds 20
"""


class _RunByDefault(SummedGroup):
    """A group whose first argument is a command, or else belongs to `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` before anything that is no command's name."""
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group("bench", cls=_RunByDefault, invoke_without_command=False, epilog=EXAMPLES)
def bench_command() -> None:
    """Measure checkpoints side by side: latency, throughput, memory and quality, in one run."""


bench_command.add_command(init_ci_command)


@bench_command.command("run", cls=Grouped, epilog=EXAMPLES)
@click.argument(
    "targets", cls=Argument, nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CONFIG | MODEL...",
    help="A scenario, a YAML file as docs/bench.md has it; or models: folders, hub ids, GGUF files.",
)  # fmt: skip
@click.option("--baseline", default=None, help="The dense folder; with CONFIG, a candidate's name. Default: the first.")
@click.option("--engine", default=None, help="vllm or transformers, for candidates that name none.")
@click.option(
    "--points",
    default=None,
    metavar="LIST",
    help=f"BATCHxPROMPT+OUTPUT[*REQUESTS] or, served, CONCURRENCY@PROMPT+OUTPUT*REQUESTS; for folders "
    f"{DEFAULT_POINTS}.",
)
@click.option("--rounds", type=Count(1), default=None, help="Rounds, two visits each; for folders 7.")
@click.option("--threads", type=Count(1), default=None, help="Of each candidate. Default: one a core.")
@click.option("--aa", is_flag=True, help="Measure the baseline twice, for the machine's noise floor.")
@click.option("--text", type=click.Path(path_type=Path), default=None, help="Also measure quality on this text.")
@click.option("--window", type=Count(2), default=512, show_default=True, help="Tokens in each window of --text.")
@click.option("--max-tokens", type=Count(2), default=None, help="Score only the first tokens of --text.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="The run. Default: NAME.json, here.")
@resume_option
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
@click.option(
    "--gate",
    "budgets",
    type=click.Path(path_type=Path),
    default=None,
    help="Judge the candidates by these budgets, against the baseline.",
)
@click.option("--max-rounds", type=Count(1), default=None, help="With --gate: add rounds while undecided.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the run, or with --gate the verdict, as one JSON document on stdout."
)
@click.pass_obj
def run_command(
    typed: str, /, targets: tuple[Path, ...], out: Path | None, resume: bool, overwrite: bool, budgets: Path | None,
    max_rounds: int | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure the scenario CONFIG, or MODEL..., each a folder, a hub id or a GGUF file, and write the run as JSON.

    Every candidate runs in a process of its own; they take turns, so that noise meets all of them alike. Exit code 75
    means stopped: the same command with --resume goes on. A GitHub workflow is written by `crepe-deploy bench init-ci`.
    """
    from ...store.files import check_output_file
    from ...store.folders import held
    from ..benchmark import Gating, bench
    from ..gate import render
    from ..gate.gates import raise_for
    from ..run.summary import failures, summary_lines

    limits = _limits(budgets, max_rounds)
    if out is not None or not _is_file(targets):
        check_output_file(out if out is not None else Path(f"{NAME}.json"), overwrite=overwrite)  # before models come
    scenario = build_scenario(targets, **options)
    path = check_output_file(out if out is not None else Path(f"{scenario.name}.json"), overwrite=overwrite)
    gating = None if limits is None else Gating(limits, max_rounds or scenario.rounds)
    named = options["engine"] is not None or _is_file(targets)
    for line in [*([] if named else [f"engine: {scenario.engine} (--engine chooses)"]), *choices(scenario)]:
        say(line)
    with held(path), resumable_folder(path):
        run, verdict = bench(scenario, typed, gating=gating, out=path, resume=resume, overwrite=overwrite)
    if not as_json:
        click.echo("\n".join([*summary_lines(run), f"written: {path}"]))
    elif verdict is None:
        click.echo(run.model_dump_json(indent=2))
    if verdict is not None:
        render.show(verdict, as_json)
        raise_for(verdict, printed=as_json)
    failed = failures(run)
    if failed:
        error = CrepeError(f"{len(failed)} requests failed and were left out; the first: {failed[0]}")
        error.printed = as_json
        raise error


def choices(scenario: Scenario) -> list[str]:
    """What is measured how where the user may not have said so, and what will make the figures noisy."""
    from ..run.environment import load_average

    cores, threads, load = len(os.sched_getaffinity(0)), scenario.thread_count(), load_average()
    points = ", ".join(point.point().name for point in scenario.points)
    chosen = "" if scenario.threads else ", one a core (--threads chooses)"
    lines = [f"points {points}; {scenario.rounds} rounds; threads {threads}{chosen}"]
    if threads > cores:
        lines.append(f"{threads} threads are more than the {cores} cores: they wait for each other")
    if load > cores:
        lines.append(f"the load is {load:.1f} on {cores} cores: other work is running, and times will be noisy")
    return lines


def _limits(budgets: Path | None, max_rounds: int | None) -> Budgets | None:
    from ..gate.budgets import load_budgets

    if budgets is not None:
        return load_budgets(budgets)
    if max_rounds is not None:
        raise ConfigError("--max-rounds adds rounds while a gate cannot decide: give --gate BUDGETS too")
    return None


def build_scenario(
    targets: Sequence[Path], *, baseline: str | None, engine: str | None, points: str | None, rounds: int | None,
    threads: int | None, aa: bool, text: Path | None, window: int, max_tokens: int | None,
) -> Scenario:  # fmt: skip
    """The scenario of a file or of folders, with what the options say instead. Raises ConfigError."""
    from ..run.scenario import load_scenario, parse, parse_points

    content: dict[str, Any]
    parsed = parse_points(points) if points is not None else None
    if text is not None and not text.is_file():
        raise ConfigError(f"--text {text} is no file")
    if _is_file(targets):
        source = str(targets[0])
        content = load_scenario(targets[0]).model_dump(exclude_none=True)
    else:
        source = NAME
        content = _of_folders(targets, baseline, engine)
        baseline = None
    given = {
        "baseline": baseline,
        "engine": engine,
        "points": parsed,
        "rounds": rounds,
        "threads": threads,
        "aa": aa or None,
        "quality": {"text": text, "window": window, "max_tokens": max_tokens} if text is not None else None,
    }
    return parse(content | {key: value for key, value in given.items() if value is not None}, source)


def _is_file(targets: Sequence[Path]) -> bool:
    """Whether this is one scenario file, and not models."""
    from ...store.sources import is_model_name

    return len(targets) == 1 and not targets[0].is_dir() and not is_model_name(str(targets[0]))


def _of_folders(targets: Sequence[Path], baseline: str | None, engine: str | None) -> dict[str, Any]:
    import importlib.util

    from ...store.sources import is_model_name, resolve_model
    from ..run.measure import require_engine
    from ..run.scenario import parse_points

    folders = [*([Path(baseline)] if baseline is not None else []), *targets]
    for folder in folders:
        if not folder.is_dir() and not is_model_name(str(folder)):
            raise ConfigError(f"{folder} is no folder, hub id or GGUF file: give one scenario file, or models")
    first = folders[0].resolve()
    folders = [folders[0], *(folder for folder in folders[1:] if baseline is None or folder.resolve() != first)]
    names = short_names(folders)
    if engine is None:
        engine = "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"
    for name in names:
        require_engine(name, engine, {})
    return {
        "name": NAME,
        "engine": engine,
        "candidates": [
            {"name": name, "folder": resolve_model(str(folder), say=say).folder}
            for name, folder in zip(names, folders, strict=True)
        ],
        "points": parse_points(DEFAULT_POINTS),
    }


def short_names(folders: Sequence[Path]) -> list[str]:
    """For each folder as many of its last parts as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"a folder is given twice: {', '.join(map(str, folders))}")
