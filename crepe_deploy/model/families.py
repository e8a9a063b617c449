"""The families of decoders: all that is known of a model type and cannot be seen in its modules, in one table.

A new family is one entry of `FAMILIES`. A model type that has none can still be pruned: its blocks and linear layers
are found by structure. What it cannot do for want of an entry is refused, or recorded. Data only: imports neither
torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from .experts import CORRECTED, GPT_OSS, MIXTRAL, QWEN, Experts
from .structure import FUSED, Structure


@dataclass(frozen=True)
class Residual:
    """A layer whose output is added to the residual stream; paths are within the block.

    stream: the module that reads the stream just before the addition; "" is the block itself.
    beside: parts whose outputs are added in the same sum, and before this layer is pruned.
    norm: an RMS norm that the output of the layer's part passes before the addition.
    when: (field, value) of the configuration, where it depends on that.
    """

    path: str
    stream: str
    beside: tuple[str, ...] = ()
    norm: str = ""
    when: tuple[str, bool] | None = None

    def holds(self, config: Any) -> bool:
        """Whether models of this configuration have it."""
        return self.when is None or getattr(config, self.when[0]) == self.when[1]


@dataclass(frozen=True)
class Fold:
    """A layer whose inputs may come in any order, for the rows of its `producers` can follow; paths are in the block.

    kind: "neurons", any order; a fused producer holds them several times over. "values", the value channels of
    attention heads, which stay within their head and have one order for all query heads that share a KV head: the
    producer's rows are all values ("values"), its last ones are, behind those of queries and keys ("values last"), or
    each head has its own queries, keys and values ("values in heads").
    """

    path: str
    producers: tuple[str, ...]
    kind: Literal["neurons", "values", "values last", "values in heads"] = "neurons"


@dataclass(frozen=True)
class Family:
    """What is known of a model type.

    renamed: prefixes of parameter names in the module tree -> what checkpoints write instead.
    residuals: what `--feed both` corrects for the stream's loss. folds: what `--permute fold` reorders.
    last_norm: the norm between the last block and the output layer, which `--rescale` scales.
    gain_added: what the norms add to their stored gain. bos: computes nonsense without BOS before every sequence.
    structural: where its heads and neurons are and which smaller models there are, for `tyr`.
    experts: where its blocks keep experts, for `experts` and `prune`; all else refuses such a family.
    per_layer_of: the family that this one is with widths of their own for its layers.
    onnx: flavours in which it can be exported. lacks: capability -> the reason why it is not given.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    residuals: tuple[Residual, ...] = ()
    folds: tuple[Fold, ...] = ()
    last_norm: str = ""
    gain_added: float = 0.0
    bos: bool = False
    structural: Structure | None = None
    experts: Experts | None = None
    per_layer_of: str = ""
    onnx: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)


def family_of(model_type: str) -> Family:
    """The entry of a model type; an empty one where it has none."""
    return FAMILIES.get(model_type, Family())


def covered() -> list[str]:
    """The model types whose pruning, reloading and steps the tests cover."""
    return [name for name, family in FAMILIES.items() if family.last_norm]


def known(capability: str) -> str:
    """The model types that have a capability, a field of `Family`, for a message."""
    return ", ".join(name for name, family in FAMILIES.items() if getattr(family, capability))


