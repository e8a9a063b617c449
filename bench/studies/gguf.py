"""llama.cpp against transformers: the same tokens of a text, the same greedy words, and how far logits are apart.

    python -m crepe_deploy.bench.studies.gguf [--out bench/results/gguf.json]

SmolLM2-135M-Instruct (dequantised Q4_1) is exported with each `--quantise`; llama.cpp (`pip install
'crepe-deploy[llamacpp]'`, float32 caches) and transformers (float32, the checkpoint as it is) continue the
same prompts.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from ...exporting.formats.gguf import FILE
from ...exporting.pipeline import export_checkpoint
from ...texts import load_tokenizer
from ..assets import ensure_assets
from .frame import assets_option, machine, out_option, save

TYPES: Final = ("f32", "auto", "f16", "q8_0", "q5_0", "q4_0")
PROMPTS: Final = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a girl who",
    "def fibonacci(n):\n    ",
    "In 1969, the first man on the moon,",
    "The three primary colours are",
)
WORDS: Final = 32
Logits = npt.NDArray[np.float32]


def reference(model: Path) -> list[tuple[list[int], list[int], Logits]]:
    """Of each prompt: its ids, the greedy continuation, and the logits behind every one of both."""
    tokenizer = load_tokenizer(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
            words = list(ids)
            for _ in range(WORDS):
                words.append(int(network(torch.tensor([words])).logits[0, -1].argmax()))
            logits = network(torch.tensor([words])).logits[0].numpy()
            found.append((ids, words[len(ids) :], logits))
    return found


def llamacpp(path: Path, known: Sequence[tuple[list[int], list[int], Logits]]) -> dict[str, Any]:
    """What llama.cpp makes of the same prompts."""
    from llama_cpp import Llama

    runtime = Llama(
        str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0
    )
    same_ids, same_words, first, apart, kl = 0, 0, [], [], []
    for prompt, (ids, words, logits) in zip(PROMPTS, known, strict=True):
        same_ids += runtime.tokenize(prompt.encode(), add_bos=True, special=True) == ids
        runtime.reset()
        said: list[int] = []
        for token in runtime.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            said.append(token)
            if len(said) == WORDS:
                break
        same_words += said == words
        first.append(next((at for at, pair in enumerate(zip(said, words, strict=True)) if pair[0] != pair[1]), WORDS))
        runtime.reset()
        runtime.eval([*ids, *words])
        scores = np.array(runtime.scores[: len(ids) + WORDS])
        apart.append(float(np.abs(scores - logits).max() / np.abs(logits).max()))
        kl.append(_kl(logits, scores))
    return {
        "prompts_with_the_same_ids": same_ids,
        f"prompts_with_the_same_{WORDS}_greedy_tokens": same_words,
        "greedy_tokens_before_the_first_that_differs": first,
        "max_logit_difference_over_largest_logit": max(apart),
        "mean_kl_nats": sum(kl) / len(kl),
    }


def _kl(expected: Logits, found: Logits) -> float:
    log = [torch.log_softmax(torch.from_numpy(each).double(), -1) for each in (expected, found)]
    return float((log[0].exp() * (log[0] - log[1])).sum(-1).mean())


@click.command()
@assets_option
@out_option("bench/results/gguf.json")
def main(assets_dir: Path, out: Path | None) -> None:
    """Export, load and compare."""
    model = ensure_assets(assets_dir).model
    known = reference(model)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in TYPES:
            target = Path(folder) / name
            manifest = export_checkpoint(model, target, "gguf", options={"quantise": name})
            record = manifest.metrics["gguf"]
            rows[name] = {
                "types": record["types"],
                "file_bytes": (target / FILE).stat().st_size,
                "export_parity": record["parity"],
                **llamacpp(target / FILE, known),
            }
    conditions = {
        **machine(),
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
        "gguf": importlib.metadata.version("gguf"),
        "model": "SmolLM2-135M-Instruct, dequantised Q4_1, bfloat16",
        "reference": "transformers, float32",
        "llama.cpp": "CPU, one thread, caches in float32, no flash attention",
        "prompts": list(PROMPTS),
    }
    save({"conditions": conditions, "quantise": rows}, out)


if __name__ == "__main__":
    main()
