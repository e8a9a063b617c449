"""The types in which a GGUF file holds weights, and the weights of a checkpoint read back from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError, ParityError, UnsupportedModel
from ...store.checkpoint import CheckpointReader
from .architecture import Stored

AUTO: Final = "auto"
BLOCK: Final = 32
KEPT: Final = ("token_embd.weight", "output.weight")  # at least in Q8_0, where the others have fewer bits
_AS_STORED: Final = {torch.float32: "f32", torch.float64: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_WIDE: Final = ("f32", "bf16")
_HALF_SMALLEST, _SMALLEST = 2.0**-25, 2.0**-133  # of float16, in which scales are stored; of bfloat16
ROWS: Final = 1024  # compared at once


@dataclass(frozen=True)
class Type:
    """A type of weights. file_type: what `general.file_type` says. levels: of a block's largest magnitude, 0 where each
    weight is a number of its own. error: the most that a weight may change, as a share of the largest of its block."""

    name: str
    file_type: int
    levels: int = 0
    error: float = 0.0


TYPES: Final = {
    "f32": Type("F32", 0, 0, 2.0**-24),
    "f16": Type("F16", 1, 0, 2.0**-11),
    "bf16": Type("BF16", 32, 0, 2.0**-8),
    "q8_0": Type("Q8_0", 7, 127, 0.5 / 127 + 2.0**-11),
    "q5_0": Type("Q5_0", 8, 16, 1 / 16 + 2.0**-11),
    "q4_0": Type("Q4_0", 2, 8, 1 / 8 + 2.0**-11),
}
"""All of them keep a zero a zero, so that a pruned weight stays one."""


def check_type(name: str) -> None:
    """Raise ConfigError unless this names a type that can be written."""
    if name != AUTO and name not in TYPES:
        raise ConfigError(
            f"--quantise {name} is not written here; known: {AUTO} (as the checkpoint has it), {', '.join(TYPES)}. "
            f"llama.cpp's own llama-quantize makes all others of a file in f16 or bf16"
        )


def chosen(name: str, dtype: torch.dtype) -> str:
    """The type that this names; dtype: of the checkpoint."""
    return _AS_STORED[dtype] if name == AUTO else name


def type_of(stored: Stored, name: str) -> str:
    """The type of one tensor: vectors in f32, rows that are no whole blocks in f16, tables in q8_0 at the least."""
    if len(stored.shape) < 2:
        return "f32"
    if TYPES[name].levels and stored.shape[-1] % BLOCK:
        return "f16"
    return "q8_0" if TYPES[name].levels and stored.name in KEPT else name


def bytes_of_type(shape: Sequence[int], name: str) -> int:
    """What a tensor of this shape takes in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block: int
    size: int
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[TYPES[name].name]]
    return int(np.prod(shape)) // block * size


def encode(stored: Stored, tensor: Tensor, name: str) -> npt.NDArray[Any]:
    """A tensor of the checkpoint as the bytes that the file holds. Raises UnsupportedModel where it is out of range."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.ascontiguousarray(stored.to_file(tensor).float().numpy())
    most = float(np.finfo(np.float16).max) * max(TYPES[name].levels, 1)
    if name not in _WIDE and float(np.abs(values).max(initial=0)) > most:
        raise UnsupportedModel(f"'{stored.key}' has weights beyond what {name} holds; give --quantise bf16 or f32")
    encoded: npt.NDArray[Any] = quantize(values, GGMLQuantizationType[TYPES[name].name])
    return encoded


def decode(stored: Stored, entry: Any) -> Tensor:
    """A tensor as `GGUFReader` gives it, as float32 in the checkpoint's order."""
    from gguf.quants import dequantize

    values = dequantize(entry.data, entry.tensor_type).reshape(stored.shape)
    return stored.from_file(torch.from_numpy(np.array(values, dtype=np.float32)))


def rounding(place: str, weight: Tensor, read: Tensor, name: str) -> float:
    """||W - W'||_F / ||W||_F of a weight as the file has it.

    Raises ParityError where a value is further from the weight's than the type allows, or a zero is none any more.
    """
    kind, change, whole = TYPES[name], 0.0, 0.0
    smallest = (_SMALLEST if name in _WIDE else _HALF_SMALLEST) * max(kind.levels, 1)
    pieces = (torch.split(each.reshape(-1, each.shape[-1]), ROWS) for each in (weight, read))
    for source, rounded in zip(*pieces, strict=True):
        exact, difference = source.double(), rounded.double() - source.double()
        size = exact.abs()
        if kind.levels:
            size = size.reshape(-1, BLOCK).amax(-1, keepdim=True).expand(-1, BLOCK).reshape(exact.shape)
        if bool((difference.abs() > size * kind.error + smallest).any()) or bool(rounded[source == 0].any()):
            raise ParityError(f"{place} does not hold the source's weight rounded to {kind.name}")
        change += float(difference.square().sum())
        whole += float(exact.square().sum())
    return (change / whole) ** 0.5 if whole else 0.0


class FileReader(CheckpointReader):
    """A checkpoint whose weights come out of the GGUF file that was made of it."""

    def __init__(self, root: Path, entries: dict[str, Any], stored: Sequence[Stored]) -> None:
        super().__init__(root)
        self._from = {each.key: (each, entries[each.name]) for each in stored}

    def load(self, name: str) -> Tensor:
        """As the base's, out of the file."""
        return decode(*self._from[name]) if name in self._from else super().load(name)
