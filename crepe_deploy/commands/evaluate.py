"""The command `eval`, and the lines that it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from crepe_deploy.option_groups import Grouped

from . import completion
from .options import (
    SEED,
    Count,
    device_option,
    dtype_option,
    json_option,
    model_argument,
    prepare_libraries,
    print_result,
    say,
    text_field_option,
)

EXAMPLES = """\b
Examples:
  crepe-deploy eval out/dense --text wiki.test.txt
  crepe-deploy eval out/packed --text wiki.test.txt --window 1024 --against models/llama
  crepe-deploy eval out/dense --tasks arc_easy,hellaswag --limit 200 --json
  crepe-deploy eval out/packed --text wiki.test.txt --against models/llama --update-card
"""


@click.command("eval", cls=Grouped, epilog=EXAMPLES)
@model_argument
@click.option(
    "--text",
    default=None,
    shell_complete=completion.files,
    help="Evaluation text: .txt, .jsonl, .parquet or a datasets name.",
)
@text_field_option
@click.option("--window", type=Count(2), default=2048, show_default=True, help="Tokens in each window.")
@click.option("--stride", type=Count(1), default=None, help="Default: the window, without overlap.")
@click.option("--max-tokens", type=Count(2), default=None, help="Score only the first tokens.")
@click.option("--bos", default="auto", show_default=True, help="auto, none, start or window.")
@dtype_option
@device_option
@click.option("--against", default=None, shell_complete=completion.files, help="The dense model, for paired KL.")
@click.option("--tasks", default=None, help="Comma-separated zero-shot tasks, through lm-eval.")
@click.option("--task-dir", type=click.Path(path_type=Path), default=None, help="Local task files, for offline use.")
@click.option("--limit", type=Count(1), default=None, help="Documents of each task.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--update-card", is_flag=True, help="Write what was measured into the model card of the folder MODEL.")
@json_option
def eval_command(model: str, as_json: bool, **options: Any) -> None:
    """Measure MODEL: perplexity, KL to a dense model, zero-shot accuracy; each with its convention."""
    prepare_libraries()
    from crepe_deploy.api.evaluate import evaluate
    from crepe_deploy.progress import progress

    with progress(f"evaluating {model}", waits=True) as step:
        result = evaluate(model, progress=step, say=say, **options).to_dict()
    print_result(result, as_json, lines(result))


def lines(result: dict[str, Any]) -> list[str]:
    """What `eval` measured."""
    from crepe_deploy.quality.scoring import better

    text = ["in brackets: 95 % intervals"] if "perplexity" in result else []
    if "perplexity" in result:
        convention = ", ".join(f"{name}={value}" for name, value in result["convention"].items() if name != "sha256")
        text += [f"perplexity (lower is better) {_interval(result['perplexity'])}", f"convention: {convention}"]
    if paired := result.get("paired"):
        reference = _interval(paired["reference_perplexity"])
        text.append(f"against {paired['reference']} (perplexity {reference}, lower is better):")
        names = {
            "perplexity_ratio": "perplexity ratio (lower is better)",
            "kl_mean": "mean KL (lower is better)",
            "kl_p99": "p99 KL (lower is better)",
            "same_top": "same top token (higher is better)",
        }
        text += [f"  {label} {_interval(paired[name])}" for name, label in names.items()]
    for name, task in result.get("tasks", {}).items():
        ways = ", ".join(f"{metric}: {better(metric)} is better" for metric in task["metrics"])
        text.append(f"{name} ({ways}): {json.dumps(task)}")
    return text


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"
