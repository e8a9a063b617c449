"""The command `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crepe_deploy.option_groups import Grouped

from .options import (
    base_model_option,
    prepare_libraries,
    print_result,
    prune_options,
    resumable_folder,
    say,
    values,
)

EXAMPLES = """\b
Examples:
  crepe-deploy prune models/llama --out pruned
  crepe-deploy prune models/llama --calib wiki.txt --out pruned
  crepe-deploy prune models/llama --method wanda --sparsity 0.5 --calib wiki.txt --out pruned
  crepe-deploy prune models/llama --method magnitude --sparsity 4:8 --exclude lm_head --out pruned
  crepe-deploy prune models/llama --reconstruct exact --feed both --calib allenai/c4:en:train --out pruned
  crepe-deploy prune models/llama --sparsity 16:32 --recipe best --values int4 --calib wiki.txt --out pruned
  crepe-deploy prune models/llama --calib wiki.txt --out pruned --resume
"""


@click.command("prune", cls=Grouped, epilog=EXAMPLES)
@prune_options
@base_model_option
def prune_command(out: Path, as_json: bool, **options: Any) -> None:
    """Prune MODEL into the Hugging Face folder OUT, with its manifest.

    What is left out is chosen for the machine, and said. Exit code 75 means stopped: the same command with --resume
    goes on.
    """
    prepare_libraries()
    from crepe_deploy.api.prune import prune
    from crepe_deploy.progress import progress

    with resumable_folder(out), progress(f"pruning {options['model']}", waits=True) as step:
        manifest = prune(out=out, progress=step, say=say, **values(options))
    asked = {name: manifest.config[name] for name in ("pattern", "method")}
    step_taken = manifest.config.get("values")
    coded = f", those among {step_taken} values counted" if step_taken else ""
    text = [f"{out}: {manifest.metrics['sparsity_of_pruned_tensors']:.2%} zeros{coded}, verified"]
    chosen = {"chosen": manifest.config["chosen"]} if "chosen" in manifest.config else {}
    print_result(
        {"out": str(out), **asked, **chosen, **manifest.metrics}, as_json, text + manifest.metrics.get("limits", [])
    )
