"""Which text is trained on when, and which is held out: windows of whole texts, decided by the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.documents import load_text
from crepe_deploy.errors import CalibrationError
from crepe_deploy.texts import CHARS_PER_TOKEN, MIN_CHARS, WHOLE_CHARS, tokenize, wants_bos_each_window

from .config import HealConfig

HELD_TOKENS = 4096  # looked at each time, of what is held out: more says no more about which step is best


@dataclass(frozen=True)
class Corpus:
    """Token windows (windows, length), int64: those trained on and those held out. texts: what they came from."""

    training: Tensor
    held: Tensor
    texts: list[dict[str, Any]]
    seed: int

    def batch(self, step: int, windows: int) -> list[int]:
        """Which windows a step trains on: one epoch after the other, each in an order of its own."""
        total = len(self.training)
        places = [divmod(place, total) for place in range(step * windows, (step + 1) * windows)]
        return [int(_order(self.seed, epoch, total)[offset]) for epoch, offset in places]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> Tensor:
    mixed = (seed * 1_000_003 + epoch) % (1 << 63)
    return torch.randperm(total, generator=torch.Generator().manual_seed(mixed))


def read_corpus(texts: Sequence[str | Path], tokenizer: Any, config: HealConfig, field: str, processes: int) -> Corpus:
    """Cut every text into windows; the last share of each is held out, of all as many as HELD_TOKENS, spread evenly.

    Raises CalibrationError where there is less than one batch to train on or nothing to hold out.
    """
    bos = wants_bos_each_window(tokenizer)
    front = torch.full((1, int(bos)), tokenizer.bos_token_id if bos else 0)
    body = config.window - int(bos)
    training: list[Tensor] = []
    held: list[Tensor] = []
    records: list[dict[str, Any]] = []
    for source in texts:
        text = load_text(source, field, max_chars=_limit(config), file_chars=_limit(config))
        ids = tokenize(tokenizer, text.joined)
        windows = ids[: len(ids) // body * body].view(-1, body)
        windows = torch.cat([front.expand(len(windows), -1), windows], dim=1)
        out = max(1, round(len(windows) * config.holdout))
        training.append(windows[:-out])
        held.append(windows[-out:])
        records.append({"source": text.source, "sha256": text.sha256, "tokens": len(ids), "held_out": out * body})
    corpus = Corpus(torch.cat(training), _spread(torch.cat(held), config.window, processes), records, config.seed)
    if len(corpus.training) < config.windows or not len(corpus.held):
        tokens = sum(record["tokens"] for record in records)
        raise CalibrationError(
            f"the text has {tokens} tokens: {len(corpus.training)} windows of {config.window} to train on, and a batch "
            f"takes {config.windows}, besides {processes} to hold out; give more text, or a smaller --window or "
            "--batch-tokens"
        )
    return corpus


def _limit(config: HealConfig) -> int:
    """Characters of each text that are read."""
    if config.budget_steps is None:
        return WHOLE_CHARS
    return min(WHOLE_CHARS, max(MIN_CHARS, 2 * CHARS_PER_TOKEN * config.budget_steps * config.batch_tokens))


def _spread(held: Tensor, window: int, processes: int) -> Tensor:
    """As many of the windows as are looked at, the same number for every process."""
    wanted = max(processes, min(len(held), HELD_TOKENS // window) // processes * processes)
    if len(held) < wanted:
        return held[:0]
    return held[[index * len(held) // wanted for index in range(wanted)]]
