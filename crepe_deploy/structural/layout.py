"""`config.json` of a structurally pruned checkpoint, and the shapes that it promises: pure functions of dictionaries.

Three layouts hold the same sliced tensors:

uniform    every layer has the same widths: an ordinary configuration of an ordinary family, for any server.
per-layer  model type `crepe_FAMILY`: the source's configuration, and `per_layer_config` with what each layer keeps.
deci       DeciLM (`nemotron-nas`), which stock vLLM serves: `block_configs`. Its query head count is one for all
           layers, and KV heads must divide it, so narrower layers are padded with heads of zeros.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from crepe_deploy.errors import CheckpointError, ConfigError, UnsupportedModel
from crepe_deploy.limits import MOST
from crepe_deploy.model.families import FAMILIES, family_of, known
from crepe_deploy.model.structure import SEPARATE, Part, Projections, Structure

PREFIX: Final = "crepe_"
DECI_TYPE: Final = "nemotron-nas"
DECI_CLASS: Final = "DeciLMForCausalLM"
PER_LAYER_CLASSES: Final = {
    name: f"Crepe{family.per_layer_of.title().replace('_', '')}ForCausalLM"
    for name, family in FAMILIES.items()
    if family.per_layer_of
}
_NAMES: Final = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "intermediate": "intermediate_size"}
_MOST_LAYERS: Final = 10_000
_WINDOW_KEYS: Final = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
Content = dict[str, Any]


class Widths(NamedTuple):
    """Query heads, KV heads and FFN neurons of one layer."""

    heads: int
    kv_heads: int
    intermediate: int

    def __str__(self) -> str:
        return f"{self.heads} query heads, {self.kv_heads} KV heads, {self.intermediate} neurons"


def structure_of(model_type: str) -> Structure:
    """Where the heads and neurons of a family are, when they can be pruned. Raises UnsupportedModel naming it."""
    structure = family_of(model_type).structural
    if structure is None:
        raise UnsupportedModel(
            f"model type '{model_type}': structural pruning knows {known('structural')}; prune it to an N:M pattern "
            "instead"
        )
    return structure


def check_family(content: Mapping[str, Any]) -> str:
    """The model type, when its structure can be pruned. Raises UnsupportedModel naming it."""
    name = str(content.get("model_type", "unknown"))
    structure_of(name)
    return name


def uniform_content(content: Mapping[str, Any], head_dim: int, widths: Sequence[Widths]) -> Content:
    """The configuration of a model whose layers all have the same widths. Raises ConfigError where they have not.

    Where a family's stock classes derive the head size from the head count, its sibling that computes the same is
    written: for Llama with a head count that does not divide the hidden size (transformers refuses it) Mistral without
    a window; for Qwen2 with fewer heads (vLLM derives its head size) Llama with biases, whose o_proj biases are zeros.
    Raises ConfigError where no stock family fits.
    """
    structure, first = structure_of(check_family(content)), widths[0]
    for index, layer in enumerate(widths):
        if layer != first:
            raise ConfigError(f"--widths uniform: layer {index} keeps {layer}; layer 0 keeps {first}")
    sized = {**content, "head_dim": head_dim, **{_NAMES[name]: value for name, value in first._asdict().items()}}
    divides = sized["hidden_size"] % first.heads == 0
    wrong_size = structure.derives_head_dim and first.heads * head_dim != sized["hidden_size"]
    if wrong_size or (structure.heads_divide and not divides):
        if not structure.sibling:
            raise ConfigError(
                f"--widths uniform: transformers wants of {content['model_type']} a head count that divides hidden "
                f"size {sized['hidden_size']}, and {first.heads} does not: use --widths per-layer"
            )
        return SIBLINGS[structure.sibling](sized, divides)
    if structure.sized_rotary:
        _check_rotary(sized)
    return sized


def _as_llama(content: Content, divides: bool) -> Content:
    """Qwen2 as Llama. divides: whether the head count divides the hidden size."""
    if content.get("use_sliding_window") or not divides:
        heads, hidden = content["num_attention_heads"], content["hidden_size"]
        why = "a sliding window" if divides else f"{heads} heads, which do not divide hidden size {hidden},"
        raise ConfigError(f"--widths uniform: no stock family serves Qwen2 with {why}: use --widths per-layer")
    kept = {name: value for name, value in content.items() if name not in _WINDOW_KEYS}
    tokens = {name: content.get(name) for name in ("bos_token_id", "eos_token_id")}
    return {
        **kept, **tokens, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True,
        "mlp_bias": False,
    }  # fmt: skip


def _as_mistral(content: Content, divides: bool) -> Content:
    """Llama as Mistral, which holds any head count but no biases."""
    if content.get("attention_bias") or content.get("mlp_bias"):
        raise ConfigError(
            f"--widths uniform: no stock family serves {content['num_attention_heads']} heads with biases at hidden "
            f"size {content['hidden_size']}, which they do not divide: use --widths per-layer"
        )
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp")
    kept = {name: value for name, value in content.items() if name not in dropped}
    return {**kept, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


SIBLINGS: Final = {"llama": _as_llama, "mistral": _as_mistral}


def _check_rotary(content: Content) -> None:
    """Refuse rotary factors whose number transformers would find wrong: it derives the head size to compare them."""
    rotary = content.get("rope_parameters") or content.get("rope_scaling") or {}
    factors = rotary.get("short_factor")
    share = rotary.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0))
    heads, hidden = content["num_attention_heads"], content["hidden_size"]
    if factors is not None and len(factors) != int(hidden // heads * share) // 2:
        raise ConfigError(
            f"--widths uniform: with {len(factors)} rotary factors transformers wants of {content['model_type']} a "
            f"head size of hidden size / heads, and {hidden} / {heads} is another: use --widths per-layer"
        )


def has_zero_o_bias(source: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    """Whether the layout asks for o_proj biases that the source does not have."""
    return source.get("model_type") == "qwen2" and content.get("model_type") == "llama"


def per_layer_content(
    content: Mapping[str, Any], head_dim: int, widths: Sequence[Widths], kv_heads: int, *, remote_code: bool = False
) -> Content:
    """The configuration for per-layer widths: the source's own numbers, and what differs from them layer by layer.

    kv_heads: of the source. remote_code: name the modelling files that lie beside the weights.
    """
    name = PREFIX + check_family(content)
    for wanted in ("num_attention_heads", "intermediate_size"):
        if wanted not in content:
            raise CheckpointError(f"config.json does not say {wanted}, which per-layer widths differ from")
    whole = Widths(content["num_attention_heads"], kv_heads, content["intermediate_size"])
    digits = len(str(len(widths) - 1))
    differing = {
        str(index).zfill(digits): {
            _NAMES[field]: value for field, value in layer._asdict().items() if value != getattr(whole, field)
        }
        for index, layer in enumerate(widths)
    }
    written = {
        **content,
        "model_type": name,
        "architectures": [PER_LAYER_CLASSES[name]],
        "head_dim": head_dim,
        "num_key_value_heads": kv_heads,
        "per_layer_config": {index: entry for index, entry in differing.items() if entry},
    }
    if remote_code:
        stem = PER_LAYER_CLASSES[name].removesuffix("ForCausalLM")
        written["auto_map"] = {
            "AutoConfig": f"configuration_crepe.{stem}Config",
            "AutoModel": f"modeling_crepe.{stem}Model",
            "AutoModelForCausalLM": f"modeling_crepe.{stem}ForCausalLM",
        }
    return written


def deci_widths(widths: Sequence[Widths]) -> list[Widths]:
    """What each layer is padded to: one query head count, KV heads that divide it, room for every kept head.

    Of the possible head counts the one with the fewest padded query and KV heads over all layers is taken.
    """
    most = max(layer.heads for layer in widths)
    # The power of two from twice `most` up always fits: no group count needs more than doubling to become one.
    candidates = range(most, 4 * most + 1)
    fitted = [padded for heads in candidates if (padded := _padded(widths, heads))]
    return min(fitted, key=lambda padded: sum(layer.heads + layer.kv_heads for layer in padded))


def _padded(widths: Sequence[Widths], heads: int) -> list[Widths] | None:
    """`widths` padded to `heads` query heads each; None where a layer's groups do not fit."""
    padded = []
    for layer in widths:
        queries = layer.heads // layer.kv_heads
        fits = (count for count in range(layer.kv_heads, heads // queries + 1) if heads % count == 0)
        kv_heads = next(fits, None)
        if kv_heads is None:
            return None
        padded.append(Widths(heads, kv_heads, layer.intermediate))
    return padded


def deci_content(content: Mapping[str, Any], head_dim: int, padded: Sequence[Widths]) -> Content:
    """The DeciLM configuration of layers padded by `deci_widths`. Raises UnsupportedModel for what DeciLM has not."""
    family = check_family(content)
    structure = structure_of(family)
    if structure.deci_lacks:
        raise UnsupportedModel(
            f"the DeciLM layout has no {structure.deci_lacks}, which {family} needs: use the plugin layout"
        )
    if (family == "mistral" and content.get("sliding_window") is not None) or content.get("use_sliding_window"):
        raise UnsupportedModel("the DeciLM layout has no sliding window, which this model has: use the plugin layout")
    dropped = ("num_key_value_heads", "intermediate_size", *_WINDOW_KEYS)
    kept = {name: value for name, value in content.items() if name not in dropped}
    blocks = [
        {
            "attention": {"no_op": False, "n_heads_in_group": layer.heads // layer.kv_heads},
            "ffn": {"no_op": False, "intermediate_size": layer.intermediate},
        }
        for layer in padded
    ]
    return {
        **kept,
        **({"qkv_bias": True} if structure.qkv_bias is True else {}),
        "model_type": DECI_TYPE,
        "architectures": [DECI_CLASS],
        "head_dim": head_dim,
        "num_attention_heads": padded[0].heads,
        "block_configs": blocks,
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    }


def layer_widths(content: Mapping[str, Any]) -> list[Widths]:
    """The widths of every layer that a `config.json` of any layout states. Raises CheckpointError for a wrong one."""
    try:
        if content.get("model_type") == DECI_TYPE:
            heads = _whole(content["num_attention_heads"])
            return [
                Widths(
                    heads,
                    heads // _whole(block["attention"]["n_heads_in_group"]),
                    _whole(block["ffn"]["intermediate_size"]),
                )
                for block in content["block_configs"]
            ]
        heads = content["num_attention_heads"]
        whole = {
            "num_attention_heads": heads,
            "num_key_value_heads": content.get("num_key_value_heads") or heads,
            "intermediate_size": content["intermediate_size"],
        }
        entries = {int(index): entry for index, entry in (content.get("per_layer_config") or {}).items()}
        layers = range(_whole(content["num_hidden_layers"], most=_MOST_LAYERS))
        if any(index not in layers for index in entries):
            raise CheckpointError(f"config.json: per_layer_config names layer {max(entries)} of {len(layers)}")
        merged = [{**whole, **entries.get(index, {})} for index in layers]
        return [Widths(*(_whole(layer[name]) for name in _NAMES.values())) for layer in merged]
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json does not state the widths of its layers: {error!r}") from error


def _whole(value: Any, most: int = MOST) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r:.60} is no number from 0 to {most}")
    return value


def layer_shapes(content: Mapping[str, Any]) -> list[dict[str, tuple[int, int]]]:
    """For every layer the shapes of its matrices, by name within the layer. Raises CheckpointError."""
    try:
        hidden = _whole(content["hidden_size"])
        size = _whole(content.get("head_dim") or hidden // _whole(content["num_attention_heads"]))
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json does not state the size of its heads: {error!r}") from error
    projections = written_projections(content)
    return [_shapes(projections, hidden, size, layer) for layer in layer_widths(content)]


def written_projections(content: Mapping[str, Any]) -> Projections:
    """The matrices of a layer in a checkpoint of any layout. Raises CheckpointError for another model type."""
    name = str(content.get("model_type"))
    if name == DECI_TYPE:
        return SEPARATE
    structure = family_of(family_of(name).per_layer_of or name).structural
    if structure is None:
        raise CheckpointError(f"config.json: model type '{name}' is none that structural pruning writes")
    return structure.projections


def part_rows(layer: Widths, head_dim: int) -> dict[Part, int]:
    """How many rows each part has in a layer of these widths."""
    queries, keys, neurons = layer.heads * head_dim, layer.kv_heads * head_dim, layer.intermediate
    return {"q": queries, "k": keys, "v": keys, "gate": neurons, "up": neurons}


def _shapes(projections: Projections, hidden: int, head_dim: int, layer: Widths) -> dict[str, tuple[int, int]]:
    rows = part_rows(layer, head_dim)
    shapes = {path: (sum(rows[part] for part in parts), hidden) for path, parts in projections.rows.items()}
    shapes |= {projections.output: (hidden, rows["q"]), projections.down: (hidden, rows["up"])}
    return {f"{path}.weight": shapes[path] for path in projections.paths}


def is_per_layer(content: Mapping[str, Any]) -> bool:
    """Whether layers may have widths of their own."""
    return str(content.get("model_type", "")) in {*PER_LAYER_CLASSES, DECI_TYPE}
