"""What pruning costs: time against one plain forward over the same tokens, and peak memory of a larger model.

    python -m crepe_deploy.bench.studies.pruning [--out bench/results/pruning.json]

Both are ratios of one run. Time: SmolLM2-135M-Instruct (dequantised Q4_1), CRePE 2:4, 16 x 512 calibration tokens;
forward and prune alternate in one process, medians over the rounds. Memory: a random-weight bf16 checkpoint of
Llama-3.2-1B's shape in a process of its own, peak resident memory above what importing the libraries takes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from ...model.decoder import Decoder
from ...store.checkpoint import CheckpointReader
from ..assets import ensure_assets
from ..run.processes import run_json
from .frame import assets_option, machine, out_option, save
from .llama_1b import LLAMA_1B, make_llama_1b

SAMPLES, LENGTH, ROUNDS = 16, 512, 5


def measure_time(assets_dir: Path, feed: str) -> dict[str, Any]:
    """Seconds of one prune over seconds of one plain transformers forward, same tokens, dtype and threads."""
    import torch
    from transformers import AutoModelForCausalLM

    from ...pruning.config import prune_config
    from ...pruning.prune import prune
    from ...store.sources import resolve_model
    from ...texts import calibration_windows, load_tokenizer

    assets = ensure_assets(assets_dir)
    tokens = calibration_windows(
        assets.directory / "c4.train.txt", load_tokenizer(assets.model), SAMPLES, LENGTH, seed=0
    )
    config = prune_config("crepe", "2:4", feed="pruned" if feed == "pruned" else "dense")
    dense = AutoModelForCausalLM.from_pretrained(assets.model).eval()

    def forward() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in torch.split(tokens.tokens, 4):
                dense(batch, use_cache=False)
        return time.perf_counter() - start

    forwards, prunes, shares = [forward()], [], []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(ROUNDS):
            start = time.perf_counter()
            manifest = prune(resolve_model(str(assets.model)), Path(folder) / str(index), config, tokens)
            prunes.append(time.perf_counter() - start)
            seconds = manifest.metrics["seconds"]
            shares.append((seconds["score"] + seconds["select"]) / prunes[-1])
            forwards.append(forward())
    ratios = [
        prune_s / ((before + after) / 2) for prune_s, before, after in zip(prunes, forwards, forwards[1:], strict=False)
    ]
    return {
        "feed": config.feed,
        "prune_over_forward": statistics.median(ratios),
        "prune_over_forward_rounds": ratios,
        "scoring_and_selection_share": statistics.median(shares),
        "prune_s": statistics.median(prunes),
        "forward_s": statistics.median(forwards),
        "last_phases_s": seconds,
        "threads": torch.get_num_threads(),
    }


def measure_memory(assets_dir: Path) -> dict[str, Any]:
    """Peak resident memory of pruning the 1B shape in a child process, above that of its imports."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        make_llama_1b(folder)
        decoder = Decoder(folder)
        block = max(
            sum(decoder.reader.info(key).size_bytes for key in decoder.block_keys(index))
            for index in range(len(decoder.blocks))
        )
        embeddings = decoder.reader.info("model.embed_tokens.weight").size_bytes
        total = sum(info.size_bytes for info in CheckpointReader(folder))
        activations = SAMPLES * LENGTH * LLAMA_1B["hidden_size"] * 2
        command = [sys.executable, "-m", "crepe_deploy.bench.studies.prune_child", str(folder), str(Path(root) / "out")]
        child = run_json(command)
    above = child.output["peak_bytes"] - child.output["import_bytes"]
    budget = embeddings + 4 * block + 2 * activations
    return {
        "checkpoint_bytes": total,
        "peak_above_imports_bytes": above,
        "budget_bytes": budget,
        "share_of_budget": above / budget,
        "budget": "embeddings + 4 x the largest block + 2 x the calibration activations",
        "import_bytes": child.output["import_bytes"],
        "seconds": child.seconds,
    }


@click.command()
@out_option()
@assets_option
def main(out: Path | None, assets_dir: Path) -> None:
    """Measure pruning time and memory."""
    result = {
        "command": "python -m crepe_deploy.bench.studies.pruning",
        "machine": machine(),
        "time": [measure_time(assets_dir, feed) for feed in ("dense", "pruned")],
        "memory": measure_memory(assets_dir),
    }
    save(result, out)


if __name__ == "__main__":
    main()
