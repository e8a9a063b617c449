"""What healing gives for its minutes: perplexity against time, for masks and for narrowed models, several seeds.

    python -m crepe_deploy.bench.studies.heal [--starts REGEX] [--minutes 0,5,10,20,30] [--seeds 0,1,2]
        [--markdown FILE]

A cell is one `crepe-deploy heal` run of so many minutes, from a model pruned with the same seed, and its perplexity on
the test texts; 0 minutes is the pruned model. Each budget is a run of its own, for the learning rate falls with it.
Minutes are of this machine: run it idle. What the results file and `--folder` hold under the same conditions is not
made again, so a stopped study goes on where it stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch

from ...quality.perplexity import evaluate
from ...store.manifest import load_manifest
from ...store.work import JOURNAL, work_folder
from ..assets import MODEL_NAME, Assets, ensure_assets
from ..run.environment import load_average, record_environment
from ..run.processes import crepe_deploy
from .frame import assets_option, folder_option, out_option, publish, say
from .grid import Cell, ResultsFile, cells_of, text_record

BEST: Final = ("prune", "--recipe", "best", "--calib-samples", "64", "--calib-length", "512")
TYR: Final = ("tyr", "--iterations", "1", "--generations", "6", "--search-samples", "8", "--calib-length", "512")
STARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "16:32": (*BEST, "--sparsity", "16:32"),
    "2:4": (*BEST, "--sparsity", "2:4"),
    "4:8": (*BEST, "--sparsity", "4:8"),
    "50 %": (*BEST, "--sparsity", "0.5"),
    "60 %": (*BEST, "--sparsity", "0.6"),
    "tyr 25 %": (*TYR, "--sparsity", "0.25"),
    "tyr 50 %": (*TYR, "--sparsity", "0.5"),
}
TEXTS: Final = ("wiki", "c4")


class Study:
    """Where models are made and measured. sizes: of what is scored."""

    def __init__(self, assets: Assets, folder: Path, sizes: dict[str, int]) -> None:
        self.assets, self.folder, self.sizes = assets, folder, sizes

    def conditions(self) -> dict[str, Any]:
        """What cells have in common."""
        return {
            "model": MODEL_NAME,
            "trained_on": [text_record(self.assets.text(name, "train")) for name in TEXTS],
            "scored_on": [text_record(self.assets.text(name)) for name in TEXTS],
            "starts": {name: " ".join(command) for name, command in STARTS.items()},
            **self.sizes,
        }

    def scores(self, folder: Path) -> dict[str, Any]:
        """Perplexity on each text, by its name."""
        found = {}
        for name in TEXTS:
            report = evaluate(
                folder, self.assets.text(name), window=self.sizes["window"], max_tokens=self.sizes["max_tokens"]
            )
            found[name] = vars(report.perplexity)
        return found

    def texts(self, option: str) -> list[str]:
        """The training texts as arguments."""
        return [part for name in TEXTS for part in (option, str(self.assets.text(name, "train")))]

    def pruned(self, start: str, seed: int) -> Path:
        """The pruned model of a start, made where it is missing."""
        place = self.folder / f"{''.join(one if one.isalnum() else '-' for one in start)}-{seed}"
        if not place.is_dir():
            command, *options = STARTS[start]
            crepe_deploy(
                command, str(self.assets.model), *options, *self.texts("--calib"), "--seed", str(seed),
                "--out", str(place),
            )  # fmt: skip
        return place / "dense" if STARTS[start][0] == "tyr" else place

    def measure(self, start: str, minutes: float, seed: int) -> Cell:
        """Heal and score one cell; a run that was stopped goes on."""
        pruned = self.pruned(start, seed)
        began = time.monotonic()
        if not minutes:
            return {"perplexity": self.scores(pruned), "seconds": round(time.monotonic() - began, 1)}
        out = self.folder / "healed"
        crepe_deploy(
            "heal", str(pruned), "--dense", str(self.assets.model), *self.texts("--text"), "--minutes", str(minutes),
            "--seed", str(seed), "--out", str(out), *self._go_on(out),
        )  # fmt: skip
        healed = load_manifest(out).config["healed"]
        kept = {name: healed[name] for name in ("steps", "steps_taken", "tokens", "seconds", "held_out_kl")}
        cell = {"perplexity": self.scores(out), "healed": kept, "seconds": round(time.monotonic() - began, 1)}
        shutil.rmtree(out)
        return {**cell, "load_average": load_average()}

    def _go_on(self, out: Path) -> list[str]:
        return ["--resume"] if (work_folder(out) / JOURNAL).is_file() else []


def markdown(result: Mapping[str, Any]) -> str:
    """A row for each start, a column for each budget: perplexity on each text, and over the dense model's."""
    conditions, dense = result["conditions"], {name: one["value"] for name, one in result["dense"].items()}
    cells: dict[tuple[str, float], list[Cell]] = {}
    for key, cell in result["cells"].items():
        start, minutes, _ = key.rsplit("|", 2)
        cells.setdefault((start, float(minutes)), []).append(cell)
    budgets = sorted({minutes for _, minutes in cells})
    lines = ["# Healing", "", *(f"    {command}" for command in result["commands"]), ""]
    lines += [
        f"{conditions['model']}. Geometric means over the seeds measured; over the dense model's in parentheses; the "
        f"first {conditions['max_tokens']} tokens of each test text in windows of {conditions['window']}. Minutes on "
        f"{result['environment']['threads']} threads."
    ]  # fmt: skip
    for text in TEXTS:
        lines += ["", f"## {text} (dense {dense[text]:.2f})", ""]
        lines += [
            "| perplexity (lower is better) after minutes | "
            + " | ".join(f"{minutes:g}" for minutes in budgets)
            + " |",
            "|---" * (len(budgets) + 1) + "|",
        ]
        for start in dict.fromkeys(start for start, _ in cells):
            figures = [_figure(cells.get((start, minutes), []), text, dense[text]) for minutes in budgets]
            lines.append(f"| {start} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def _figure(cells: list[Cell], text: str, dense: float) -> str:
    if not cells:
        return ""
    value = float(np.exp(np.mean([np.log(cell["perplexity"][text]["value"]) for cell in cells])))
    return f"{value:.2f} ({value / dense:.2f})"


@click.command()
@click.option("--starts", default="^(16:32|2:4|tyr 25 %|tyr 50 %)$", show_default=True, metavar="REGEX")
@click.option("--minutes", default="0,5,10,20,30", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--window", type=click.IntRange(2), default=512, show_default=True)
@click.option("--max-tokens", type=click.IntRange(2), default=6144, show_default=True)
@folder_option("out/bench/heal")
@out_option("bench/results/heal.json")
@click.option("--markdown", "markdown_path", type=click.Path(path_type=Path), default=None)
@assets_option
def main(
    starts: str, minutes: str, seeds: str, folder: Path, out: Path, markdown_path: Path | None, assets_dir: Path,
    **sizes: int,
) -> None:  # fmt: skip
    """Measure the cells that are missing, then print the tables of all that are there."""
    study = Study(ensure_assets(assets_dir), folder, sizes)
    environment = record_environment(torch.get_num_threads(), load_average(), {}).model_dump(mode="json")
    command = f"python -m crepe_deploy.bench.studies.heal --starts '{starts}' --minutes {minutes} --seeds {seeds}"
    file = ResultsFile(out, study.conditions(), command, environment=environment)
    file.once("dense", lambda: study.scores(study.assets.model))
    for start, at, seed in cells_of(STARTS, starts, minutes, seeds):
        cell, state = file.cell(start, at, seed, partial(study.measure, start, float(at), seed))
        figures = ", ".join(f"{name} {one['value']:.2f}" for name, one in cell["perplexity"].items())
        say(f"{start}, {at} minutes, seed {seed}: {figures}, {state}")
    publish(markdown(file.content), markdown_path)


if __name__ == "__main__":
    main()
