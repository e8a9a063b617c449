"""The recorded greedy prompt: the same tokens as one walk a token would give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crepe_deploy.export.greedy import continue_greedily, record_greedy

from crepe_deploy.families import Decoder
from crepe_deploy.proof import walk_logits

from ..pico import make_pico_llama


@pytest.mark.parametrize("count", [0, 1, 2, 16])
def test_guessing_ahead_changes_no_token(tmp_path: Path, count: int) -> None:
    make_pico_llama(tmp_path, seed=3)
    decoder = Decoder(tmp_path, "float32")
    ids = [5, 9, 2]
    expected, gaps = list(ids), []
    for _ in range(count):
        best = walk_logits(decoder, torch.tensor([expected]))[0, -1].topk(2)
        expected.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    ticks = []
    tokens, margins = continue_greedily(decoder, ids, count, lambda: ticks.append(None))
    assert tokens == expected[3:]
    assert margins == pytest.approx(gaps, abs=1e-3)
    assert len(ticks) == count


def test_the_context_bounds_the_continuation(tmp_path: Path) -> None:
    make_pico_llama(tmp_path, max_position_embeddings=32)
    decoder = Decoder(tmp_path)
    greedy = record_greedy(tmp_path, count=decoder.context_length)
    assert len(greedy["prompt_token_ids"]) + len(greedy["token_ids"]) == decoder.context_length
    assert len(greedy["margins"]) == len(greedy["token_ids"])
