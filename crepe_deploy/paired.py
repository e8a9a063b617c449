"""Calibration with `--feed both`: the dense and the pruned model's activations walk side by side, layer by layer.

Each layer's statistics are taken behind everything pruned so far, the earlier layers of its own block included, and
beside them what the dense model has at the same place. Reconstruction can then aim at the dense model's output, and,
where a layer adds its output to the residual stream, make up for what that stream has lost already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calibrate import Stream, exact_products, shared_inputs
from .families import LinearSpec
from .methods.base import Stats
from .structural.layout import PER_LAYER_CLASSES

# Per model type: layers whose output is added to the residual stream as it is, and the module of the block that reads
# the stream just before the addition ("" is the block itself).
PRE_NORM = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}
RESIDUALS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), PRE_NORM),
    **dict.fromkeys(PER_LAYER_CLASSES, PRE_NORM),
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},
}


Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


class _ReachedError(Exception):
    """Unwinds a block once what is wanted of it is known."""


@dataclass
class _Sums:
    """Running sums over tokens (X pruned, D dense, R dense less pruned residual); fp32."""

    gram: Tensor
    cross: Tensor
    squares: Tensor
    total: Tensor
    square_sum: Tensor
    drift: Tensor | None = None
    tokens: int = 0

    def add(self, pruned: Tensor, dense: Tensor, residual: Tensor | None) -> None:
        """`pruned`, `dense` (..., in); `residual` (..., width) fp32 or None."""
        x, d = (batch.flatten(0, -2).float() for batch in (pruned, dense))
        with exact_products(pruned.dtype):
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(d.T, x)
        self.squares += d.square().sum(0)
        self.total += x.sum(0)
        self.square_sum += x.square().sum(0)
        self.tokens += len(x)
        if residual is not None:
            product = residual.flatten(0, -2).T @ x
            self.drift = product if self.drift is None else self.drift.add_(product)

    def stats(self, sequences: int) -> Stats:
        """Closed: col_norm is the dense input's, everything else the pruned one's."""
        mean = self.total / self.tokens
        return Stats(
            col_norm=(self.squares / sequences).sqrt_(),
            hessian=self.gram.mul_(2 / sequences),
            total=self.total / sequences,
            variance=(self.square_sum / self.tokens).sub_(mean.square_()).clamp_(min=0),
            cross=self.cross.mul_(2 / sequences),
            drift=None if self.drift is None else self.drift.mul_(2 / sequences),
        )


@dataclass
class Pair:
    """The dense and the pruned model's hidden states in front of one block; `residuals`, see `RESIDUALS`."""

    dense: Stream
    pruned: Stream
    residuals: dict[str, str]

    def groups(self, block: nn.Module, index: int, targets: list[LinearSpec]) -> list[list[LinearSpec]]:
        """The targets by shared input, in the order in which the block calls them."""
        by_path = {spec.path: spec for spec in targets}
        return [[by_path[path] for path in paths] for paths in shared_inputs(block, targets, self.pruned, index)]

    def stats(self, before: nn.Module, block: nn.Module, index: int, group: list[LinearSpec]) -> Stats:
        """Statistics of the input that `group` shares; `before` is the block as it was, `block` pruned so far."""
        path, width = group[0].path, group[0].in_features
        square, row = (width, width), (width,)
        sums = _Sums(
            torch.zeros(square), torch.zeros(square), torch.zeros(row), torch.zeros(row), torch.zeros(row)
        )  # fmt: skip
        residual = self.residuals.get(path)
        for position in range(len(self.pruned.hidden)):
            dense, beside_dense = _inputs(before, self.dense, index, position, path, residual)
            pruned, beside_pruned = _inputs(block, self.pruned, index, position, path, residual)
            lost = None
            if beside_dense is not None and beside_pruned is not None:
                lost = beside_dense.float() - beside_pruned.float()
            sums.add(pruned, dense, lost)
        return sums.stats(self.pruned.sequences)

    def advance(self, before: nn.Module, block: nn.Module, index: int) -> None:
        """Send both on to the next block."""
        self.dense.run(before, index, advance=True)
        self.pruned.run(block, index, advance=True)


@torch.inference_mode()
def _inputs(
    block: nn.Module, stream: Stream, index: int, position: int, path: str, residual: str | None
) -> tuple[Tensor, Tensor | None]:
    """What the layer at `path` reads, and what the module at `residual` reads, for one micro-batch."""
    hidden = stream.hidden[position]
    args, kwargs = stream.calls[hidden.shape[0]][index]
    found: dict[str, Tensor] = {} if residual != "" else {"residual": hidden}

    def note(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.setdefault("residual", given[0])

    def reach(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found["input"] = given[0]
        raise _ReachedError

    hooks: dict[str, Hook] = {path: reach}
    if residual:
        hooks[residual] = note
    with _hooks(block, hooks), contextlib.suppress(_ReachedError):
        block(hidden, *args, **kwargs)
    return found["input"], found.get("residual") if residual is not None else None


@contextlib.contextmanager
def _hooks(block: nn.Module, hooks: dict[str, Hook]) -> Iterator[None]:
    handles = [block.get_submodule(path).register_forward_pre_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
