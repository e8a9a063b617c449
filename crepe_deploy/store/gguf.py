"""GGUF files as a source: one file in, one Hugging Face folder out, dequantised and said so."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crepe_deploy.errors import CheckpointError, ConfigError, CrepeError, MissingExtra, OutputError, UnsupportedModel

from .files import disk_errors, write_json
from .manifest import sha256_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 24
PROVENANCE = "gguf_source.json"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class GgufInfo:
    """What a GGUF file says of itself; `quantisation` counts tensors by storage type."""

    name: str
    architecture: str
    licence: str | None
    quantisation: dict[str, int]


def check_gguf(path: Path) -> GgufInfo:
    """Read the header and prove that every tensor's bytes are there; the data itself is not read.

    Raises CheckpointError (missing, not GGUF, unknown version, damaged or truncated) and MissingExtra.
    """
    _check_magic(path)
    _need("gguf")
    from gguf import GGUFReader

    size = path.stat().st_size
    try:
        reader = GGUFReader(str(path))
        ends = [int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors]
        info = GgufInfo(
            name=_text(reader, "general.name") or path.stem,
            architecture=_text(reader, "general.architecture") or "unknown",
            licence=_text(reader, "general.license"),
            quantisation=dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        )
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({size} bytes): {error}; download it again") from error
    if not ends or max(ends) > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes and its tensors end at byte {max(ends, default=0)}; "
            f"download it again"
        )
    return info


def convert_gguf(path: Path, out_dir: Path, dtype: str = "bfloat16") -> dict[str, Any]:
    """Dequantise a GGUF file into a Hugging Face folder (weights, config, generation config, tokenizer, template).

    Works in `out_dir.partial-PID` and renames it; `out_dir` must not exist or be empty. Returns, and leaves in the
    folder as `gguf_source.json`, where the weights come from: file name, sha256, size, storage types, dtype; a
    `README.md` says the same and carries the licence. The whole model is in memory meanwhile, about twice.
    Raises CheckpointError, ConfigError, UnsupportedModel, OutputError, DiskFullError and MissingExtra.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is not known; known: {', '.join(DTYPES)}")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise OutputError(f"{out_dir} exists already; remove it or choose another folder")
    info = check_gguf(path)
    _need("accelerate")
    provenance = {
        "file": path.name,
        "sha256": sha256_file(path),
        "size_bytes": path.stat().st_size,
        **asdict(info),
        "weights": f"dequantised from {', '.join(sorted(info.quantisation))} to {dtype}",
        "dtype": dtype,
    }
    partial = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")
    try:
        with disk_errors(partial):
            partial.mkdir(parents=True)
            _dequantise(path, partial, dtype, info)
            write_json(partial / PROVENANCE, provenance)
            (partial / "README.md").write_text(_card(provenance), encoding="utf-8")
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors writes its files readable by their owner alone
            partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return provenance


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if head[:4] != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {head[:4]!r} instead of {MAGIC!r}")
    if len(head) < HEADER_BYTES:
        raise CheckpointError(f"{path} is truncated: {len(head)} bytes, less than a GGUF header ({HEADER_BYTES})")
    version = struct.unpack("<I", head[4:8])[0]
    if version not in VERSIONS:
        raise CheckpointError(f"{path} is GGUF version {version}; versions {VERSIONS[0]} to {VERSIONS[-1]} are read")


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package, "gguf", "reading a GGUF file")


def _card(provenance: dict[str, Any]) -> str:
    licence = provenance["licence"]
    front = f"---\nlicense: {licence}\n---\n" if licence else ""
    return (
        f"{front}# {provenance['name']}\n\nConverted from the GGUF file `{provenance['file']}` "
        f"(sha256 {provenance['sha256']}): weights {provenance['weights']}.\n"
    )


def _text(reader: Any, key: str) -> str | None:
    field = reader.fields.get(key)
    return None if field is None else str(field.contents())


def _dequantise(path: Path, out_dir: Path, dtype: str, info: GgufInfo) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        _forget_quantisation(model)
        model.save_pretrained(str(out_dir))
        tokenizer.save_pretrained(str(out_dir))
    except (ValueError, KeyError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise UnsupportedModel(f"transformers cannot convert {path} ({info.architecture}): {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _forget_quantisation(model: Any) -> None:
    # transformers refuses to save a model that still names its GGUF quantiser, though nothing is quantised any more
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CrepeError("the GGUF file left some of the model's weights unset")
