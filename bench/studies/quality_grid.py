"""Quality of methods, steps and recipes: rows x patterns x calibration seeds x texts, on any model.

    python -m crepe_deploy.bench.studies.quality_grid [--rows REGEX] [--patterns 2:4,16:32] [--seeds 0,1,2]

A cell is one pruning, scored on every text in windows that are the same for all cells. Cells that the results file
holds already under the same conditions are not run again, so a stopped grid goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from ...documents import load_text
from ...errors import ConfigError, CrepeError
from ...pattern import NM, parse_record
from ...pruning.config import PruneConfig, prune_config
from ...pruning.prune import prune
from ...quality.perplexity import load_model, plan_windows
from ...quality.scoring import token_nll
from ...store.sources import resolve_model
from ...texts import CalibrationSet, calibration_windows, load_tokenizer, tokenize
from ..assets import ensure_assets
from .frame import assets_option, publish, say
from .grid import Cell, ResultsFile, cells_of, text_record, texts_record
from .quality_table import markdown

PRESETS = Path(__file__).parents[1] / "results"
ROWS: dict[str, dict[str, Any]] = {
    "RIA": {"method": "ria"},
    "RIA, a = 1": {"method": "ria", "params": {"exponent": 1.0}},
    "Wanda": {"method": "wanda"},
    "CRePE": {"method": "crepe"},
    "CRePE, PHO's preset": {"method": "crepe", "preset": "pho"},
    "CRePE, PHO's preset without the neighbourhood": {"method": "crepe", "preset": "pho", "params": {"gamma": 0.0}},
    "CRePE, hill climbing's preset": {"method": "crepe", "preset": str(PRESETS / "search-hill-climb.json")},
    "CRePE, narrowed model's preset": {"method": "crepe", "preset": str(PRESETS / "search-pho-narrowed.json")},
    "SparseGPT": {"method": "sparsegpt"},
    "RIA + DSnoT": {"method": "ria", "reprune": "dsnot"},
    "RIA + DSnoT-RIA": {"method": "ria", "reprune": "dsnot-ria"},
    "RIA + swaps": {"method": "ria", "reprune": "swaps"},
    "RIA + fold": {"method": "ria", "permute": "fold"},
    "RIA + obs": {"method": "ria", "reconstruct": "obs", "feed": "pruned"},
    "RIA + exact, fed pruned": {"method": "ria", "reconstruct": "exact", "feed": "pruned"},
    "RIA + exact": {"method": "ria", "reconstruct": "exact"},
    "CRePE + exact": {"method": "crepe", "reconstruct": "exact"},
    "RIA + admm": {"method": "ria", "reconstruct": "admm"},
    "RIA + fold + admm": {"method": "ria", "permute": "fold", "reconstruct": "admm"},
    "SparseGPT + exact": {"method": "sparsegpt", "reconstruct": "exact"},
    "RIA + owl": {"method": "ria", "allocate": "owl"},
    "RIA + alpha": {"method": "ria", "allocate": "alpha"},
    "RIA + error": {"method": "ria", "allocate": "error"},
    "recipe best": {"recipe": "best"},
    "llm-compressor SparseGPT": {"peer": "peers/llm_compressor.py"},
    "RIA, 128 windows": {"method": "ria", "samples": 128},
    "SparseGPT, 128 windows": {"method": "sparsegpt", "samples": 128},
    "RIA + fold + admm, 128 windows": {"method": "ria", "permute": "fold", "reconstruct": "admm", "samples": 128},
    "llm-compressor SparseGPT, 128 windows": {"peer": "peers/llm_compressor.py", "samples": 128},
    "RIA, 256 windows": {"method": "ria", "samples": 256},
    "SparseGPT, 256 windows": {"method": "sparsegpt", "samples": 256},
    "recipe best, 256 windows": {"recipe": "best", "samples": 256},
}
RESULTS = Path("bench/results/quality.json")
PUBLISHED = "^(RIA|RIA, a = 1|Wanda|CRePE|CRePE, .* preset.*|.* windows)$"


def row_config(row: dict[str, Any], pattern: str) -> PruneConfig:
    """The configuration of one row at one pattern. Raises ConfigError."""
    return prune_config(pattern=pattern, **{name: value for name, value in row.items() if name != "samples"})


@torch.inference_mode()
def window_losses(folder: Path, windows: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    """Mean negative log likelihood of each window of each text under the model in `folder`."""
    model = load_model(folder)
    return {
        text: [float(token_nll(model(ids[None], use_cache=False).logits[0, :-1], ids[1:]).mean()) for ids in sequences]
        for text, sequences in windows.items()
    }


class Grid:
    """A results file and what is needed to fill it. Raises ConfigError where the file is from other conditions."""

    def __init__(
        self, out: Path, model: Path, calib: tuple[Path, ...], texts: dict[str, Path], sizes: dict[str, int],
        command: str, peer: Path | None = None, keep: Path | None = None,
    ) -> None:  # fmt: skip
        tokenizer = load_tokenizer(model)
        self.model, self.calib, self.sizes, self.tokenizer = model, calib, sizes, tokenizer
        self.peer, self.keep = peer, keep
        limit = sizes["window"] * sizes["windows"]
        self.windows = {
            name: plan_windows(
                tokenize(tokenizer, load_text(path).joined), sizes["window"], None, limit, "none", None
            ).sequences
            for name, path in texts.items()
        }
        conditions = {
            "model": model.name,
            "calibration": texts_record(calib),
            "texts": {name: text_record(path, "file") for name, path in texts.items()},
            **sizes,
        }
        self.file = ResultsFile(out, conditions, command)
        self.file.once("dense", lambda: window_losses(model, self.windows))

    def measure(self, label: str, pattern: str, seed: int) -> Cell:
        """Prune and score one cell. Raises ConfigError for a row that has no meaning for this pattern."""
        row = ROWS[label]
        tokens = calibration_windows(
            self.calib, self.tokenizer, row.get("samples", self.sizes["samples"]), self.sizes["length"], seed=seed
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            if "peer" in row:
                facts = self._run_peer(row["peer"], pattern, tokens, Path(folder))
            else:
                facts = self._prune(row, pattern, tokens, Path(folder))
            seconds = time.monotonic() - started
            losses = window_losses(Path(folder) / "out", self.windows)
            if self.keep is not None:
                self.keep.mkdir(parents=True, exist_ok=True)
                shutil.move(Path(folder) / "out", self.keep / f"{label}, {pattern}, seed {seed}".replace("/", " "))
        return {"losses": losses, "seconds": round(seconds, 1), **facts}

    def _prune(self, row: dict[str, Any], pattern: str, tokens: CalibrationSet, folder: Path) -> dict[str, Any]:
        config = row_config(row, pattern)
        manifest = prune(resolve_model(str(self.model)), folder / "out", config, tokens)
        return {
            "phases": manifest.metrics["seconds"],
            "sparsity": manifest.metrics["sparsity_of_pruned_tensors"],
            "config": {name: value for name, value in config.record().items() if value},
        }

    def _run_peer(self, script: str, pattern: str, tokens: CalibrationSet, folder: Path) -> dict[str, Any]:
        """The same windows through another tool, in its own environment."""
        if self.peer is None:
            raise ConfigError("it runs in an environment of its own: give --peer PYTHON")
        if not isinstance(parse_record(pattern), NM):
            raise ConfigError("the peer is compared at N:M only")
        np.save(folder / "tokens.npy", tokens.tokens.numpy())
        command = [
            self.peer,
            Path(__file__).parent / script,
            self.model,
            folder / "tokens.npy",
            folder / "out",
            pattern,
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise CrepeError(f"{script} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
        return {"config": {"peer": Path(script).stem, "pattern": pattern}}


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise ConfigError(f"--text {text} is not NAME=FILE with a file that exists")
    return name, Path(path)


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=None, help="Default: SmolLM2-135M.")
@click.option(
    "--calib",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="Several give equal shares. Default: c4 train.",
)
@click.option("--text", "texts", multiple=True, metavar="NAME=FILE", help="Default: wiki and c4 valid.")
@click.option(
    "--rows",
    default=PUBLISHED,
    metavar="REGEX",
    help="Measure the rows whose label matches, '' for all. Default: those of docs/quality.md.",
)
@click.option("--patterns", default="2:4,4:8,16:32,0.5/row,0.6/row,0.7/row", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Calibration windows of the rows that do not name their own number.",
)
@click.option("--length", type=click.IntRange(2), default=512, show_default=True)
@click.option("--window", type=click.IntRange(2), default=512, show_default=True)
@click.option("--windows", type=click.IntRange(2), default=12, show_default=True)
@click.option(
    "--peer",
    type=click.Path(path_type=Path, exists=True),
    default=None,
    help="The Python of an environment with llm-compressor, see bench/studies/peers/llm_compressor.py.",
)
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False), default=None, help="Keep the pruned models there."
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--markdown", "markdown_path", type=click.Path(path_type=Path), default=None)
@assets_option
def main(
    model: Path | None, calib: tuple[Path, ...], texts: tuple[str, ...], rows: str, patterns: str, seeds: str,
    samples: int, length: int, window: int, windows: int, peer: Path | None, keep: Path | None, out: Path,
    markdown_path: Path | None, assets_dir: Path,
) -> None:  # fmt: skip
    """Measure the cells that are missing, then print the table of all that are there."""
    chosen = dict(_named(text) for text in texts)
    command = "python -m crepe_deploy.bench.studies.quality_grid" + (f" --model {model.name}" if model else "")
    command += "".join(f" --calib {path.name}" for path in calib)
    if model is None or not calib or not chosen:
        assets = ensure_assets(assets_dir)
        model, calib = model or assets.model, calib or (assets.text("c4", "train"),)
        chosen = chosen or {name: assets.text(name, "valid") for name in ("wiki", "c4")}
    sizes = {"samples": samples, "length": length, "window": window, "windows": windows}
    command += "".join(f" --text {name}={path.name}" for name, path in chosen.items())
    command += f' --rows "{rows}" --patterns {patterns} --seeds {seeds}'
    command += f" --samples {samples} --length {length}" + (" --peer PEER/bin/python" if peer else "")
    command += f" --out {out}" if out != RESULTS else ""
    grid = Grid(out, model, calib, chosen, sizes, command, peer, keep)
    for label, pattern, seed in cells_of(ROWS, rows, patterns, seeds):
        try:
            cell, state = grid.file.cell(label, pattern, seed, partial(grid.measure, label, pattern, seed))
        except ConfigError as error:  # a step that has no meaning for this pattern
            say(f"{label} {pattern}: left out: {error}")
            continue
        mean = {text: sum(losses) / len(losses) for text, losses in cell["losses"].items()}
        say(f"{label} {pattern} seed {seed}: {json.dumps(mean)} nats, {state}")
    publish(markdown(grid.file.content), markdown_path)


if __name__ == "__main__":
    main()
