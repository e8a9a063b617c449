"""Small real work for timing: the packed kernels beside torch's dense ones, and a decode step of a tiny model."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ...packed import dispatch, ops
from ...packed.prepare import prepare
from ..gate.interleave import Work
from .kernels import random_packed

SHAPE: Final = (1024, 2048)  # 4 MB in bf16: more than one core's own caches hold
GROUP: Final = 32
SEED: Final = 0


def dense_linear(batch: int, shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.bfloat16) -> Work:
    """`F.linear` of this batch with a dense weight of `shape` (out, in)."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = _batch(batch, shape, dtype)
    return lambda: _dense(x, weight)


def packed_linear(batch: int, choice: str, shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.bfloat16) -> Work:
    """The same with a packed 16:32 weight, by the kernel `choice` (see `dispatch.CHOICES`)."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        weight = prepare(*random_packed(shape, GROUP, dtype))
    plan = torch.full((dispatch.BUCKETS,), dispatch.CHOICES[choice], dtype=torch.int8)
    x = _batch(batch, shape, dtype)
    return lambda: ops.nm_linear(x, weight, plan)


def decode_step(hidden: int = 256, layers: int = 4) -> Work:
    """One step of a random Llama in float32 after a prompt of 16 tokens, its cache cut back afterwards."""
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    prompt = torch.arange(16)[None]
    with torch.inference_mode():
        model(prompt, past_key_values=cache, use_cache=True)

    def step() -> None:
        with torch.inference_mode():
            model(prompt[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

    return step


@torch.inference_mode()
def _dense(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _batch(batch: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randn(batch, shape[1], generator=generator).to(dtype)
