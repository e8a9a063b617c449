"""Where the heads and the neurons of a family's layers are: what structural pruning has to know of it. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Rows of a matrix: of "q" head_dim for each query head, of "k" and "v" for each KV head, of the others one a neuron.
Part = Literal["q", "k", "v", "gate", "up"]


@dataclass(frozen=True, eq=False)
class Projections:
    """The matrices of a decoder layer by module path within it.

    rows: of the modules that read the residual stream, the parts that their rows are made of, one after another.
    output, down: the modules whose columns are the query heads' features, and the neurons.
    """

    rows: Mapping[str, tuple[Part, ...]]
    output: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module, in the order in which a layer calls them."""
        attention = [path for path, parts in self.rows.items() if "q" in parts or "k" in parts or "v" in parts]
        ffn = [path for path in self.rows if path not in attention]
        return (*attention, self.output, *ffn, self.down)


SEPARATE = Projections({
    "self_attn.q_proj": ("q",), "self_attn.k_proj": ("k",), "self_attn.v_proj": ("v",),
    "mlp.gate_proj": ("gate",), "mlp.up_proj": ("up",),
})  # fmt: skip
FUSED = Projections({"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")})


@dataclass(frozen=True)
class Structure:
    """A family whose heads and neurons can be pruned away.

    qkv_bias, mlp_bias: whether q, k and v, gate and up have biases, or the configuration's key that says so.
    attention_reads: what the attention module of transformers reads of its widths while it runs: its attributes,
    "config" for the head count in it.

    Which equal widths an ordinary configuration holds. heads_divide: transformers wants a head count that divides the
    hidden size. derives_head_dim: vLLM's class takes hidden size / heads for the head size. sized_rotary: transformers
    compares the length of rotary factors with hidden size / heads. sibling: the family that computes the same where
    this one does not fit.

    deci_lacks: what the DeciLM layout has no place for.
    """

    projections: Projections = SEPARATE
    qkv_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    attention_reads: tuple[str, ...] = ("num_key_value_groups",)
    heads_divide: bool = False
    derives_head_dim: bool = False
    sized_rotary: bool = False
    sibling: str = ""
    deci_lacks: str = ""

    def has_qkv_bias(self, config: object) -> bool:
        """Whether q, k and v have biases in a model of this transformers configuration."""
        return _says(config, self.qkv_bias)

    def has_mlp_bias(self, config: object) -> bool:
        """The same for gate and up."""
        return _says(config, self.mlp_bias)


def _says(config: object, key: bool | str) -> bool:
    return key if isinstance(key, bool) else bool(getattr(config, key, False))
