"""Pruning on the device and on the CPU: masks compared, seconds for each block, peak memory of the device.

A random Llama of real widths and few blocks is written to disk and pruned twice from the same random tokens. Besides,
for each layer of its first block: masks of equal scores, which must be equal whatever device chose them, and the share
of equal entries where scores were computed on either side from equal statistics. Sums round in another order on a GPU,
so the other shares are reported, not demanded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...device import resolve
from ...model.decoder import Decoder, LinearSpec
from ...model.stats import Stats
from ...pattern import parse_pattern
from ...pruning.methods import get_method
from ...pruning.methods.base import ScoreMethod
from ...select import select
from ...store.checkpoint import CheckpointReader
from ...store.manifest import load_manifest
from ...store.temporary import temporary_folder
from .work import Plan

PATTERN = "2:4"
SCORED = ("wanda", "crepe")


def measure_pruning(what: str, plan: Plan) -> dict[str, Any]:
    """Prune with a method or recipe of `plan.prunings` on both devices, and compare."""
    device = resolve(plan.device)
    with temporary_folder("gpu-pruning") as folder:
        model = write_model(folder / "model", plan)
        rows = {place: _pruned(model, folder / place, plan, what, place) for place in ("cpu", "device")}
        decoder = Decoder(model)
        rows["masks"] = {
            **_chosen(decoder, device),
            "own_statistics": _equal_zeros(folder / "cpu", folder / "device"),
        }
    rows["correct"] = rows["masks"]["equal_scores"] == 1.0
    return rows


def write_model(folder: Path, plan: Plan) -> Path:
    """A random Llama in bf16 at the sizes of `plan.pruned`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**plan.pruned)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _pruned(model: Path, out: Path, plan: Plan, what: str, place: str) -> dict[str, Any]:
    """Seconds by phase and for a block, and the most memory that the device had taken."""
    from ...api.prune import prune

    tokens = torch.randint(plan.pruned["vocab_size"], plan.windows, generator=torch.Generator().manual_seed(0))
    name = plan.device if place == "device" else "cpu"
    if name != "cpu":
        torch.cuda.reset_peak_memory_stats()
    manifest = prune(model, out, sparsity=PATTERN, calib=tokens, device=name, **plan.prunings[what])
    phases = manifest.metrics["seconds"]
    blocks = sum(value for phase, value in phases.items() if phase not in ("embed", "verify", "hash", "write"))
    return {
        "device": manifest.metrics["device"],
        "seconds": phases,
        "seconds_a_block": blocks / plan.pruned["num_hidden_layers"],
        "peak_bytes": torch.cuda.max_memory_allocated() if name != "cpu" else None,
    }


def _chosen(decoder: Decoder, device: torch.device) -> dict[str, float]:
    """Shares of equal mask entries over the layers of the first block: of equal scores, and of equal statistics."""
    same: dict[str, list[float]] = {"equal_scores": [], **{f"equal_statistics_{name}": [] for name in SCORED}}
    pattern, draws = parse_pattern(PATTERN), torch.Generator().manual_seed(0)
    for spec in decoder.linears[0]:
        weight, norms = _weight(decoder, spec), torch.rand(spec.in_features, generator=draws)
        for name in SCORED:
            method = get_method(name)
            assert isinstance(method, ScoreMethod)
            score = method.score(weight, Stats(col_norm=norms))
            there = method.score(weight.to(device), Stats(col_norm=norms.to(device)))
            mask = select(score, pattern)
            same["equal_scores"].append(_share(select(score.to(device), pattern).cpu() == mask))
            same[f"equal_statistics_{name}"].append(_share(select(there, pattern).cpu() == mask))
    return {name: min(shares) for name, shares in same.items()}


def _weight(decoder: Decoder, spec: LinearSpec) -> Tensor:
    stored = decoder.reader.load(spec.key)
    return stored.T if spec.transposed else stored


def _equal_zeros(first: Path, second: Path) -> float:
    """The share of entries of the pruned tensors that are zero in both folders, or in neither."""
    one, other = CheckpointReader(first), CheckpointReader(second)
    keys = load_manifest(first).tensors
    shares = [_share((one.load(key) == 0) == (other.load(key) == 0)) for key in keys]
    return sum(shares) / len(shares)


def _share(equal: Tensor) -> float:
    return float(equal.double().mean())
