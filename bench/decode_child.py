"""One candidate of `decode` in a process of its own: loads a model, then answers timing requests.

    python -m crepe_deploy.bench.decode_child ENGINE FOLDER [--max-tokens 1024] [--compiled]

One JSON object a line. The first line out describes the loaded model. Each line in, `{"prompts": [[token ids]],
"tokens": n}`, is answered by `{"s": wall-clock seconds, "cpu_s": processor seconds of all threads}`; the end of the
input ends the process. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

Prompts = Sequence[Sequence[int]]


class Engine(Protocol):
    """What can be timed: greedy continuation of prompts in one batch, and a word about what was loaded."""

    def generate(self, prompts: Prompts, tokens: int) -> None:
        """Continue every prompt by exactly `tokens` tokens."""

    def describe(self) -> dict[str, Any]:
        """Resident bytes of the linear layers in the decoder blocks, and how they are served."""


class VllmEngine:
    """vLLM in this process: no server, no second process that polls, no prefix cache."""

    def __init__(self, folder: Path, max_tokens: int, compiled: bool) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            enforce_eager=not compiled,
            enable_prefix_caching=False,
            max_model_len=max_tokens,
            max_num_batched_tokens=max(2048, max_tokens),
            max_num_seqs=8,
            block_size=32,
        )

    def generate(self, prompts: Prompts, tokens: int) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        check_lengths([len(output.outputs[0].token_ids) for output in outputs], tokens)

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = self.llm.apply_model(describe_vllm)[0]
        return found


class TransformersEngine:
    """transformers' `generate` with its usual key-value cache."""

    def __init__(self, folder: Path, max_tokens: int, compiled: bool) -> None:
        del max_tokens, compiled
        from transformers import AutoModelForCausalLM

        from ..packed.linear import PackedLinear

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        for module in self.model.modules():
            if isinstance(module, PackedLinear):
                module.tune()

    def generate(self, prompts: Prompts, tokens: int) -> None:
        import torch

        ids = torch.tensor([list(prompt) for prompt in prompts])
        with torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True
            )
        check_lengths([found.shape[1] - ids.shape[1]], tokens)

    def describe(self) -> dict[str, Any]:
        from torch import nn

        from ..packed.linear import PackedLinear

        sizes, kernels = [], {}
        for name, module in self.model.named_modules():
            if isinstance(module, PackedLinear):
                kernels[f"{module.out_features}x{module.in_features}"] = plan_names(module.kernel_plan.tolist())
            if isinstance(module, PackedLinear) or (isinstance(module, nn.Linear) and "layers." in name):
                sizes.append(held_bytes(module))
        return {"linear_bytes": sum(sizes), "linears": len(sizes), "kernels": kernels}


ENGINES: dict[str, Callable[[Path, int, bool], Engine]] = {"vllm": VllmEngine, "transformers": TransformersEngine}


def describe_vllm(model: Any) -> dict[str, Any]:
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


def held_bytes(module: Any) -> int:
    """Bytes of all parameters and buffers of a module."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def plan_names(plan: Sequence[int]) -> dict[str, str]:
    """The kernel of each batch bucket that was measured, by the bucket's largest batch."""
    from ..packed.dispatch import NAMES

    return {str(1 << index): NAMES[code] for index, code in enumerate(plan) if code}


def check_lengths(found: Sequence[int], tokens: int) -> None:
    """Raise RuntimeError when an engine stopped early: its time would be too good."""
    if any(count != tokens for count in found):
        raise RuntimeError(f"asked for {tokens} new tokens, got {list(found)}")


def resident_bytes() -> int:
    """What this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def answer(engine: Engine, requests: Iterable[str], out: TextIO, started: float) -> None:
    """Describe the engine, loaded since `started` (of `time.perf_counter`), then time what is asked for."""
    load_s = time.perf_counter() - started
    _say(out, {"load_s": load_s, "rss_bytes": resident_bytes(), **engine.describe()})
    for line in requests:
        request = json.loads(line)
        start, start_cpu = time.perf_counter(), time.process_time()
        engine.generate(request["prompts"], request["tokens"])
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        _say(out, {"s": seconds, "cpu_s": cpu_seconds, "rss_bytes": resident_bytes()})


def _say(out: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=out, flush=True)


def main() -> None:
    """Load the engine named on the command line and answer until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m crepe_deploy.bench.decode_child")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    real = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(real, "w") as out:
        started = time.perf_counter()
        engine = ENGINES[options.engine](options.folder, options.max_tokens, options.compiled)
        answer(engine, sys.stdin, out, started)


if __name__ == "__main__":
    main()
