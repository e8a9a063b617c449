"""llm-compressor's SparseGPT, a peer to compare with. It runs in an environment of its own and knows nothing of ours:

    python3 -m venv PEER && PEER/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    PEER/bin/python bench/studies/peers/llm_compressor.py MODEL TOKENS.npy OUT 2:4

TOKENS: int64 (samples, length), the calibration windows. `bench.quality_grid --peer PEER/bin/python` calls it.
"""

import sys

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM


def main(model_dir: str, tokens_path: str, out: str, pattern: str) -> None:
    """Prune the model in `model_dir` to N:M (N kept of M) and write it to `out`."""
    kept, group = (int(part) for part in pattern.split(":"))
    tokens = np.load(tokens_path)
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    zeros = group - kept  # its N counts what is pruned
    recipe = SparseGPTModifier(
        sparsity=zeros / group, mask_structure=f"{zeros}:{group}", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    oneshot(
        model=model, dataset=rows, recipe=recipe, max_seq_length=tokens.shape[1], num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
