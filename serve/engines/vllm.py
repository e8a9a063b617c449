"""vLLM inside this process: no server, no second process that polls, no prefix cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from .base import Prompts, Settings, check_lengths, check_options, held_bytes, plan_names

OPTIONS: Final = ("compiled", "block_size", "kv_cache_bytes")


class VllmEngine:
    """vLLM's engine driven step by step. Options: `compiled` (default false: eager), `block_size` (32),
    `kv_cache_bytes` (vLLM's own choice; on a CPU `VLLM_CPU_KVCACHE_SPACE`)."""

    @classmethod
    def require(cls, options: dict[str, Any]) -> None:
        """Raise MissingExtra or ServeError without a usable vLLM, ConfigError for an unknown option."""
        from ..launcher import require_vllm

        require_vllm()
        check_options("vllm", options, OPTIONS)

    def __init__(self, folder: Path, settings: Settings) -> None:
        from vllm import LLM

        options = settings.options
        self.llm = LLM(
            str(folder),
            dtype=settings.dtype,
            skip_tokenizer_init=True,
            enforce_eager=not options.get("compiled", False),
            enable_prefix_caching=False,
            max_model_len=settings.max_tokens,
            # Every prompt of a batch is read in one step: otherwise they would not go in lock step.
            max_num_batched_tokens=max(2048, settings.max_tokens * settings.max_batch),
            max_num_seqs=max(8, settings.max_batch),
            block_size=options.get("block_size", 32),
            kv_cache_memory_bytes=options.get("kv_cache_bytes"),
        )
        self.asked = 0

    def generate(self, prompts: Prompts, tokens: int) -> list[float]:
        """Continue prompts that are scheduled together from the first step on."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        engine = self.llm.llm_engine
        internal = []
        for prompt in prompts:
            inputs = {"type": "token", "prompt_token_ids": list(prompt)}
            internal.append(engine.add_request(str(self.asked), inputs, sampling))
            self.asked += 1
        try:
            return self._follow(len(prompts), tokens)
        finally:
            if engine.has_unfinished_requests():  # it failed on the way: the next request must not meet the remains
                engine.abort_request(internal, internal=True)

    def _follow(self, sequences: int, tokens: int) -> list[float]:
        engine = self.llm.llm_engine
        counts: dict[str, int] = {}
        times: list[float] = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                counts[output.request_id] = counts.get(output.request_id, 0) + len(output.outputs[0].token_ids)
            complete = min(counts.values()) if len(counts) == sequences else 0
            times += [now] * (complete - len(times))
        check_lengths(list(counts.values()), tokens)
        return times

    def describe(self) -> dict[str, Any]:
        """Bytes and kernels of the linear layers, asked of the model inside vLLM."""
        held: dict[str, Any] = self.llm.apply_model(describe_model)[0]
        dtype = str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")
        return {"dtype": dtype, **held}

    def close(self) -> None:
        """Shut the engine down."""
        self.llm.llm_engine.engine_core.shutdown()


def describe_model(model: Any) -> dict[str, Any]:
    """Bytes and kernels of vLLM's linear layers in the decoder blocks (`lm_head` is none of them).

    vLLM hands dense weights to oneDNN and keeps none of its own; those count as rows x columns x bytes of an entry.
    """
    from vllm.model_executor.layers.linear import LinearBase

    sizes, kernels = [], {}
    for _, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        held = held_bytes(layer)
        if hasattr(layer, "kernel_plan"):
            kernels[f"{layer.kernel_rows}x{layer.crepe_columns}"] = plan_names(layer.kernel_plan.tolist())
        elif not layer.weight.numel():
            held += layer.output_size_per_partition * layer.input_size_per_partition * layer.weight.element_size()
        sizes.append(held)
    return {"linear_bytes": sum(sizes), "linears": len(sizes), "kernels": kernels}
