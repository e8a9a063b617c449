"""GGUF files of the pico model, written by gguf's own writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from tests.pico import pico_tokenizer


def write_gguf(
    path: Path,
    model_dir: Path,
    parts: int = 1,
    rename: Callable[[str], str | None] = str,
    rope: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    template: str = "{% for m in messages %}{{ m['content'] }}{% endfor %}",
) -> Path:
    """A llama GGUF of the pico model: matrices in Q8_0, norms in float32, tokenizer and template inside.

    parts: files that it is split into, as gguf's own writer splits; the first one's path is returned. rename: a
    tensor's name to what is written instead, None to leave it out.
    rope: writes how the rotary embeddings are stretched, and whatever else. template: of chats.
    """
    tensors = load_file(model_dir / "model.safetensors")
    config = json.loads((model_dir / "config.json").read_text())
    per_part = -(-len(tensors) // parts)
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=per_part if parts > 1 else 0)
    writer.add_name("Pico")
    writer.add_license("mit")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    rope(writer)
    _write_tokenizer(writer, template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        projection = name.split(".")[-2]
        array = _interleave(tensor, heads[projection]) if projection in heads else tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array, dtype=np.float32), kind)
        written = rename(names.get_name(name, try_suffixes=(".weight",)))
        if written is not None:
            writer.add_tensor(written, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def _interleave(weight: torch.Tensor, heads: int) -> np.ndarray:
    out, columns = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, columns).swapaxes(1, 2).reshape(out, columns).numpy()


def _write_tokenizer(writer: gguf.GGUFWriter, template: str) -> None:
    tokenizer = pico_tokenizer()
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(template)
