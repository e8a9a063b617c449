"""The small files beside the weights: configuration, tokenizer, licences."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from .checkpoint import read_config
from .files import disk_errors, write_json

_NOT_COPIED = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|onnx|onnx_data|h5|msgpack|ot|py)$|.*\.index\.json$|manifest\.json$|README\.md$|\..*"
)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and licence files; leave weights, remote code and stale claims behind."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _NOT_COPIED.match(path.name) and path.name != "config.json":
            with disk_errors(folder):
                shutil.copyfile(path, folder / path.name)
    config = read_config(source)
    config.pop("sparsity_config", None)
    config.pop("auto_map", None)
    write_json(folder / "config.json", config)
