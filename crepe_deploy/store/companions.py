"""The small files beside the weights that are passed on: configuration, tokenizer, chat templates, licences."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from crepe_deploy.errors import CheckpointError

from .checkpoint import read_config, require_inside
from .files import disk_errors, write_json
from .reading import DOCUMENT_BYTES, open_file, read_object

TEMPLATES: Final = "additional_chat_templates"
_COPIED: Final = re.compile(
    r"(generation_config|gguf_source|special_tokens_map|added_tokens|chat_template)\.json|chat_template\.jinja"
    r"|(tokenizer|vocab|merges|spiece|sentencepiece|tekken)[\w.-]*\.(json|txt|model|bpe|spm|tiktoken|vocab)"
    r"|[\w.-]+\.(model|spm|tiktoken|bpe|codes)"
    r"|(?i:licen[cs]e|copying|copyright|notice|use_policy)[\w -]*(\.(txt|md|rst|html|pdf|[A-Z0-9]+))?"
)
_SETTINGS: Final = re.compile(r"(tokenizer|generation)_config\.json")


def companions_of(source: Path) -> list[Path]:
    """The files of a model folder that are passed on, `config.json` aside: of known names, regular, inside the folder.

    Raises CheckpointError for one of these names that is a link out of the folder, no regular file, or too large.
    """
    templates = source / TEMPLATES
    inner = sorted(templates.glob("*.jinja")) if templates.is_dir() and not templates.is_symlink() else []
    found = [path for path in sorted(source.iterdir()) if _COPIED.fullmatch(path.name) and not path.is_dir()] + inner
    for path in found:
        require_inside(source, path)
        with open_file(path) as file:
            size = file.seek(0, 2)
        if size > DOCUMENT_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {DOCUMENT_BYTES} are copied of a file of its kind")
    return found


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what is passed on; leave weights, remote code, what names it, and stale claims behind.

    Raises CheckpointError as `companions_of` does, DiskFullError.
    """
    for path in companions_of(source):
        target = folder / path.relative_to(source)
        with disk_errors(folder):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        if _SETTINGS.fullmatch(path.name) and "auto_map" in (settings := read_object(path, lenient=True)):
            del settings["auto_map"]
            write_json(target, settings)
    config = read_config(source)
    config.pop("sparsity_config", None)
    config.pop("auto_map", None)
    write_json(folder / "config.json", config)
