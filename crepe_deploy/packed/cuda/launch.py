"""One call of a kernel with one configuration, and the configurations worth trying for a shape.

The kernels need `triton`, which CUDA builds of torch bring. With `TRITON_INTERPRET=1` set before this module is
imported they run on the CPU, slowly, statement by statement: that is how they are tested.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from crepe_deploy.errors import KernelError
from crepe_deploy.extras import require

from .layout import DeviceWeight, Kind

MOST_STREAMED: Final = 64  # tokens up to which one block holds them all
_LEAST_ROWS: Final = 16
_SUPER_COLUMNS: Final = 1024
_WORD: Final = {Kind.DENSE: torch.int64, Kind.NIBBLE: torch.int32, Kind.MASK: torch.uint16, Kind.ROWS: torch.uint16}


@dataclass(frozen=True)
class Config:
    """Rows and tokens of a block, programs that share a row block, warps and pipeline stages."""

    rows: int
    tokens: int
    split: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"n{self.rows} m{self.tokens} s{self.split} w{self.warps} p{self.stages}"

    @classmethod
    def parse(cls, text: str) -> Config:
        """What `str` wrote. Raises ValueError for anything else."""
        parts = text.split(" ")
        if [part[:1] for part in parts] != ["n", "m", "s", "w", "p"]:
            raise ValueError(f"'{text}' is no kernel configuration")
        return cls(*(int(part[1:]) for part in parts))


@functools.cache
def kernels() -> ModuleType:
    """The Triton kernels. Raises MissingExtra without triton."""
    require("running packed layers on a GPU", "triton")
    from . import kernels as module

    return module


def interpreted() -> bool:
    """Whether the kernels were imported under Triton's interpreter, which takes tensors on the CPU."""
    return type(kernels().expand_rows).__name__ == "InterpretedFunction"


def counters_for(rows: int, device: torch.device | str) -> Tensor:
    """The int32 zeros with which programs that share a row block find the last of them; every call leaves zeros.

    A layer has its own, so that two layers may run at once; one layer must not run on two streams at once.
    """
    return torch.zeros(-(-rows // _LEAST_ROWS), dtype=torch.int32, device=device)


def token_block(tokens: int) -> int:
    """The smallest block that holds `tokens`, or the largest there is."""
    return next((block for block in (1, 2, 4, 16, 32, MOST_STREAMED) if tokens <= block), 128)


def configs(weight: DeviceWeight, tokens: int, processors: int) -> list[Config]:
    """Configurations worth measuring for a batch of `tokens` on a device with so many multiprocessors."""
    block = token_block(tokens)
    if tokens > MOST_STREAMED:
        return [Config(64, 64, 1, 4, 2), Config(128, 128, 1, 8, 1), Config(128, 128, 1, 8, 2)]
    shapes = [(16, 4, 1), (32, 4, 1), (64, 8, 1)] if block <= 4 else [(64, 4, 1), (64, 4, 2), (128, 8, 1)]
    worthwhile: dict[Config, None] = {}
    for rows, warps, stages in shapes:
        blocks = -(-weight.rows // rows)
        for waves in (1, 2, 4):
            split = max(1, min(processors * waves // blocks, -(-weight.columns // _SUPER_COLUMNS), 16))
            worthwhile[Config(rows, block, split, warps, stages)] = None
    return list(worthwhile)


def usual(weight: DeviceWeight, tokens: int, processors: int) -> Config:
    """The configuration that is taken where nothing was measured."""
    return configs(weight, tokens, processors)[-1 if tokens > MOST_STREAMED else 0]


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def linear(x: Tensor, weight: DeviceWeight, counters: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    """`x W^T + bias` by the streaming kernel: x `(tokens, columns)` -> `(tokens, rows)`, both of the weight's dtype.

    Raises KernelError when tensors and configuration do not fit together.
    """
    tokens = x.shape[0]
    few = config.tokens <= 4
    _check(x, weight, counters, bias, config)
    x = _aligned(x)
    out = x.new_empty((tokens, weight.rows))
    partial = torch.empty((config.split, tokens, weight.rows) if config.split > 1 else 1, device=x.device)
    grid = (-(-weight.rows // config.rows), config.split, *(() if few else (-(-tokens // config.tokens),)))
    kernel = kernels().stream_few if few else kernels().stream_many
    kernel[grid](
        x.view(torch.int64),
        weight.values.view(_WORD[weight.kind]),
        weight.meta,
        weight.offsets,
        out if bias is None else bias,
        out,
        partial,
        counters,
        tokens,
        weight.rows,
        weight.columns,
        weight.kept,
        config.split,
        KIND=int(weight.kind),
        BF16=x.dtype == torch.bfloat16,
        BN=config.rows,
        BM=config.tokens,
        SHARED=config.split > 1,
        BIAS=bias is not None,
        EVEN=weight.columns % 128 == 0,
        **_options(config.warps, config.stages),
    )
    return out


def expand(weight: DeviceWeight) -> Tensor:
    """The dense weight `(rows, columns)`: bit-identical at kept entries, +0.0 elsewhere."""
    if weight.kind == Kind.DENSE:
        return weight.values.view(weight.rows, weight.columns)
    _check_device(weight.values)
    out = weight.values.new_empty((weight.rows, weight.columns))
    grid = (-(-weight.rows // 32), -(-weight.columns // _SUPER_COLUMNS))
    kernels().expand_rows[grid](
        out.view(torch.int64),
        weight.values.view(_WORD[weight.kind]),
        weight.meta,
        weight.offsets,
        weight.rows,
        weight.columns,
        weight.kept,
        KIND=int(weight.kind),
        BN=32,
        **_options(4, 1),
    )
    return out


def _options(warps: int, stages: int) -> dict[str, Any]:
    return {} if interpreted() else {"num_warps": warps, "num_stages": stages}


def _aligned(x: Tensor) -> Tensor:
    """x where the kernels can read 16 bytes at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _check(x: Tensor, weight: DeviceWeight, counters: Tensor, bias: Tensor | None, config: Config) -> None:
    if x.dim() != 2 or x.shape[1] != weight.columns or x.dtype != weight.values.dtype:
        raise KernelError(
            f"packed linear: x is {x.dtype} {tuple(x.shape)}, the weight {weight.values.dtype} "
            f"{weight.rows} x {weight.columns}"
        )
    if x.device != weight.values.device:
        raise KernelError(f"packed linear: x is on {x.device}, the weight on {weight.values.device}")
    if bias is not None and tuple(bias.shape) != (weight.rows,):
        raise KernelError(f"packed linear: the bias has shape {tuple(bias.shape)}, not ({weight.rows},)")
    if (config.tokens <= 4 or config.split > 1) and x.shape[0] > config.tokens:
        raise KernelError(f"configuration {config} takes at most {config.tokens} tokens, not {x.shape[0]}")
    if counters.numel() < -(-weight.rows // config.rows):
        raise KernelError(f"configuration {config} needs more than {counters.numel()} counters")
    _check_device(x)


def _check_device(tensor: Tensor) -> None:
    if tensor.device.type != "cuda" and not interpreted():
        raise KernelError(f"packed weights on {tensor.device}: these kernels run on CUDA devices")


def refused_launch() -> type[Exception]:
    """What Triton raises for a configuration that asks for more registers or shared memory than the device has."""
    import triton.runtime.errors

    refused: type[Exception] = triton.runtime.errors.OutOfResources
    return refused
