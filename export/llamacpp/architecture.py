"""A model as llama.cpp names it, its sizes and its tensors. What llama.cpp would compute differently is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...errors import UnsupportedModel
from ...model.architecture import content_with_sizes, load_config
from ...model.decoder import Decoder
from ...store.gguf_rope import LLAMA3, llama3_factor
from ...structural.layout import is_per_layer, layer_widths

Field = bool | int | float | str | list[Any]
ROPE_FREQS: Final = "rope_freqs.weight"
_YARN: Final = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # what llama.cpp computes with


@dataclass(frozen=True)
class Kind:
    """A model type. name: llama.cpp's. interleaved: it wants the two halves of each query and key head interleaved."""

    name: str
    interleaved: bool = False


KINDS: Final = {
    "llama": Kind("llama", interleaved=True),
    "mistral": Kind("llama", interleaved=True),
    "qwen2": Kind("qwen2"),
    "qwen3": Kind("qwen3"),
    "crepe_llama": Kind("deci", interleaved=True),
    "crepe_mistral": Kind("deci", interleaved=True),
}


@dataclass(frozen=True)
class Architecture:
    """kind: as llama.cpp has it. fields: its sizes, by key. extra: tensors that no checkpoint holds. limits: what is
    true of the file and not of the checkpoint."""

    kind: Kind
    fields: Mapping[str, Field]
    extra: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. key: of the checkpoint. heads: whose halves are interleaved; 0 where the rows stay."""

    name: str
    key: str
    shape: tuple[int, ...]
    heads: int = 0

    def to_file(self, tensor: Tensor) -> Tensor:
        """The tensor of the checkpoint as the file holds it."""
        return _swapped(tensor, self.heads, 2) if self.heads else tensor

    def from_file(self, tensor: Tensor) -> Tensor:
        """The opposite of `to_file`."""
        return _swapped(tensor, self.heads, tensor.shape[0] // self.heads // 2) if self.heads else tensor


def _swapped(tensor: Tensor, heads: int, parts: int) -> Tensor:
    return tensor.reshape(heads, parts, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def architecture_of(folder: Path) -> Architecture:
    """From `config.json` alone. Raises UnsupportedModel naming what llama.cpp cannot hold, CheckpointError."""
    config = load_config(folder)
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise UnsupportedModel(
            f"model type '{config.model_type}' is not written as GGUF; known: {', '.join(KINDS)}. llama.cpp's own "
            "convert_hf_to_gguf.py may read the folder of --format dense"
        )
    _check(config)
    content = content_with_sizes(folder, config)
    layers = layer_widths(content)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // layers[0].heads)
    widths: Any = zip(*layers, strict=True) if is_per_layer(content) else layers[0]
    heads, kv_heads, neurons = (list(width) if isinstance(width, tuple) else width for width in widths)
    rope, extra = _rope(config, kind, head_dim)
    context, limits = _context(config)
    sizes: dict[str, Field] = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": neurons,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        **rope,
    }
    return Architecture(kind, {f"{kind.name}.{name}": value for name, value in sizes.items()}, extra, limits)


def _check(config: Any) -> None:
    name = config.model_type
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"llama.cpp computes '{name}' with silu, and config.json says '{config.hidden_act}'")
    if name == "qwen3" and getattr(config, "attention_bias", False):
        raise UnsupportedModel("llama.cpp's qwen3 has no biases in its attention, and config.json says attention_bias")


def _context(config: Any) -> tuple[int, tuple[str, ...]]:
    """Tokens for which llama.cpp computes the same: it knows no sliding window for these architectures."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if window is None or window >= longest or (layers and "sliding_attention" not in layers):
        return longest, ()
    said = f"the context is {window} tokens, the model's sliding window, which llama.cpp does not have, of {longest}"
    return int(window), (said,)


def _rope(config: Any, kind: Kind, head_dim: int) -> tuple[dict[str, Field], dict[str, npt.NDArray[np.float32]]]:
    """The entries of `rope.` and the divisors of its frequencies, where the model has such."""
    rope = dict(config.rope_parameters)
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModel("llama.cpp turns whole heads, and config.json says partial_rotary_factor")
    base, how = float(rope["rope_theta"]), rope.get("rope_type", "default")
    fields: dict[str, Field] = {"rope.freq_base": base}
    if how == "default":
        return fields, {}
    factor = float(rope["factor"])
    if how == "llama3" and kind.interleaved and all(rope.get(name) == value for name, value in LLAMA3.items()):
        lengths = [2 * math.pi * base ** (i / (head_dim // 2)) for i in range(head_dim // 2)]
        return fields, {ROPE_FREQS: np.array([llama3_factor(each, factor) for each in lengths], dtype=np.float32)}
    scaled = {**fields, "rope.scaling.type": how, "rope.scaling.factor": factor}
    if how == "linear":
        return scaled, {}
    standard = 0.1 * math.log(factor) + 1
    same = rope.get("attention_factor") is None or math.isclose(rope["attention_factor"], standard)
    extras = ("mscale", "mscale_all_dim", "short_factor")
    if how == "yarn" and same and not any(rope.get(name) for name in extras) and _default(rope):
        length = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        return {**scaled, "rope.scaling.original_context_length": length}, {}
    raise UnsupportedModel(
        f"config.json stretches the rotary embeddings by '{how}' with {_shown(rope)}, which is not written as GGUF; "
        "known: linear, yarn and Llama 3.1's llama3, each with its usual numbers"
    )


def _default(rope: Mapping[str, Any]) -> bool:
    return all(rope.get(name) in (None, value) for name, value in _YARN.items())


def _shown(rope: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in rope.items() if name not in ("rope_type", "rope_theta"))


def tensors_of(decoder: Decoder, architecture: Architecture) -> list[Stored]:
    """Every tensor that the model computes with. Raises UnsupportedModel, CheckpointError."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    name = architecture.kind.name
    arch = next(arch for arch, spelled in MODEL_ARCH_NAMES.items() if spelled == name)
    names = get_tensor_name_map(arch, len(decoder.blocks))
    stored = []
    for parameter in _parameters(decoder):
        written = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise UnsupportedModel(f"llama.cpp's '{name}' has no place for '{parameter}'")
        info = decoder.reader.info(decoder.key(parameter))
        stored.append(Stored(written, info.name, info.shape, _heads(architecture, parameter)))
    return stored


def _parameters(decoder: Decoder) -> list[str]:
    """By their names in the module tree: tied output layers are left out, as llama.cpp takes the embedding for them."""
    tied = decoder.model.all_tied_weights_keys or {}
    outer = [name for name, _ in decoder.model.named_parameters() if name not in tied]
    path = decoder.blocks_path
    inner = [f"{path}.{i}.{name}" for i, block in enumerate(decoder.blocks) for name, _ in block.named_parameters()]
    first = [name for name in outer if not name.startswith(f"{path}.")]
    return [*first, *inner]


def _heads(architecture: Architecture, parameter: str) -> int:
    projection = parameter.rpartition(".")[0].rpartition(".")[2]
    if not architecture.kind.interleaved or projection not in ("q_proj", "k_proj"):
        return 0
    suffix = "head_count" if projection == "q_proj" else "head_count_kv"
    counts = architecture.fields[f"{architecture.kind.name}.attention.{suffix}"]
    if isinstance(counts, list):
        return int(counts[int(parameter.partition(".layers.")[2].partition(".")[0])])
    return int(counts)
