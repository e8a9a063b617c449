"""What can be exported, refused by name before any work starts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Final

from ...errors import ConfigError, MissingExtra, UnsupportedModel
from ...model.families import family_of, known

FLAVORS: Final = {"portable": ("fp32", "fp16"), "genai": ("fp32", "int4")}
# Rotary frequencies of other kinds change with the length of the text, which one traced graph cannot follow.
ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
GENAI_HEAD_MULTIPLE: Final = 16
_LIBRARIES: Final = {
    "portable": ("onnx", "onnxruntime", "onnxscript"),
    "genai": ("onnx", "onnxruntime", "onnxscript", "onnxruntime_genai"),
}


@dataclass(frozen=True)
class OnnxOptions:
    """flavor: "portable", one graph for any runtime, or "genai", onnxruntime-genai's own. precision: of its weights."""

    flavor: str = "portable"
    precision: str = "fp32"


DEFAULT: Final = OnnxOptions()


def check_options(options: OnnxOptions) -> None:
    """Raise ConfigError for a flavour or precision that is not offered, MissingExtra without the libraries."""
    if options.flavor not in FLAVORS:
        raise ConfigError(f"--onnx-flavor '{options.flavor}' is unknown; known: {', '.join(FLAVORS)}")
    known = FLAVORS[options.flavor]
    if options.precision not in known:
        why = {
            ("portable", "int4"): "; int4 needs --onnx-flavor genai",
            ("genai", "fp16"): "; a genai fp16 graph is built for GPUs and cannot be run, and so not proven, on a CPU",
        }.get((options.flavor, options.precision), "")
        raise ConfigError(
            f"--precision '{options.precision}' is not offered by --onnx-flavor {options.flavor}; it has "
            f"{', '.join(known)}{why}"
        )
    for name in _LIBRARIES[options.flavor]:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(name.replace("_", "-"), "onnx", f"--format onnx --onnx-flavor {options.flavor}")


def check_model(config: Any, flavor: str) -> None:
    """Raise UnsupportedModel for a transformers configuration whose graph is not covered, naming what is not."""
    family = config.model_type
    flavors, lacks = family_of(family).onnx, family_of(family).lacks
    if not flavors:
        raise UnsupportedModel(f"model type '{family}' cannot be exported to ONNX; families that can: {known('onnx')}")
    for kind in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if kind not in ROPE_TYPES:
            raise UnsupportedModel(
                f"rotary embedding '{kind}' of this '{family}' cannot be exported to ONNX; those that can: "
                f"{', '.join(ROPE_TYPES)}"
            )
    if flavor not in flavors:
        raise UnsupportedModel(
            f"--onnx-flavor {flavor} cannot export '{family}': {lacks[f'onnx {flavor}']}; use {', '.join(flavors)}"
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


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Of the model, or of each kind of its layers."""
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    kinds = (entry for entry in parameters.values() if isinstance(entry, dict))
    return {str(entry.get("rope_type", "default")) for entry in kinds}
