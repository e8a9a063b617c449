"""What ONNX exports keep and take: parity, the cost of int4, and memory; builds what configs/bench-onnx.yaml measures.

    python -m crepe_deploy.bench.studies.onnx [--folder out/bench/onnx] [--out bench/results/onnx.json] [--only ...]

SmolLM2-135M-Instruct (dequantised Q4_1) pruned to 2:4 and exported by the commands a user would type; parity is what
each export proved. int4 is scored beside the fp32 graph of the same checkpoint on the same windows, through the graphs.
Memory: peak resident of a whole export process, of a random checkpoint of Llama-3.2-1B's shape (`--llama FOLDER`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch

from ...documents import load_text
from ...quality.perplexity import plan_windows
from ...quality.scoring import estimate, exp_mean, kl_per_token, mean, same_top_token, token_nll
from ...serve.ort import Graph
from ...store.manifest import load_manifest
from ...texts import load_tokenizer, tokenize
from ..assets import ensure_assets
from ..run.processes import crepe_deploy, run_json
from .frame import CALIBRATION, assets_option, folder_option, machine, out_option, save

EXPORTS: Final = {
    "dense": ("--format", "dense"),
    "portable-fp32": ("--format", "onnx"),
    "genai-fp32": ("--format", "onnx", "--onnx-flavor", "genai"),
    "genai-int4": ("--format", "onnx", "--onnx-flavor", "genai", "--precision", "int4"),
}
WINDOW, MAX_TOKENS = 512, 8192


def build(root: Path, assets_dir: Path) -> None:
    """Prune and export what is missing below `root`."""
    assets = ensure_assets(assets_dir)
    pruned = root / "pruned"
    if not pruned.is_dir():
        text = str(assets.text("c4", "train"))
        crepe_deploy(
            "prune", str(assets.model), "--out", str(pruned), "--sparsity", "2:4", "--calib", text, *CALIBRATION
        )
    for name, options in EXPORTS.items():
        if not (root / name).is_dir():
            crepe_deploy("export", str(pruned), "--out", str(root / name), *options)


def parity(root: Path) -> dict[str, Any]:
    """What every export proved of itself."""
    proofs = {}
    for name in EXPORTS:
        record = load_manifest(root / name).metrics.get("onnx")
        if record is not None:
            proofs[name] = {
                **record["parity"],
                "graph_bytes": load_manifest(root / name).metrics["size"]["graph_bytes"],
            }
    return proofs


def int4_cost(root: Path, assets_dir: Path) -> dict[str, Any]:
    """Perplexity of the int4 graph beside the fp32 one, and the divergence between them, window by window."""
    text = load_text(ensure_assets(assets_dir).text("wiki", "test"), "text", split="test")
    ids = tokenize(load_tokenizer(root / "dense"), text.joined)
    windows = plan_windows(ids, WINDOW, None, MAX_TOKENS, "none", None)
    full, rounded = Graph(root / "genai-fp32"), Graph(root / "genai-int4")
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("fp32", "int4", "kl", "same")}
    for sequence, first in zip(windows.sequences, windows.first_scored, strict=True):
        logits = [torch.from_numpy(graph.prefill([sequence.tolist()])[0, first - 1 : -1]) for graph in (full, rounded)]
        targets = sequence[first:]
        columns["fp32"].append(token_nll(logits[0], targets))
        columns["int4"].append(token_nll(logits[1], targets))
        columns["kl"].append(kl_per_token(logits[0], logits[1]))
        columns["same"].append(same_top_token(logits[0], logits[1]))
    difference = [high - low for high, low in zip(columns["int4"], columns["fp32"], strict=True)]
    return {
        "perplexity_fp32": vars(estimate(columns["fp32"], exp_mean, 0)),
        "perplexity_int4": vars(estimate(columns["int4"], exp_mean, 0)),
        "perplexity_ratio": vars(estimate(difference, exp_mean, 0)),
        "kl_mean": vars(estimate(columns["kl"], mean, 0)),
        "same_top": vars(estimate(columns["same"], mean, 0)),
        "convention": f"wiki test, window {WINDOW}, no overlap, {windows.predicted} tokens predicted, no BOS",
        "what": "genai graphs of one 2:4 checkpoint: int4 against fp32",
    }


def export_memory(model: Path, folder: Path) -> dict[str, Any]:
    """Peak resident memory of exporting `model` in a process of its own, over the bytes of the fp32 graph it wrote."""
    child = run_json([sys.executable, "-m", "crepe_deploy.bench.studies.onnx_child", str(model), str(folder)])
    return {**child.output, "peak_over_graph": child.output["peak_bytes"] / child.output["graph_bytes"],
            "seconds": child.seconds}  # fmt: skip


@click.command()
@folder_option("out/bench/onnx")
@out_option()
@assets_option
@click.option("--llama", type=click.Path(path_type=Path), default=None, help="A pruned 1B checkpoint; memory's source.")
def main(folder: Path, out: Path | None, assets_dir: Path, llama: Path | None) -> None:
    """Build the folders, then measure what speed does not say."""
    folder.mkdir(parents=True, exist_ok=True)
    build(folder, assets_dir)
    result: dict[str, Any] = {
        "command": "python -m crepe_deploy.bench.studies.onnx" + (" --llama FOLDER" if llama else ""),
        "machine": {**machine(), **_runtimes()},
        "parity": parity(folder),
        "int4": int4_cost(folder, assets_dir),
    }
    if llama is not None:
        result["memory"] = export_memory(llama, folder / "llama-1b")
    save(result, out)


def _runtimes() -> dict[str, str]:
    import importlib.metadata

    names = ("onnx", "onnxscript", "onnxruntime", "onnxruntime-genai")
    return {name: importlib.metadata.version(name) for name in names} | {"numpy": np.__version__}


if __name__ == "__main__":
    main()
