"""The recorded greedy prompt: what the checkpoint says, in float32, and how sure it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crepe_deploy.exporting.frame.greedy import GREEDY_TOKENS, record_greedy
from transformers import AutoModelForCausalLM

from crepe_deploy.model.decoder import Decoder
from tests.pico import make_pico_llama


def test_it_is_what_transformers_says(tmp_path: Path) -> None:
    make_pico_llama(tmp_path, torch.bfloat16)
    ticks: list[None] = []
    greedy = record_greedy(tmp_path, tick=lambda: ticks.append(None))
    ids = torch.tensor([greedy["prompt_token_ids"]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = model.generate(
        ids, max_new_tokens=GREEDY_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert found.sequences[0, ids.shape[1] :].tolist() == greedy["token_ids"]
    best = [logits[0].topk(2).values for logits in found.logits]
    assert greedy["margins"] == pytest.approx([float(pair[0] - pair[1]) for pair in best], abs=1e-3)
    assert greedy["checkpoint_dtype"] == "bfloat16"
    assert len(ticks) == GREEDY_TOKENS


def test_the_context_bounds_the_continuation(tmp_path: Path) -> None:
    make_pico_llama(tmp_path, max_position_embeddings=32)
    greedy = record_greedy(tmp_path, count=Decoder(tmp_path).context_length)
    assert len(greedy["prompt_token_ids"]) + len(greedy["token_ids"]) == 32
    assert len(greedy["margins"]) == len(greedy["token_ids"])


def test_a_context_that_the_prompt_does_not_fit_gets_a_shorter_one(tmp_path: Path) -> None:
    make_pico_llama(tmp_path, max_position_embeddings=4)
    greedy = record_greedy(tmp_path)
    assert greedy["prompt"] is None
    assert (greedy["prompt_token_ids"], len(greedy["token_ids"])) == ([2, 3, 4], 1)
