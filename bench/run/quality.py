"""Quality of a candidate for the benchmark: `crepe-deploy eval` in a process of its own, as a `Quality` record.

Folders are loaded by transformers. A packed one runs packed. An int8 one is imitated: every linear layer's input is
rounded to int8, one scale for each token, but weights are expanded from their int8 values into the model's dtype and
multiplied there, where vLLM multiplies integers. In bf16 that rounds the weights once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .processes import crepe_deploy
from .result import Interval, Quality


def measure_quality(
    folder: Path,
    baseline: Path | None,
    text: Path,
    *,
    window: int = 2048,
    stride: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Quality:
    """Perplexity of `folder` on `text`, and its distance to the logits of `baseline` where one is given.

    Both models are in that process's memory together. Raises CrepeError when it fails; its own message is on stderr.
    """
    options: dict[str, Any] = {
        "--text": text,
        "--window": window,
        "--stride": stride,
        "--max-tokens": max_tokens,
        "--dtype": dtype,
        "--seed": seed,
        "--against": baseline,
    }
    given = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    return quality_of(crepe_deploy("eval", str(folder), *given).output)


def quality_of(report: dict[str, Any]) -> Quality:
    """The document that `crepe-deploy eval --json` prints, as a record."""
    paired = report["paired"] or {}
    names = ("perplexity_ratio", "kl_mean", "kl_p99", "same_top")
    distances = {name: Interval.model_validate(paired[name]) for name in names if name in paired}
    perplexity = Interval.model_validate(report["perplexity"])
    return Quality(convention=report["convention"], perplexity=perplexity, **distances)
