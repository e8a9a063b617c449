"""Tiny random checkpoints of every causal class that the installed transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.pico import VOCAB, pico_tokenizer

TYPES: Final = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_SIZES: Final[dict[int, str]] = {
    64: "hidden_size d_model n_embd embed_dim emb_dim hidden_dim attention_hidden_size embedding_size "
    "lru_width word_embed_proj_dim embedding_dim hidden_size_per_layer_input linear_key_dim",
    128: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner dim_ff n_inner ffn_hidden_size dff "
    "max_position_embeddings n_positions n_ctx seq_length max_seq_len max_sequence_length max_target_positions "
    "max_source_positions intermediate_size_mlp feed_forward_size block_ff_dim dense_intermediate_size "
    "mamba_d_ssm prefix_hidden_dim initial_context_length original_max_position_embeddings cross_layer_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok "
    "moe_k moe_topk num_experts_per_token n_group_heads mamba_n_groups n_groups num_local_experts_per_tok "
    "num_codebooks",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts num_linear_heads linear_num_value_heads "
    "linear_num_key_heads cross_num_attention_heads num_mem_heads",
    16: "head_dim d_kv attention_head_dim v_head_dim swa_head_dim global_head_dim linear_key_head_dim "
    "linear_value_head_dim kv_lora_rank mamba_d_state state_size ssm_state_size dim_head kv_channels "
    "attention_head_size",
    32: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank mamba_d_head mamba_head_dim "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_intermediate_size dim_cond "
    "block_multiple_of sliding_window attention_window_size local_attention_window",
    8: "qk_rope_head_dim qk_nope_head_dim time_step_rank mamba_dt_rank mamba_chunk_size chunk_size index_head_dim",
    1: "n_shared_experts num_shared_experts first_k_dense_replace moe_layer_start_index n_group topk_group "
    "eos_token_id pad_token_id",
    0: "bos_token_id decoder_start_token_id",
    VOCAB: "vocab_size n_vocab n_words vocab_size_per_layer_input",
}  # fmt: skip
SIZES: Final = {name: size for size, names in _SIZES.items() for name in names.split()}
_PATTERNS: Final = ("layer_types", "layers_block_type", "block_types")  # one word for each layer
_ENCODERS: Final = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
_INDEXER: Final = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 2, "num_hidden_layers": 2, "layer_types": ["linear_attention", "indexed_attention"],
}  # fmt: skip
_ASSISTANT: Final = {"model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
                     "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}  # fmt: skip
_BLT: Final = {"hidden_size": 64, "hidden_size_global": 64, "intermediate_size": 128, "num_hidden_layers": 2,
               "num_attention_heads": 4}  # fmt: skip
# What the sizes above leave inconsistent, by type.
_OWN: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16, "attention_hidden_size": 128, "attention_head_dim": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
    },
    "gptj": {"rotary_dim": 8}, "codegen": {"rotary_dim": 8}, "youtu": {"head_dim": 8},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
                     "num_hidden_layers": 4},
    "gemma4_assistant": {"text_config": _ASSISTANT}, "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": {"hidden_size": 64, "head_dim": 16, "vocab_size": VOCAB, **_INDEXER}},
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "hidden_size_global": 64, "encoder_config": _BLT, "decoder_config": _BLT,
        "global_config": _BLT, "patcher_config": _BLT,
    },
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "musicgen": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"},
        "decoder": {"model_type": "musicgen_decoder", "hidden_size": 64}},
    "musicgen_melody": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"},
        "decoder": {"model_type": "musicgen_melody_decoder", "hidden_size": 64}},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 2, "hash_seed": 0,
    },
    "zaya": {"num_experts_per_tok": 1},
    **{name: {"is_decoder": True} for name in _ENCODERS},
}  # fmt: skip


def tiny_config(model_type: str) -> PretrainedConfig:
    """A few layers, every kind that the type has among them, hidden 64, four heads, the pico vocabulary."""
    default = AutoConfig.for_model(model_type).to_dict() if "text_encoder" not in _OWN.get(model_type, {}) else {}
    return AutoConfig.for_model(model_type, **{**_tiny(model_type, default), **_OWN.get(model_type, {})})


def _tiny(name: str, default: dict[str, Any]) -> dict[str, Any]:
    chosen = {key: SIZES[key] for key in default if key in SIZES}
    for key in _PATTERNS:
        kinds = default.get(key)
        if kinds:
            count = max(2, 1 + max(kinds.index(kind) for kind in kinds))
            chosen |= {key: kinds[:count], "num_hidden_layers": count}
    for key, value in default.items():
        if key.endswith("_config") and isinstance(value, dict) and "model_type" in value:
            chosen[key] = {"model_type": value["model_type"], **_tiny(name, value)}
    return chosen


def make(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random checkpoint of this type with the pico tokenizer into `folder`.

    Of a model that transformers cannot build here (parts of it need other packages) the configuration alone.
    """
    config = tiny_config(model_type)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            with torch.no_grad():
                _uneven(model)
        model.save_pretrained(str(folder))
    except (ImportError, AttributeError):
        config.save_pretrained(str(folder))
        save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    pico_tokenizer().save_pretrained(str(folder))
    return folder


def _uneven(model: torch.nn.Module) -> None:
    """Weights of a size to matter, and vectors that are not all ones and zeros."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += torch.rand_like(parameter) * 0.2
        elif parameter.std() < 1e-3:
            parameter.normal_(std=0.1)
        elif parameter.std() < 0.1:
            parameter *= 0.1 / parameter.std()
