"""Run in its own process, it prints greedy token ids as JSON:

vllm_generate.py FOLDER TENSOR_PARALLEL PROMPTS_JSON [COUNT [--trust-remote-code]]
"""

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

    folder, tensor_parallel, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 24
    llm = LLM(
        folder,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        block_size=32,
        tensor_parallel_size=tensor_parallel,
        dtype="float32",
        trust_remote_code="--trust-remote-code" in sys.argv,
    )
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    print("\nTOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    main()
