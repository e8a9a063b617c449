"""Quality of structural pruning: methods and ablations x sparsities x seeds, and how fast candidates are judged.

    python -m crepe_deploy.bench.studies.structural [--sparsities 0.125,0.25,0.375,0.5] [--rows REGEX] [--seeds 0,1,2]
        [--markdown docs/structural.md]

A cell is one `crepe-deploy tyr` run in this process and its perplexity and KL to the dense model. Cells that the
results file holds under the same conditions are not run again, and a cell that was stopped goes on from its working
folder, so a stopped grid goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ...exporting.tyr import FolderWriter
from ...progress import progress
from ...quality.perplexity import evaluate
from ...store.sources import resolve_model
from ...store.work import JOURNAL, work_folder
from ...structural.config import TyrConfig
from ...structural.tyr import tyr
from ...texts import CalibrationSet, calibration_windows, load_tokenizer
from ..assets import ensure_assets
from ..run.environment import load_average, record_environment
from .frame import assets_option, out_option, publish, say
from .grid import Cell, ResultsFile, cells_of, text_record
from .structural_table import markdown
from .structural_throughput import throughput

ROWS: dict[str, dict[str, Any]] = {
    "Tyr": {},
    "uniform": {"method": "uniform"},
    "uniform, best split": {"method": "uniform", "attention_share": "best"},
    "FLAP-style": {"method": "flap"},
    "FLAP-style, refit": {"method": "flap", "refit": True},
    "magnitude": {"method": "magnitude"},
    "random": {"method": "random"},
    "Tyr, --widths uniform": {"widths": "uniform"},
    "uniform, --widths uniform": {"method": "uniform", "widths": "uniform"},
    "Tyr, --attention groups": {"attention": "groups"},
    "uniform, --attention groups": {"method": "uniform", "attention": "groups"},
    "uniform, --no-refit": {"method": "uniform", "refit": False},
    "uniform, --variant paper": {"method": "uniform", "variant": "paper"},
    "uniform, --variant code": {"method": "uniform", "variant": "code"},
    "uniform, --finish paired": {"method": "uniform", "finish": "paired"},
    "Tyr, --accumulation none": {"accumulation": "none"},
    "Tyr, --accumulation single": {"accumulation": "single"},
    "Tyr, --accumulation uniform": {"accumulation": "uniform"},
    "Tyr, --finish supernet": {"finish": "supernet"},
    "Tyr, --finish supernet --accumulation none": {"finish": "supernet", "accumulation": "none"},
    "Tyr, --iterations 2": {"iterations": 2},
    "Tyr, --attention-share target": {"attention_share": "target"},
}


class Grid:
    """A results file and what is needed to fill it. Raises ConfigError where the file is from other conditions."""

    def __init__(
        self, out: Path, work: Path, model: Path, calib: Path, text: Path, sizes: dict[str, int], command: str
    ) -> None:
        self.work, self.model, self.calib, self.text, self.sizes = work, model, calib, text, sizes
        conditions = {
            "model": model.name,
            "calibration": text_record(calib),
            "evaluation": text_record(text),
            **sizes,
        }
        environment = record_environment(torch.get_num_threads(), load_average(), {}).model_dump(mode="json")
        self.file = ResultsFile(out, conditions, command, environment=environment)
        self.file.once("dense", lambda: self.quality(model))

    def quality(self, folder: Path) -> dict[str, Any]:
        """Perplexity and KL to the dense model on the evaluation text."""
        report = evaluate(
            folder, self.text, window=self.sizes["window"], max_tokens=self.sizes["max_tokens"],
            against=None if folder == self.model else self.model,
        )  # fmt: skip
        figures: dict[str, Any] = {"perplexity": vars(report.perplexity)}
        if report.paired is not None:
            figures["kl"] = vars(report.paired.kl_mean)
            figures["perplexity_ratio"] = vars(report.paired.perplexity_ratio)
        return figures

    def config(self, label: str, sparsity: float, seed: int) -> TyrConfig:
        """The options of one cell. The best split is not looked for again where the row `Tyr` found it."""
        sizes = {name: self.sizes[name] for name in ("iterations", "generations", "offspring", "multiple")}
        options = {**sizes, "search_samples": self.sizes.get("search_samples", 0), **ROWS[label]}
        known = self.file.find("Tyr", sparsity, seed)
        if known is not None and known.get("split") and options.get("attention_share") == "best":
            options["attention_share"] = known["split"]["best"]["attention_share"]
        return TyrConfig(**options, sparsity=sparsity, seed=seed)

    def tokens(self, seed: int) -> CalibrationSet:
        """The windows that pruning is calibrated on, and behind them those of the search alone."""
        samples = self.sizes["samples"] + self.sizes.get("search_samples", 0)
        return calibration_windows(self.calib, load_tokenizer(self.model), samples, self.sizes["length"], seed=seed)

    def measure(self, label: str, sparsity: float, seed: int) -> Cell:
        """Prune and score one cell; one that was stopped goes on from its working folder."""
        config, tokens = self.config(label, sparsity, seed), self.tokens(seed)
        place = self.work / re.sub(r"[^\w.]+", "-", f"{label}|{sparsity}|{seed}")
        started = time.monotonic()
        report = tyr(
            resolve_model(str(self.model)), place, config, tokens, overwrite=True, show=progress, say=say,
            resume=(work_folder(place) / JOURNAL).is_file(), write=FolderWriter(config.widths),
        )  # fmt: skip
        seconds = time.monotonic() - started
        cell = {
            **self.quality(place / "dense"),
            "seconds": round(seconds, 1),
            "phases": report["seconds"],
            "parameters": report["parameters"],
            "layers": report["layers"],
            "split": report.get("split"),
            "search": report.get("search"),
            "config": report["config"],
        }
        shutil.rmtree(place)
        return cell

    def pace(self, sparsity: float) -> dict[str, Any]:
        """Candidates a minute, ours and from scratch."""
        self.work.mkdir(parents=True, exist_ok=True)
        tokens = self.tokens(0).tokens[: self.sizes["samples"]]
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            return throughput(self.model, tokens, self.config("Tyr", sparsity, 0), Path(folder))


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=None, help="Default: SmolLM2-135M.")
@click.option("--calib", type=click.Path(path_type=Path, exists=True), default=None, help="Default: c4 train.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), default=None, help="Default: wiki valid.")
@click.option(
    "--rows",
    default="^(Tyr|uniform|uniform, best split|FLAP-style|magnitude|random)$",
    show_default=True,
    metavar="REGEX",
    help="Measure the rows whose label matches; '' for all.",
)
@click.option("--sparsities", default="0.125,0.25,0.375,0.5", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--samples", type=click.IntRange(1), default=16, show_default=True)
@click.option("--length", type=click.IntRange(2), default=512, show_default=True)
@click.option(
    "--search-samples",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Further windows that only searches see; 0: they see those that pruning is calibrated on.",
)
@click.option("--iterations", type=click.IntRange(1), default=1, show_default=True)
@click.option("--generations", type=click.IntRange(1), default=6, show_default=True)
@click.option("--offspring", type=click.IntRange(1), default=16, show_default=True)
@click.option("--ffn-multiple", "multiple", type=click.IntRange(1), default=128, show_default=True)
@click.option("--window", type=click.IntRange(2), default=512, show_default=True)
@click.option("--max-tokens", type=click.IntRange(2), default=8192, show_default=True)
@click.option("--throughput/--no-throughput", "pace", default=True, show_default=True)
@out_option("bench/results/structural.json")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("out/bench/tyr"),
    show_default=True,
    help="Where cells are made, and go on from when they were stopped.",
)
@click.option("--markdown", "markdown_path", type=click.Path(path_type=Path), default=None)
@assets_option
def main(
    model: Path | None, calib: Path | None, text: Path | None, rows: str, sparsities: str, seeds: str, pace: bool,
    out: Path, work: Path, markdown_path: Path | None, assets_dir: Path, **sizes: int,
) -> None:  # fmt: skip
    """Measure the cells that are missing, then print the tables of all that are there."""
    if model is None or calib is None or text is None:
        assets = ensure_assets(assets_dir)
        model, calib = model or assets.model, calib or assets.text("c4", "train")
        text = text or assets.text("wiki", "valid")
    command = (
        f"python -m crepe_deploy.bench.studies.structural --rows '{rows}' --sparsities {sparsities} --seeds {seeds}"
    )
    command += "".join(f" --{name.replace('_', '-')} {value}" for name, value in sizes.items() if name != "multiple")
    if not sizes["search_samples"]:
        del sizes["search_samples"]  # results files from before the option have no such condition
    grid = Grid(out, work, model, calib, text, sizes, f"{command} --ffn-multiple {sizes['multiple']}")
    if pace:
        grid.file.once("throughput", lambda: grid.pace(0.5))
    for label, at, seed in cells_of(ROWS, rows, sparsities, seeds):
        sparsity = float(at)
        cell, state = grid.file.cell(label, sparsity, seed, partial(grid.measure, label, sparsity, seed))
        figures = {"perplexity": cell["perplexity"]["value"], "kl": cell["kl"]["value"]}
        say(f"{label} at {at}, seed {seed}: {json.dumps(figures)}, {state}")
    publish(markdown(grid.file.content), markdown_path)


if __name__ == "__main__":
    main()
