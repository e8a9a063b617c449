"""How a GGUF file stretches its rotary embeddings, which transformers leaves out when it converts one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from crepe_deploy.errors import UnsupportedModel

LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TOLERANCE = 1e-4


def rope_scaling(path: Path, architecture: str, readers: list[Any]) -> dict[str, Any]:
    """The entries of `rope_parameters` that the file asks for beside the base; none where it stretches nothing.

    Known are `linear`, `yarn` and, recognised by its stored factors, `llama3`. Raises UnsupportedModel for all others.
    """
    tensors = {
        tensor.name: tensor for reader in readers for tensor in reader.tensors if tensor.name.startswith("rope_")
    }
    fields = {
        name.removeprefix(f"{architecture}.rope."): field.contents()
        for name, field in readers[0].fields.items()
        if name.startswith(f"{architecture}.rope.")
    }
    kind = str(fields.get("scaling.type", "none"))
    if set(tensors) == {"rope_freqs.weight"} and kind in {"none", "llama3"}:
        return _llama3(path, [float(value) for value in tensors["rope_freqs.weight"].data], fields)
    if tensors or kind not in {"none", "linear", "yarn"}:
        stretched = ", ".join(sorted(tensors)) or f"rope.scaling.type {kind}"
        raise UnsupportedModel(f"{path}: its rotary embeddings ({stretched}) are of a kind that is not converted")
    factor = float(fields.get("scaling.factor", fields.get("scale_linear", 1.0)))
    if factor in {0.0, 1.0}:
        return {}
    if kind == "yarn":
        original = fields.get("scaling.original_context_length")
        if original is None:
            raise UnsupportedModel(f"{path}: its YaRN does not say the context that it stretches")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
    return {"rope_type": "linear", "factor": factor}


def _llama3(path: Path, factors: list[float], fields: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's parameters, proved on the divisors of the frequencies that llama.cpp's converter stores."""
    if all(factor == 1.0 for factor in factors):
        return {}
    base, factor = float(fields.get("freq_base", 10000.0)), max(factors)
    expected = [llama3_factor(2 * math.pi * base ** (i / len(factors)), factor) for i in range(len(factors))]
    if not all(abs(one - other) <= _TOLERANCE * other for one, other in zip(factors, expected, strict=True)):
        raise UnsupportedModel(f"{path}: its rope_freqs.weight is not Llama 3.1's, and no other kind is converted")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def llama3_factor(wavelength: float, factor: float) -> float:
    """What Llama 3.1 divides the frequency of this wavelength (tokens) by, as in llama.cpp's converter."""
    low, high, original = LLAMA3.values()
    if wavelength < original / high:
        return 1.0
    if wavelength > original / low:
        return factor
    smooth = (original / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)
