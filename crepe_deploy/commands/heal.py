"""The command `heal`, and the lines that it prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from crepe_deploy.option_groups import Argument, Grouped

from .options import (
    Count,
    Number,
    device_option,
    healed_line,
    json_option,
    options,
    overwrite_option,
    prepare_libraries,
    print_result,
    resumable_folder,
    resume_option,
    revision_option,
    say,
    seed_option,
    text_field_option,
)

EXAMPLES = """\b
Examples:
  crepe-deploy heal pruned --dense models/llama --text wiki.txt --text c4.txt --out healed
  crepe-deploy heal pruned --dense models/llama --text wiki.txt --minutes 30 --out healed
  crepe-deploy heal pruned --dense models/llama --text wiki.txt --lora 16 --checkpointing --out healed
  crepe-deploy heal pruned --dense models/llama --text wiki.txt --out healed --resume
"""

heal_options = options(
    click.argument("folder", cls=Argument, type=click.Path(path_type=Path),
                   help="What prune, tyr or export --format dense wrote."),
    click.option("--dense", required=True, metavar="MODEL", help="The model that FOLDER was pruned from."),
    click.option("--text", multiple=True, required=True, metavar="FILE_OR_DATASET",
                 help="To train on: .txt, .jsonl, .parquet or a datasets name; never a test split. Give several."),
    text_field_option,
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Output folder; must not exist."),
    click.option("--steps", type=Count(1), default=None, help="Budget; 200 where --minutes is not given either."),
    click.option("--minutes", type=Number(0, min_open=True), default=None, help="Budget in place of steps."),
    click.option("--learning-rate", type=Number(0, min_open=True), default=2e-4, show_default=True,
                 help="Highest one, of AdamW: it rises over the first 5 % of the budget and falls to 0."),
    click.option("--batch-tokens", type=Count(2), default=2048, show_default=True, help="In a step."),
    click.option("--window", type=Count(2), default=512, show_default=True, help="Tokens in each sequence."),
    click.option("--accumulate", type=Count(1), default=1, show_default=True,
                 help="Parts that a step is computed in, one after the other: less memory."),
    click.option("--checkpointing", is_flag=True, help="Compute activations twice: less memory, more time."),
    click.option("--top-k", type=Count(1), default=None,
                 help="Tell only so many of the dense model's likeliest tokens apart. Default: all."),
    click.option("--lora", type=Count(1), default=None, metavar="RANK",
                 help="Train adapters in place of the kept weights: less memory. They are masked, then merged."),
    click.option("--train", default="norms,kept", show_default=True, help="norms, kept (weights of pruned layers)."),
    click.option("--dtype", default="auto", show_default=True,
                 help="To compute in: auto, bfloat16, float32. Updates are kept in float32."),
    device_option,
    click.option("--holdout", type=Number(0, min_open=True), default=0.05, show_default=True,
                 help="Share of each text that decides which step is best."),
    seed_option,
    revision_option,
    resume_option,
    overwrite_option,
    json_option,
)  # fmt: skip


@click.command("heal", cls=Grouped, epilog=EXAMPLES)
@heal_options
def heal_command(out: Path, text: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Train the pruned model in FOLDER towards its dense parent, every zero held: OUT is a folder of the same kind.

    The text is trained on. What is no better than before is never written. Exit code 75 means stopped: the same
    command with --resume goes on. `accelerate launch -m crepe_deploy heal ...` uses several processes or GPUs.
    """
    prepare_libraries()
    from crepe_deploy.api.heal import heal
    from crepe_deploy.progress import progress

    with resumable_folder(out):
        manifest = heal(out=out, text=list(text), show=progress, say=say, **options)
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        healed = manifest.config["healed"]
        print_result({"out": str(out), **healed}, as_json, lines(out, healed))


def lines(out: Path, healed: dict[str, Any]) -> list[str]:
    """What `heal` did, for a reader at a terminal."""
    text = [f"{out}: written and verified, every zero held", healed_line(healed)]
    return [*text, *([f"stopped early: {healed['stopped']}"] if healed["stopped"] else [])]
