"""What is known of a candidate without running it: bytes, hashes, sparsity, the cache each token needs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from ...errors import VerifyError
from ...store.checkpoint import read_config
from ...store.manifest import MANIFEST_NAME, Manifest, load_manifest, sha256_file
from ...structural.layout import is_per_layer, layer_widths
from .result import Layer

WEIGHT_SUFFIXES: Final = (".safetensors", ".onnx", ".data", ".onnx_data")
_ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in WEIGHT_SUFFIXES)


def weights_bytes(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in weight_files(folder))


def manifest_of(folder: Path) -> Manifest | None:
    """The folder's manifest, None where it has none."""
    return load_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None


def model_sha256(folder: Path, manifest: Manifest | None) -> str:
    """Hex digest over the weight files' names and digests. Raises VerifyError for one that the manifest contradicts."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        name = path.relative_to(folder).as_posix()
        sha256 = sha256_file(path)
        if manifest is not None and manifest.files.get(name, sha256) != sha256:
            raise VerifyError(f"{path} differs from its sha256 in the manifest: export it again before measuring it")
        digest.update(f"{name}:{sha256}\n".encode())
    return digest.hexdigest()


def describe_folder(folder: Path) -> dict[str, Any]:
    """method, pattern, format, kind and layers of a candidate, from its manifest and its config.json."""
    manifest = manifest_of(folder)
    quantised = read_config(folder).get("quantization_config") or {}
    if manifest is None:
        scheme = str(quantised.get("quant_method", "dense"))
        return {"method": None, "pattern": None, "format": scheme, "kind": scheme, "layers": []}
    method, pattern = manifest.config.get("method"), manifest.config.get("pattern")
    if not manifest.tensors and "structural" not in manifest.config:
        method = pattern = None
    words = [str(word) for word in (method, pattern, manifest.format) if word is not None]
    return {
        "method": method,
        "pattern": pattern,
        "format": manifest.format,
        "kind": " ".join(words),
        "layers": layers(manifest),
    }


def layers(manifest: Manifest) -> list[Layer]:
    """The pruned layers with their counted sparsity."""
    return [
        Layer(
            name=name.removesuffix(".weight"),
            shape=record.matrix,
            sparsity=record.sparsity,
            pattern=record.pattern,
            error=record.layer_error,
        )
        for name, record in manifest.tensors.items()
    ]


def kv_token_bytes(folder: Path, dtype: str) -> int | None:
    """Bytes that the key-value cache needs for one token in `dtype`; None for a config that does not say."""
    config = text_config(folder)
    if is_per_layer(config) and dtype in _ITEM_BYTES:
        groups = sum(layer.kv_heads for layer in layer_widths(config))
        return int(2 * groups * config["head_dim"] * _ITEM_BYTES[dtype])
    heads = config.get("num_attention_heads", config.get("n_head"))
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    hidden = config.get("hidden_size", config.get("n_embd"))
    if dtype not in _ITEM_BYTES or not heads or not blocks or not hidden:
        return None
    size = config.get("head_dim") or hidden // heads
    return int(2 * blocks * (config.get("num_key_value_heads") or heads) * size * _ITEM_BYTES[dtype])


def text_config(folder: Path) -> dict[str, Any]:
    """config.json, or its part about the text model where there are several."""
    config = read_config(folder)
    part: dict[str, Any] = config.get("text_config") or config
    return part


def limits(folder: Path) -> tuple[int | None, int | None]:
    """Vocabulary size, and the longest sequence, as config.json says; None where it does not."""
    config = text_config(folder)
    return config.get("vocab_size"), config.get("max_position_embeddings", config.get("n_positions"))


def step_bytes(folder: Path) -> int:
    """Bytes of weights that one decode step at batch 1 reads: all but the input embedding, of which it reads a row."""
    from ...store.checkpoint import CheckpointReader

    sizes = {info.name: info.size_bytes for info in CheckpointReader(folder)}
    has_head = "lm_head.weight" in sizes
    return sum(size for name, size in sizes.items() if not (has_head and name.endswith("embed_tokens.weight")))
