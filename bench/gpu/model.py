"""End to end: decode and prefill of a random Llama through transformers, static cache, CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...packed.linear import PackedLinear
from .timing import interleaved
from .work import DENSE, PATTERNS, Plan, random_packed

_DECODED = 64  # room behind the prompt


@torch.inference_mode()
def measure_model(variant: str, plan: Plan) -> dict[str, Any]:
    """Milliseconds of one decoded token and of one prompt, and resident bytes, of one variant."""
    model, config = build(variant, plan)
    prompt = torch.randint(0, plan.model["vocab_size"], (1, plan.prompt), device=plan.device)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.tune((1, plan.prompt))
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=plan.prompt + _DECODED)
    token = prompt[:, :1].clone()

    def prefill() -> object:
        cache.reset()
        return model(prompt, past_key_values=cache, logits_to_keep=1).logits

    def decode() -> object:  # takes its turn after a prefill, so it always stands behind the prompt
        return model(token, past_key_values=cache).logits

    prefill()  # allocates the cache
    calls = {"prefill": [prefill], "decode": [decode]}
    times = interleaved(calls, plan)
    size = sum(t.numel() * t.element_size() for t in tensors(model))
    return {"ms": {name: 1e-3 * row["median"] for name, row in times.items()}, "resident_bytes": size}


def build(variant: str, plan: Plan) -> tuple[Any, Any]:
    """A random model on the device, its decoder's linear layers packed unless the variant is dense; and its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**plan.model, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if variant != DENSE:
        for name, linear in list(model.model.layers.named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(model.model.layers.get_submodule(parent), leaf, packed(linear, variant, plan))
    move(model, plan.device)
    with torch.device(plan.device):  # its buffers are computed, not loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval(), config


def packed(linear: nn.Linear, pattern: str, plan: Plan) -> PackedLinear:
    """A random packed layer of the same shape, prepared for the device."""
    group = PATTERNS[pattern]
    pair = random_packed((linear.out_features, linear.in_features), group, plan.device)
    layer = PackedLinear(linear.in_features, linear.out_features, False, group // 2, group, torch.bfloat16, "meta")
    layer.weight_values, layer.weight_mask = (nn.Parameter(t, requires_grad=False) for t in pair)
    if plan.on_gpu:
        layer.prepare()
    else:  # the rehearsal: what `prepare` does on a CUDA device
        from ...packed.cuda.linear import CudaLinear

        layer.on_device = CudaLinear(*pair, plan.device)
        layer.weight_values = layer.weight_mask = None
    return layer


def move(model: nn.Module, device: str) -> None:
    """Give every tensor that exists only as a shape small random contents on the device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(0, 0.02)
                setattr(module, name, nn.Parameter(made, requires_grad=False))


def tensors(model: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers; cuSPARSELt's tensor holds the values too, which then count once."""
    held = [*model.parameters(), *model.buffers()]
    return list({t.untyped_storage().data_ptr(): t for t in sorted(held, key=lambda t: t.numel())}.values())
