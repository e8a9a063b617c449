"""What can be exported, refused by name before any work starts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from ...errors import ConfigError, NoTokenizer, UnsupportedModel
from ...extras import require
from ...model.families import family_of, known
from ...nearest import unknown
from ...texts import load_tokenizer

FLAVORS: Final = {"portable": ("fp32", "fp16"), "genai": ("fp32", "int4")}
# Rotary frequencies of other kinds change with the length of the text, which one traced graph cannot follow.
ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
# What onnxruntime-genai 0.18 builds right: others it takes for the default without a word, or gets wrong.
GENAI_ROPE_TYPES: Final = {"llama": ("default", "llama3"), "": ("default", "linear")}
GENAI_HEAD_MULTIPLE: Final = 16
_LIBRARIES: Final = {
    "portable": ("onnx", "onnxruntime", "onnxscript"),
    "genai": ("onnx", "onnxruntime", "onnxscript", "onnxruntime_genai"),
}


def check_options(flavor: str, precision: str) -> None:
    """Raise ConfigError for a flavour or precision that is not offered, MissingExtra without the libraries."""
    if flavor not in FLAVORS:
        raise ConfigError(unknown("--onnx-flavor", flavor, FLAVORS))
    known = FLAVORS[flavor]
    if precision not in known:
        why = {
            ("portable", "int4"): "; int4 needs --onnx-flavor genai",
            ("genai", "fp16"): "; a genai fp16 graph is built for GPUs and cannot be run, and so not proven, on a CPU",
        }.get((flavor, precision), "")
        raise ConfigError(
            f"--precision '{precision}' is not offered by --onnx-flavor {flavor}; it has {', '.join(known)}{why}"
        )
    require(f"--format onnx --onnx-flavor {flavor}", *_LIBRARIES[flavor])


def check_model(config: Any, flavor: str) -> None:
    """Raise UnsupportedModel for a transformers configuration whose graph is not covered, naming what is not."""
    family = config.model_type
    flavors, lacks = family_of(family).onnx, family_of(family).lacks
    if not flavors:
        raise UnsupportedModel(f"model type '{family}' cannot be exported to ONNX; families that can: {known('onnx')}")
    if flavor not in flavors:
        raise UnsupportedModel(
            f"--onnx-flavor {flavor} cannot export '{family}': {lacks[f'onnx {flavor}']}; use {', '.join(flavors)}"
        )
    genai_types = GENAI_ROPE_TYPES.get(family, GENAI_ROPE_TYPES[""])
    known_types: tuple[str, ...] = genai_types if flavor == "genai" else ROPE_TYPES
    for kind in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if kind not in known_types:
            also = "; use portable" if kind in ROPE_TYPES else ""
            raise UnsupportedModel(
                f"--onnx-flavor {flavor} cannot export this '{family}' with its rotary embedding '{kind}'; of these it "
                f"can: {', '.join(known_types)}{also}"
            )
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if flavor == "genai" and head_size % GENAI_HEAD_MULTIPLE:
        raise UnsupportedModel(
            f"--onnx-flavor genai cannot export this '{family}': ONNX Runtime's grouped attention needs heads of a "
            f"multiple of {GENAI_HEAD_MULTIPLE}, and these have {head_size}; use portable"
        )
    if flavor == "genai" and getattr(config, "sliding_window", None) is not None:
        raise UnsupportedModel(
            f"--onnx-flavor genai cannot export this '{family}': with its sliding window of {config.sliding_window} "
            "tokens onnxruntime-genai fails at run time; use portable"
        )


def check_end(folder: Path, config: Any, flavor: str) -> None:
    """Raise UnsupportedModel where onnxruntime-genai would not know the token, of `folder`, that ends a text."""
    if flavor != "genai":
        return
    stated = getattr(config, "eos_token_id", None)
    ends = list(stated) if isinstance(stated, list | tuple) else [stated]
    with contextlib.suppress(NoTokenizer):
        ends.append(load_tokenizer(folder).eos_token_id)
    known_ends = [end for end in ends if end is not None]
    if not known_ends or max(known_ends) >= config.vocab_size:
        what = f"is {max(known_ends)} and the vocabulary has {config.vocab_size}" if known_ends else "is not known"
        raise UnsupportedModel(
            f"--onnx-flavor genai cannot export {folder}: the id of its end-of-text token {what}; say eos_token_id in "
            "config.json and eos_token in tokenizer_config.json, or use portable"
        )


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Of the model, or of each kind of its layers."""
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    kinds = (entry for entry in parameters.values() if isinstance(entry, dict))
    return {str(entry.get("rope_type", "default")) for entry in kinds}
