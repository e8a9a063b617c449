"""Does the packed checkpoint say what the dense one with the same zeros says, token by token, in every reader?

    python -m crepe_deploy.bench.studies.packed_parity DENSE PACKED [--out bench/results/packed_parity-2of4.json]

DENSE and PACKED are two exports of one pruning; they may also be two layouts of a structural one, where the reader
`vllm-stock` is vLLM without crepe-deploy's plugin and with the checkpoint's own configuration file. Eight prompts are
continued greedily for 64 tokens in float32, each reader in a process of its own; the reference is transformers on
DENSE.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from ...store.files import write_json
from ...store.manifest import load_manifest
from ..run.processes import run_json
from .frame import machine, out_option, save, say

TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, there was a small village",
    "The main difference between a virus and a bacterium is",
    "In 1969, the first humans",
    "To make bread, you need",
    "def fibonacci(n):",
    "The quick brown fox",
)
STOCK = "vllm-stock"
READERS = ("transformers", "vllm", "vllm-compiled", "vllm-tp3")  # SmolLM2 has 9 heads and 3 KV heads


def transformers_tokens(folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy tokens, end-of-text included, with the gap between the two best logits at each; one left-padded batch."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache, tokens, gaps = DynamicCache(config=model.config), [], []
    with torch.inference_mode():
        for _ in range(TOKENS):
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
            best = output.logits[:, -1].topk(2)
            ids = best.indices[:, :1]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            tokens.append(ids[:, 0])
            gaps.append(best.values[:, 0] - best.values[:, 1])
    return {"tokens": torch.stack(tokens, 1).tolist(), "gaps": torch.stack(gaps, 1).tolist()}


def vllm_tokens(folder: Path, prompts: list[list[int]], reader: str) -> dict[str, Any]:
    """Greedy tokens from vLLM, all prompts in one batch."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=reader != "vllm-compiled",
        tensor_parallel_size=int(reader.removeprefix("vllm-tp")) if reader.startswith("vllm-tp") else 1,
        max_model_len=512,
        max_num_seqs=len(prompts),
        block_size=32,
        trust_remote_code=reader == STOCK,
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}


def child(reader: str, folder: Path, prompts: list[list[int]]) -> None:
    """Run one reader and print its tokens; everything else it prints goes to stderr."""
    real = os.dup(1)
    os.dup2(2, 1)
    tokens = transformers_tokens(folder, prompts) if reader == "transformers" else vllm_tokens(folder, prompts, reader)
    with os.fdopen(real, "w") as stdout:
        json.dump(tokens, stdout)


def run_reader(reader: str, folder: Path, prompts: list[list[int]]) -> Any:
    """The tokens of one reader in a fresh process, away from the working folder."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if reader == STOCK:
        settings["VLLM_PLUGINS"] = "lora_filesystem_resolver"
    code = "import sys, json; from pathlib import Path; from crepe_deploy.bench.studies.packed_parity import child"
    main = "if __name__ == '__main__': child(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))"
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "child.py"  # a file, because vLLM's processes import their parent's main module
        script.write_text(f"{code}\n{main}\n", encoding="utf-8")
        command = [sys.executable, str(script), reader, str(folder.resolve()), json.dumps(prompts)]
        return run_json(command, env=settings).output


def agreement(reference: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Prompts that agree in every token, and for the others where they part and how close the choice was there."""
    parts = []
    for index, (expected, got) in enumerate(zip(reference["tokens"], answer["tokens"], strict=True)):
        if expected != got:
            place = next(i for i, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1])
            parts.append({"prompt": index, "token": place, "logit_gap": reference["gaps"][index][place]})
    return {"equal_prompts": len(reference["tokens"]) - len(parts), "prompts": len(PROMPTS), "differences": parts}


@click.command()
@click.argument("dense", type=click.Path(path_type=Path, exists=True))
@click.argument("packed", type=click.Path(path_type=Path, exists=True))
@click.option("--readers", default=",".join(READERS), show_default=True)
@out_option()
def main(dense: Path, packed: Path, readers: str, out: Path | None) -> None:
    """Compare greedy tokens of PACKED in every reader with those of DENSE."""
    from ...texts import load_tokenizer

    tokenizer = load_tokenizer(dense)
    prompts = [[int(token) for token in tokenizer(text)["input_ids"]] for text in PROMPTS]
    reference = run_reader("transformers", dense, prompts)
    report = describe(packed)
    for reader in readers.split(","):
        start = time.perf_counter()
        result = agreement(reference, run_reader(reader, packed, prompts))
        report["readers"][reader] = {**result, "seconds_with_start": round(time.perf_counter() - start, 1)}
        say(f"{reader}: {result}")
        if out is not None:  # vLLM takes minutes: what one reader said is kept
            write_json(out, report)
    save(report, out)


def describe(packed: Path) -> dict[str, Any]:
    """What is compared, and where."""
    manifest = load_manifest(packed)
    return {
        "command": "python -m crepe_deploy.bench.studies.packed_parity DENSE PACKED",
        "model": Path(manifest.source.id).name,
        "pattern": manifest.config["pattern"],
        "method": manifest.config.get("resolved_method", manifest.config["method"]),
        "size": manifest.metrics["size"],
        "what": f"{TOKENS} greedy tokens in float32 against transformers on the dense export",
        "machine": machine(),
        "readers": {},
    }


if __name__ == "__main__":
    main()