_GATED: Final = Fold("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"))
_HEADS: Final = Fold("self_attn.o_proj", ("self_attn.v_proj",), "values")
_LLAMA: Final = Family(
    residuals=(Residual("self_attn.o_proj", ""), Residual("mlp.down_proj", "post_attention_layernorm")),
    folds=(_GATED, _HEADS),
    last_norm="model.norm",
    structural=Structure(mlp_bias="mlp_bias", heads_divide=True, sibling="mistral"),
    onnx=("portable", "genai"),
)
_GEMMA2: Final = Family(
    residuals=(
        Residual("self_attn.o_proj", "", norm="post_attention_layernorm"),
        Residual("mlp.down_proj", "pre_feedforward_layernorm", norm="post_feedforward_layernorm"),
    ),
    folds=(_GATED, _HEADS),
    last_norm="model.norm",
    gain_added=1.0,
    bos=True,
    structural=Structure(heads_divide=True, deci_lacks="norms behind attention and FFN and no soft caps"),
)
_STOCK: Final = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, structural=Structure()),
    "qwen2": replace(_LLAMA, structural=Structure(qkv_bias=True, derives_head_dim=True, sibling="llama")),
    "qwen3": replace(_LLAMA, structural=Structure(deci_lacks="norms of queries and keys")),
    "gemma": replace(_LLAMA, gain_added=1.0, bos=True, structural=None, onnx=()),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        structural=Structure(heads_divide=True, deci_lacks="norms behind attention and FFN"),
        onnx=("portable",),
        lacks={"onnx genai": "onnxruntime-genai's builder does not read its two rotary embeddings"},
    ),
    "phi3": Family(
        residuals=_LLAMA.residuals,
        folds=(
            Fold("mlp.down_proj", ("mlp.gate_up_proj",)),
            Fold("self_attn.o_proj", ("self_attn.qkv_proj",), "values last"),
        ),
        last_norm="model.norm",
        structural=Structure(
            FUSED,
            qkv_bias=False,
            attention_reads=("num_key_value_groups", "num_key_value_heads", "config"),
            sized_rotary=True,
            deci_lacks="fused matrices",
        ),
    ),
    "opt": Family(
        residuals=(
            Residual("self_attn.out_proj", ""),
            Residual("fc2", "final_layer_norm", when=("do_layer_norm_before", True)),
            Residual("fc2", "fc1", when=("do_layer_norm_before", False)),  # of 350M, whose norms follow the additions
        ),
        folds=(Fold("fc2", ("fc1",)), Fold("self_attn.out_proj", ("self_attn.v_proj",), "values")),
        last_norm="model.decoder.final_layer_norm",
    ),
    "gpt_neox": Family(
        renamed={"lm_head.": "embed_out."},
        residuals=(
            Residual("attention.dense", ""),
            Residual("mlp.dense_4h_to_h", "", beside=("attention",), when=("use_parallel_residual", True)),
            Residual("mlp.dense_4h_to_h", "post_attention_layernorm", when=("use_parallel_residual", False)),
        ),
        folds=(
            Fold("mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",)),
            Fold("attention.dense", ("attention.query_key_value",), "values in heads"),
        ),
        last_norm="gpt_neox.final_layer_norm",
    ),
    "gpt2": Family(
        residuals=(Residual("attn.c_proj", ""), Residual("mlp.c_proj", "ln_2")),
        folds=(Fold("mlp.c_proj", ("mlp.c_fc",)), Fold("attn.c_proj", ("attn.c_attn",), "values last")),
        last_norm="transformer.ln_f",
    ),
    "mixtral": Family(experts=MIXTRAL),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), Family(experts=QWEN)),
    **dict.fromkeys(("glm4_moe", "deepseek_v3"), Family(experts=CORRECTED)),
    "gpt_oss": Family(experts=GPT_OSS),
    # Known, and tested, for nothing but their need of BOS.
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "recurrent_gemma", "vaultgemma"), Family(bos=True)),
}


def _with_widths(name: str, family: Family) -> Family:
    """The same family with widths of their own for its layers."""
    own = {"onnx genai": "onnxruntime-genai's builder gives all layers one width"} if family.onnx else {}
    return replace(
        family,
        structural=None,
        per_layer_of=name,
        onnx=tuple(flavor for flavor in family.onnx if flavor != "genai"),
        lacks={**family.lacks, **own},
    )


FAMILIES: dict[str, Family] = _STOCK | {
    f"crepe_{name}": _with_widths(name, family) for name, family in _STOCK.items() if family.structural
}
