"""The greedy smoke prompt in a manifest: what a server of this checkpoint must answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import NoTokenizer
from ...model.decoder import Decoder
from ...model.proof import walk_logits
from ...store.checkpoint import KeepingReader, TensorInfo
from ...store.manifest import Manifest
from ...store.stock import check_ids
from ...texts import load_tokenizer

PROMPT = "The capital of France is"
GREEDY_TOKENS = 8  # each is a walk through the model
KEPT_BYTES = 256 << 20


def greedy_of(source: Path, manifest: Manifest, tick: Callable[[], None]) -> dict[str, Any]:
    """What the manifest of `source` records, or, where it does not, `record_greedy` of it; GREEDY_TOKENS ticks."""
    recorded: dict[str, Any] | None = manifest.metrics.get("greedy")
    return record_greedy(source, tick=tick) if recorded is None else recorded


def with_greedy(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of the dense checkpoint in `folder`, its greedy prompt recorded."""
    return manifest.model_copy(update={"metrics": {**manifest.metrics, "greedy": record_greedy(folder)}})


def record_greedy(source: Path, count: int = GREEDY_TOKENS, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Continue the fixed prompt greedily with the dense checkpoint `source`, one block in memory at a time.

    Computed in float32, so that `margins`, the gaps between the two best logits, say where a coarser dtype may round
    to the other token. Without a tokenizer, and where its ids of the prompt are none or too many for the context,
    `prompt` is None and the prompt's token ids are 2, 3, 4, 5, 6.

    A token is known only when the one before it is, so each is a walk through all blocks. What is outside the blocks
    is in memory together at the end of each walk anyway and stays there in the files' dtype; of the blocks, as many
    tensors as `KEPT_BYTES` hold. Those are read once, the rest once for each token.
    """
    stored = Decoder(source, experts=True).dtype
    decoder = Decoder(source, "float32", experts=True)
    decoder.reader = KeepingReader(source, _keeps(decoder))
    prompt, ids = _prompt_ids(source, decoder)
    tokens = torch.tensor([ids])
    margins = []
    for _ in range(min(count, decoder.context_length - len(ids))):
        best = walk_logits(decoder, tokens)[0, -1].topk(2)
        margins.append(round(float(best.values[0] - best.values[1]), 4))
        tokens = torch.cat([tokens, best.indices[:1].view(1, 1)], dim=1)
        tick()
    return {
        "prompt": prompt,
        "prompt_token_ids": ids,
        "token_ids": tokens[0, len(ids) :].tolist(),
        "margins": margins,
        "dtype": "float32",
        "checkpoint_dtype": str(stored).removeprefix("torch."),
        "what": "greedy continuation by the dense checkpoint with zeros, end-of-text tokens included",
    }


def _keeps(decoder: Decoder) -> Callable[[TensorInfo], bool]:
    """Whether a tensor that was just read is to stay: all outside the blocks, and of the blocks what has room."""
    blocks = {key for index in range(len(decoder.blocks)) for key in decoder.block_keys(index)}
    room = KEPT_BYTES

    def keep(info: TensorInfo) -> bool:
        nonlocal room
        if info.name not in blocks:
            return True
        if info.size_bytes > room:
            return False
        room -= info.size_bytes
        return True

    return keep


def _prompt_ids(source: Path, decoder: Decoder) -> tuple[str | None, list[int]]:
    size = decoder.vocab_size
    try:
        tokenizer = load_tokenizer(source)
        ids = [int(token) for token in tokenizer(PROMPT)["input_ids"]]
        check_ids(tokenizer, ids, size)
    except NoTokenizer:
        ids = []
    if 0 < len(ids) < decoder.context_length:
        return PROMPT, ids
    return None, [token % size for token in range(2, 7)][: max(1, decoder.context_length - 1)]
