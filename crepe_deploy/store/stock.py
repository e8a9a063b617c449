"""The one way into transformers for files that others wrote: no code from a checkpoint, no network, no question.

Whatever transformers, or tokenizers below it, raises about such files becomes one named error in one line.
"""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from crepe_deploy.errors import GPU_IS_FULL, CheckpointError, CrepeError, NoTokenizer, UnsupportedModel

from .checkpoint import read_config
from .reading import read_object

CLOSED: Final = {"trust_remote_code": False, "local_files_only": True}
PROBE: Final = "The capital of France is"
NEEDS_CODE: Final = "needs code from the checkpoint, which is never run"
DTYPES: Final = ("float64", "float32", "float16", "bfloat16")

# How a machine computes is not the model's business, and may fetch kernels; code from a checkpoint is never run.
_NOT_THE_MODEL: Final = re.compile(r"auto_map|_?(attn|experts)_implementation(_internal|_autoset)?")
_LAYERS, _LABELS = 10_000, 100_000  # more of them than any model has; their configurations fill lists with them
_IDS: Final = 1 << 24  # above the ids of any tokenizer
_VOCABULARY: Final = re.compile(r"tokenizer\.|vocab|merges|spiece|sentencepiece|tekken|.*\.(model|spm|tiktoken|bpe)$")
_SMALL_FILES: Final = (".json", ".txt", ".model", ".jinja")


@contextlib.contextmanager
def third_party(place: object, error: type[CrepeError]) -> Iterator[None]:
    """Inside, whatever a library raises about the files of others becomes `error`: `place`, then why, in one line.

    A GPU's memory that is full says nothing about them, and stays what it is.
    """
    try:
        yield
    except (CrepeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as cause:  # a Rust panic of tokenizers is no Exception
        if type(cause).__name__ == GPU_IS_FULL:
            raise
        raise error(f"{place}: {reason(cause)}") from cause


def reason(cause: BaseException) -> str:
    """What an exception of a library says, in one line; never the advice to run code from a checkpoint."""
    text = " ".join(str(cause).split())
    if "trust_remote_code" in text:
        return f"it {NEEDS_CODE}"
    named = text if isinstance(cause, ValueError | OSError) and text else f"{type(cause).__name__}: {text}"
    return named if len(named) <= 400 else named[:400] + " ..."


def model_content(root: Path) -> dict[str, Any]:
    """`config.json` as far as it describes a model, within bounds. Raises CheckpointError, UnsupportedModel."""
    content = _described(read_config(root), root)
    if not isinstance(content.get("model_type", ""), str):
        raise UnsupportedModel(f"{root / 'config.json'}: 'model_type' is {content['model_type']!r}, no name of one")
    return content


def _described(content: dict[str, Any], root: Path) -> dict[str, Any]:
    """Without what is not the model's; the parts of several models in one alike."""
    kept = {}
    for key, value in content.items():
        if _NOT_THE_MODEL.fullmatch(key) or (key == "quantization_config" and not value):
            continue
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UnsupportedModel(f"{root / 'config.json'}: '{key}' is {value}; no model has such a number")
        most = _LAYERS if "layer" in key else _LABELS if key == "num_labels" else None
        if most and isinstance(value, int | float) and value > most:
            raise UnsupportedModel(f"{root / 'config.json'}: '{key}' is {value}; at most {most} are read")
        if key in ("dtype", "torch_dtype") and value not in (None, *DTYPES):
            raise UnsupportedModel(f"{root / 'config.json'}: '{key}' is {value!r}; known: {', '.join(DTYPES)}")
        if "dropout" in key and isinstance(value, int | float) and not 0 <= value <= 1:
            raise UnsupportedModel(f"{root / 'config.json'}: '{key}' is {value}; a share from 0 to 1 is needed")
        kept[key] = _described(value, root) if isinstance(value, dict) else value
    return kept


def config_of(root: Path) -> Any:
    """The transformers configuration of a folder. Raises CheckpointError, and UnsupportedModel, which says where."""
    content = model_content(root)
    place = f"{root / 'config.json'}, model type '{content.get('model_type', 'unknown')}'"
    if content.get("model_type", "") not in _known_types():
        code = f" {NEEDS_CODE}" if "auto_map" in read_config(root) else " is not known to this transformers"
        raise UnsupportedModel(f"{place}{code}")
    try:
        with third_party(place, UnsupportedModel):
            return configured(content, root)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}{blamed(content, lambda rest: configured(rest, root))}") from error


