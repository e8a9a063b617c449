"""The model folder that a GGUF file would become, from its header alone: configuration and sizes without a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from crepe_deploy.progress import Say
from crepe_deploy.store.checkpoint import DTYPE_NAMES, SINGLE_NAME
from crepe_deploy.store.files import disk_errors
from crepe_deploy.store.gguf import architecture_of, biases, check_names, check_taken, config_of_gguf, lacking
from crepe_deploy.store.gguf_headers import Headers, headers_of
from crepe_deploy.store.gguf_rope import rope_scaling
from crepe_deploy.store.outline import named, write_hole
from crepe_deploy.store.stock import config_of
from crepe_deploy.store.temporary import temporary_folder

from .architecture import outline

_DTYPE = torch.bfloat16  # as GGUF files are dequantised


@contextmanager
def gguf_outline(path: Path, say: Say) -> Iterator[Path]:
    """Yield a folder with the config.json that converting would write, and a weight file that is a header and a hole.

    Made of the header of `path`, all headers of a split file; also where the weights are not all there yet, which is
    said. Raises CheckpointError, UnsupportedModel, MissingExtra, DiskFullError, OutputError.
    """
    with temporary_folder("outline") as folder, named(folder, str(path)):
        with headers_of(path) as headers:
            if not headers.whole:
                say(f"{path} is not whole yet: planned from its header, nothing else can be done with it")
            config, names = _config(headers), headers.names
            architecture = architecture_of(headers.readers[0])
        with disk_errors(folder):
            config.save_pretrained(str(folder))
        model = outline(folder, config_of(folder), len(names))
        stands_for = check_taken(architecture, names, str(path), model)
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        stored = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        present = {stands_for[name] for name in names if name in stands_for}
        if missing := {*stands_for.values()} & {*stored} - present:
            raise lacking(str(path), missing)
        _write_hole(folder / SINGLE_NAME, {name: tuple(tensor.shape) for name, tensor in stored.items()})
        yield folder


def _config(headers: Headers) -> Any:
    path, readers = headers.path, headers.readers
    architecture, names = architecture_of(readers[0]), set(headers.names)
    check_names(path, readers)
    rope = rope_scaling(path, architecture, readers) if headers.stretched else {}
    config = config_of_gguf(headers.copies[0], f"{path} ({architecture})", biases(architecture, names))
    if len(readers) > 1 and "output.weight" in names:
        config.tie_word_embeddings = False  # transformers saw the first part alone
    if rope:
        config.rope_parameters = {**config.rope_parameters, **rope}
    config.dtype = _DTYPE
    return config


def _write_hole(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * _DTYPE.itemsize
        header[name] = {"dtype": DTYPE_NAMES[_DTYPE], "shape": shape, "data_offsets": [begin, end]}
    write_hole(path, header)
