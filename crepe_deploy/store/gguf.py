"""GGUF files as a source: one file in, one Hugging Face folder out, dequantised and said so."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crepe_deploy.errors import CheckpointError, ConfigError, CrepeError, OutputError, UnsupportedModel
from crepe_deploy.extras import require
from crepe_deploy.nearest import unknown

from .cache import PROVENANCE
from .files import disk_errors, write_json
from .gguf_header import check_header
from .gguf_rope import rope_scaling
from .gguf_split import check_parts, join, parts_of
from .manifest import sha256_file
from .stock import CLOSED, third_party
from .temporary import held

DTYPES = ("bfloat16", "float16", "float32")
MOST_BLOCKS = 10_000  # more than any model has; tables of names are made for each


@dataclass(frozen=True)
class GgufInfo:
    """What a GGUF file says of itself.

    quantisation: tensors counted by storage type. rope: how it stretches its rotary embeddings (`rope_scaling`).
    """

    name: str
    architecture: str
    licence: str | None
    quantisation: dict[str, int]
    rope: dict[str, Any]


def check_gguf(path: Path) -> GgufInfo:
    """Read the header and prove that every tensor's bytes are there; the data itself is not read.

    Of a split file, `path` being any part, the headers of all parts. Raises CheckpointError (missing, not GGUF, unknown
    version, damaged, truncated, a part or a name that is not right) and MissingExtra.
    """
    parts = parts_of(path)
    for part in parts:
        check_header(part)
    need("gguf")
    readers = [_checked_reader(part) for part in parts]
    check_parts(parts, readers)
    with damage_named(parts[0]):
        architecture = architecture_of(readers[0])
        info = GgufInfo(
            name=_text(readers[0], "general.name") or path.stem,
            architecture=architecture,
            licence=_text(readers[0], "general.license"),
            quantisation=dict(Counter(tensor.tensor_type.name for reader in readers for tensor in reader.tensors)),
            rope=rope_scaling(path, architecture, readers),
        )
        check_names(path, readers)
    return info


def architecture_of(reader: Any) -> str:
    """The name that an open file gives its architecture."""
    return _text(reader, "general.architecture") or "unknown"


def _checked_reader(path: Path) -> Any:
    from gguf import GGUFReader

    size = path.stat().st_size
    with damage_named(path):
        reader = GGUFReader(str(path))
        ends = [int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors]
    if not ends or max(ends) > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes and its tensors end at byte {max(ends, default=0)}; "
            f"download it again"
        )
    return reader


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Inside, what gguf's reader stumbles over becomes a CheckpointError."""
    try:
        yield
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({path.stat().st_size} bytes): {error}; download it again"
        ) from error


def check_names(path: Path, readers: list[Any]) -> None:
    """Refuse tensors that no reader of this architecture looks for: a misnamed one would be left out in silence.

    Raises CheckpointError.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = architecture_of(readers[0])
    kind = next((kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    blocks = readers[0].fields.get(f"{architecture}.block_count")
    if kind is None or blocks is None:
        return  # transformers will say that it cannot read this
    if int(blocks.contents()) > MOST_BLOCKS:
        raise CheckpointError(f"{path} is damaged: it says that it has {int(blocks.contents())} blocks")
    known = {name for _, name in get_tensor_name_map(kind, int(blocks.contents())).mapping.values()}
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    strange = [name for name in names if name not in known and name.rpartition(".")[0] not in known]
    if strange:
        raise CheckpointError(
            f"{path}: tensor '{strange[0]}' is none that a '{architecture}' model of {int(blocks.contents())} blocks "
            f"has{f' ({len(strange)} such tensors)' if len(strange) > 1 else ''}; download it again"
        )


def convert_gguf(path: Path, out_dir: Path, dtype: str = "bfloat16") -> dict[str, Any]:
    """Dequantise a GGUF file into a Hugging Face folder (weights, config, generation config, tokenizer, template).

    Of a split file, `path` being any part, all parts are read, joined beside the output meanwhile.

    Works in `out_dir.partial-PID` and renames it; `out_dir` must not exist or be empty. Returns, and leaves in the
    folder as `gguf_source.json`, where the weights come from: file name, sha256, size, storage types, dtype; a
    `README.md` says the same and carries the licence. The whole model is in memory meanwhile, about twice.
    Raises CheckpointError, ConfigError, UnsupportedModel, OutputError, DiskFullError and MissingExtra.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise OutputError(f"{out_dir} exists already; remove it or choose another folder")
    info = check_gguf(path)
    need("accelerate")
    parts = parts_of(path)
    provenance = {
        "file": parts[0].name,
        "sha256": hash_gguf(path),
        "size_bytes": sum(part.stat().st_size for part in parts),
        **({"parts": {part.name: sha256_file(part) for part in parts}} if len(parts) > 1 else {}),
        **asdict(info),
        "weights": f"dequantised from {', '.join(sorted(info.quantisation))} to {dtype}",
        "dtype": dtype,
    }
    partial = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")
    try:
        with disk_errors(partial):
            partial.mkdir(parents=True)
        with held(partial), disk_errors(partial):
            whole = path
            if len(parts) > 1:
                whole = partial / "joined.gguf"
                join(parts, whole)
            _dequantise(whole, partial, dtype, f"{path} ({info.architecture})", info.rope)
            (partial / "joined.gguf").unlink(missing_ok=True)
            write_json(partial / PROVENANCE, provenance)
            (partial / "README.md").write_text(_card(provenance), encoding="utf-8")
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors writes its files readable by their owner alone
            partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return provenance


