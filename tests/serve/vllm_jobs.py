"""Run in a process of its own, it does several jobs one after the other: starting vLLM costs more than any of them.

vllm_jobs.py JOBS_JSON, a list of objects with a `name` and one of

    generate: FOLDER   greedy token ids after each of `prompts`, `count` of them, on `tensor_parallel` ranks,
                       with `trust_remote_code`
    refuse: FOLDER     the error that making the model's configuration ends with; null where there is none
    script: FILE       run it; an error is a failure

Each prints one line, RESULT {"name": ..., "value": ...}; the first that fails ends the process.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from typing import Any

DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def generate(job: dict[str, Any]) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["generate"],
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        block_size=32,
        tensor_parallel_size=job.get("tensor_parallel", 1),
        dtype="float32",
        trust_remote_code=job.get("trust_remote_code", False),
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return tokens


def refuse(job: dict[str, Any]) -> str | None:
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(model=job["refuse"], dtype="float32").create_model_config()
    except ValueError as error:
        return str(error)
    return None


def run_script(job: dict[str, Any]) -> bool:
    runpy.run_path(job["script"])
    return True


def main() -> None:
    kinds = {"generate": generate, "refuse": refuse, "script": run_script}
    for job in json.loads(sys.argv[1]):
        (kind,) = kinds.keys() & job.keys()
        print("\nRESULT", json.dumps({"name": job["name"], "value": kinds[kind](job)}), flush=True)


if __name__ == "__main__":
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    main()