def _known_types() -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING


def configured(content: Mapping[str, Any], root: Path) -> Any:
    """The configuration that transformers makes of the content of a config.json; raises whatever it raises."""
    kind = content["model_type"]
    if kind == "mistral" and "layer_types" in content:  # as AutoConfig does
        kind = "ministral"
    return _known_types()[kind].from_dict(_with_infinities({**content, "model_type": kind}), name_or_path=str(root))


def _with_infinities(value: Any) -> Any:
    """transformers writes a float that JSON cannot hold as {"__float__": its name}."""
    if isinstance(value, dict):
        if list(value) == ["__float__"] and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _with_infinities(part) for name, part in value.items()}
    return [_with_infinities(part) for part in value] if isinstance(value, list) else value


def blamed(content: Mapping[str, Any], attempt: Callable[[dict[str, Any]], object]) -> str:
    """The entries of a config.json without one of which `attempt` works, for a message; "" where there is none."""
    found = []
    for key, value in content.items():
        with contextlib.suppress(Exception):
            if key != "model_type":
                attempt({name: kept for name, kept in content.items() if name != key})
                found.append(f"'{key}' ({str(value)[:40]})")
    return f"; without {' or '.join(found[:4])} it could be" if found else ""


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder, which has been seen to work on a few words.

    Raises NoTokenizer where there is none, or one that needs code, and CheckpointError where it is damaged.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a model folder")
    if not any(_VOCABULARY.match(path.name) for path in _small_files(folder)):
        raise NoTokenizer(f"{folder} has no tokenizer")
    named = folder / "tokenizer_config.json"
    settings = read_object(named, lenient=True) if named.exists() else {}
    place = f"{folder} has no tokenizer that transformers can load"
    try:
        _check_vocabulary(folder / "tokenizer.json")
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    with third_party(place, NoTokenizer if "auto_map" in settings else CheckpointError):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), config=_tokenizer_config(folder), **CLOSED)
    with third_party(place, CheckpointError):
        ids = tokenizer(PROBE)["input_ids"]
        if not ids or not isinstance(tokenizer.decode(ids), str):
            raise CheckpointError(f"{place}: it makes no tokens of '{PROBE}'")
    return tokenizer


def _check_vocabulary(path: Path) -> None:
    """Raise CheckpointError where an id is beyond any vocabulary: tokenizers makes room for all below it, or aborts."""
    model = read_object(path, lenient=True).get("model") if path.exists() else None
    words = model.get("vocab") if isinstance(model, dict) else None
    ids = words.values() if isinstance(words, dict) else ()
    worst = max((number for number in ids if isinstance(number, int)), default=0)
    if worst >= _IDS:
        raise CheckpointError(f"{path}: a token has the id {worst}; ids below {_IDS} are read")


def check_tokenizer(folder: Path) -> None:
    """Raise CheckpointError unless the tokenizer of a model folder, where it has one, works and fits the embedding.

    What needs no text needs no tokenizer, but what is written must not pass a broken one on.
    """
    try:
        tokenizer = tokenizer_of(folder)
    except NoTokenizer:
        return
    content = read_config(folder)
    rows = (content.get("text_config") or content).get("vocab_size")
    if isinstance(rows, int):
        check_ids(tokenizer, tokenizer(PROBE)["input_ids"], rows)


def check_ids(tokenizer: Any, ids: Sequence[int], rows: int) -> None:
    """Raise CheckpointError, naming the token, where one of these ids has none of the embedding's `rows`."""
    worst = max(ids, default=0)
    if worst >= rows:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its tokenizer, of {len(tokenizer)} tokens, gives id {worst} "
            f"({tokenizer.convert_ids_to_tokens(worst)!r}), and the model's embedding has {rows} rows: "
            f"add rows to the embedding, or take the token out of the tokenizer"
        )


def _small_files(folder: Path) -> list[Path]:
    """What lies beside the weights. Raises CheckpointError for what a library would wait for, like a FIFO."""
    paths = sorted(folder.iterdir())
    for path in paths:
        if path.suffix in _SMALL_FILES and path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
    return paths


def _tokenizer_config(folder: Path) -> Any:
    """What chooses the tokenizer's class: the model's configuration, or a plain one of a type that is not known."""
    from transformers import PretrainedConfig

    if not (folder / "config.json").exists():
        return PretrainedConfig()
    content = model_content(folder)
    if content.get("model_type") in _known_types():
        return config_of(folder)
    return PretrainedConfig.from_dict(content)
