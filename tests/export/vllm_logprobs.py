"""Run in its own process: `vllm_logprobs.py FOLDER PROMPTS_JSON` prints the prompt tokens' log-probabilities, bf16."""

from __future__ import annotations

import json
import os
import sys

DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, prompts = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(folder, enforce_eager=True, max_model_len=256, max_num_seqs=8, block_size=32, dtype="bfloat16")
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    found = [
        [rows[token].logprob for rows, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        for output, prompt in zip(outputs, prompts, strict=True)
    ]
    print("\nLOGPROBS", json.dumps(found), flush=True)


if __name__ == "__main__":
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    main()
