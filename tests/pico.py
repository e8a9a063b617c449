"""Tiny random models with a real tokenizer on disk, for every test that needs a checkpoint folder."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

VOCAB = 320
WORDS = re.findall(
    r"\w+",
    "the of and to in a is was for on as with by he that at from his it an were are which this also be has had first "
    "one their its new after but who not they have two her she or been other when there all during into school time "
    "may years more most only over city some world would where later up such used many can state about national known",
)
# The shortest structural search that a pico model can be given.
QUICK_TYR = ["--sparsity", "0.25", "--generations", "1", "--offspring", "2", "--iterations", "1", "--ffn-multiple", "8"]


def sample_text(n_words: int, seed: int = 0) -> str:
    """Deterministic English-looking text: sentences of ten words, paragraphs of five sentences."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (n_words,), generator=generator).tolist()
    words = [WORDS[pick] for pick in picks]
    sentences = [" ".join(words[start : start + 10]) + "." for start in range(0, n_words, 10)]
    return "\n\n".join(" ".join(sentences[start : start + 5]) for start in range(0, len(sentences), 5)) + "\n"


def make_pico(directory: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a random model of this config (any causal LM) with the pico tokenizer; returns the folder.

    The config's vocabulary must hold the tokenizer's 320 tokens. Global RNG state is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(str(directory))
    pico_tokenizer().save_pretrained(str(directory))
    return directory


def make_pico_llama(directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """Write a two-layer Llama, hidden 64, FFN 128, 4 query and 2 KV heads, context 512; `overrides` change it."""
    return make_pico(directory, pico_llama_config(**overrides), dtype, seed)


def pico_llama_config(**overrides: Any) -> LlamaConfig:
    """The config that `make_pico_llama` uses, with `overrides`."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **overrides})


@cache
def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with exactly 320 tokens; `<s>` is 0, `</s>` is 1; adds no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
