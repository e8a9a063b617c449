"""Proof after writing: a checkpoint reopened from disk must compute what the model in memory computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.device import CPU
from crepe_deploy.errors import ParityError

from .calibrate import embed
from .decoder import Decoder

PARITY_TOLERANCE = 1e-4


Look = Callable[[dict[str, Tensor]], None]


def check_parity(
    folder: Path, dtype: str, probe_tokens: Tensor, expected: Tensor, look: Look | None = None,
    device: torch.device = CPU,
) -> dict[str, Any]:  # fmt: skip
    """Walk the written checkpoint and compare its logits with the in-memory pruned model's. Raises ParityError.

    expected: on the host. look: as in `walk_logits`. device: that the walk computes on.
    """
    written = walk_logits(Decoder(folder, dtype, device, experts=True), probe_tokens, look)
    difference = float((written - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not difference <= PARITY_TOLERANCE * scale:
        raise ParityError(f"the reloaded model's logits differ from the pruned model's by {difference:.3g}")
    return {
        "max_abs_logit_difference": difference,
        "tolerance": PARITY_TOLERANCE * scale,
        "tokens": probe_tokens.shape[1],
        "what": "logits of the files reopened from disk against the pruned model in memory",
    }


def walk_logits(decoder: Decoder, tokens: Tensor, look: Look | None = None) -> Tensor:
    """Logits (batch, length, vocab) fp32, on the host, of a checkpoint, one block in memory at a time; in one batch.

    look: as in `walk_all`.
    """
    return walk_all(decoder, [tokens], look)[0]


def walk_all(decoder: Decoder, token_sets: list[Tensor], look: Look | None = None) -> list[Tensor]:
    """`walk_logits` of several token sets, each of its own length, that share one walk: every block is read once.

    The embeddings are read once more where the head needs them. look: shown each block's weights by checkpoint name,
    so that whoever else must see them need not read them again.
    """
    streams = embed(decoder, token_sets)
    for index in range(len(decoder.blocks)):
        with decoder.block(index) as (block, weights):
            if look is not None:
                look(weights)
            for stream in streams:
                stream.run(block, index, advance=True)
    with decoder.head() as head:
        pairs = zip(token_sets, streams, strict=True)
        return [head(tokens, torch.cat(stream.hidden)).float().cpu() for tokens, stream in pairs]