def hash_gguf(path: Path) -> str:
    """Hex sha256 of a GGUF file; of a split one, that of its parts' hashes. Raises CheckpointError."""
    parts = parts_of(path)
    if len(parts) == 1:
        return sha256_file(path)
    return hashlib.sha256("".join(map(sha256_file, parts)).encode()).hexdigest()


def named(names: Iterable[str], most: int = 5) -> str:
    """Some names for a message, sorted, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def need(package: str) -> None:
    """Raises MissingExtra where a package that reading takes is not installed."""
    require("reading a GGUF file", package, extra="gguf")


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


def _dequantise(path: Path, out_dir: Path, dtype: str, shown: str, rope: dict[str, Any]) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    reader = GGUFReader(str(path))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **CLOSED}
    try:
        with third_party(f"transformers cannot convert {shown}", UnsupportedModel):
            model, loading = AutoModelForCausalLM.from_pretrained(
                **place,
                dtype=getattr(torch, dtype),
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **biases(architecture_of(reader), {tensor.name for tensor in reader.tensors}),
            )
            check_taken(architecture_of(reader), [tensor.name for tensor in reader.tensors], shown, model)
            if loading["missing_keys"]:
                raise lacking(shown, loading["missing_keys"])
            tokenizer = AutoTokenizer.from_pretrained(**place)
            _forget_quantisation(model)
            if rope:
                model.config.rope_parameters = {**model.config.rope_parameters, **rope}
        with third_party(f"transformers cannot save {shown}", UnsupportedModel), disk_errors(out_dir):
            model.save_pretrained(str(out_dir))
            tokenizer.save_pretrained(str(out_dir))
    finally:
        if bars:
            logging.enable_progress_bar()


def lacking(shown: str, names: Iterable[str]) -> CheckpointError:
    """What is said of a file without these weights."""
    return CheckpointError(f"{shown} lacks weights that the model needs: {named(names)}")


def biases(architecture: str, names: set[str]) -> dict[str, bool]:
    """What the configuration must say for the biases of a Llama, which transformers reads as one without any.

    names: of the file's tensors.
    """
    if architecture != "llama":
        return {}
    options = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    return {option: True for option, name in options.items() if name in names}


def check_taken(architecture: str, names: list[str], shown: str, model: Any) -> dict[str, str]:
    """Refuse a file with a tensor that transformers does not look for: it would be left out in silence.

    Returns which of the model's weights each name in a file stands for. Raises UnsupportedModel.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    taken: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    left = [name for name in names if not {name, name.rpartition(".")[0]} & {*taken}]
    if lost := [name for name in left if not name.startswith("rope_")]:
        raise UnsupportedModel(f"{shown} has tensors that transformers does not read: {named(lost)}")
    return taken


def config_of_gguf(path: Path, shown: str, options: dict[str, bool]) -> Any:
    """The transformers configuration that a file's header describes; options: what it leaves out. UnsupportedModel."""
    from transformers import AutoConfig

    with third_party(f"transformers cannot convert {shown}", UnsupportedModel):
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, **options, **CLOSED)


def _forget_quantisation(model: Any) -> None:
    # transformers refuses to save a model that still names its GGUF quantiser, though nothing is quantised any more
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CrepeError("the GGUF file left some of the model's weights unset")
