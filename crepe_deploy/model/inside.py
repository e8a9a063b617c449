"""The matrices inside experts as layers to prune, and what each expert reads while text passes.

An expert reads the tokens that are routed to it, and what it puts out counts as much as its router weight says: so a
token's input counts w^2 times in sums of squares, w times in sums, and the squared error that pruning then weighs is
that of the layer's output. One that fewer than `FEWEST_TOKENS` tokens were routed to is measured on every token of its
layer instead, each counted once. While text passes only what the experts of one block read is kept; the statistics are
taken one expert at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .blocks import expert_layer
from .calibrate import Accumulator
from .decoder import Decoder, LinearSpec
from .stats import Need, Stats

FEWEST_TOKENS: Final = 64
_LAST: Final = "down_proj"  # what reads an expert's own neurons; the others read the layer's input


def matrices(decoder: Decoder, index: int) -> list[LinearSpec]:
    """All that can be pruned of a block: its linear layers, and behind them the matrices of its experts."""
    return [*decoder.linears[index], *expert_matrices(decoder, index)]


def expert_matrices(decoder: Decoder, index: int) -> list[LinearSpec]:
    """The matrices of a block's experts, expert by expert, each one's last; none where there are no experts."""
    layer = None if decoder.experts is None else expert_layer(decoder.blocks[index], decoder.experts)
    if layer is None or decoder.experts is None:
        return []
    found = []
    for leaf, parameter in layer[1].named_parameters(recurse=False):
        if parameter.ndim == 3:
            path, transposed = f"{decoder.experts.module}.{leaf}", decoder.experts.transposed
            pieces = decoder.pieces(f"{decoder.blocks_path}.{index}.{path}", tuple(parameter.shape))
            for piece in pieces:
                rows, columns = piece.shape[:-3:-1] if transposed else piece.shape[-2:]
                if piece.expert is not None:
                    found.append(LinearSpec(path, piece.key, rows, columns, False, piece.expert, piece.first_row))
                    continue
                for expert in range(len(parameter)):
                    key = f"{piece.key}[{expert}]"
                    found.append(LinearSpec(path, key, rows, columns, transposed, expert, 0, piece.key))
    return sorted(found, key=lambda spec: (spec.expert, spec.path.endswith(_LAST)))


@dataclass(frozen=True)
class ExpertStats:
    """What one expert reads. tokens: that were routed to it. first, last: of what its first matrices and its last one
    read. spread: whether both are those of every token of the layer, for want of its own."""

    tokens: int
    first: Accumulator
    last: Accumulator
    spread: bool

    def stats(self, spec: LinearSpec, sequences: int) -> Stats:
        """The statistics of the input of one of its matrices. Raises NumericalError."""
        read = self.last if spec.path.endswith(_LAST) else self.first
        return read.stats(spec.key, sequences)


@dataclass
class Routed:
    """What the experts of a block are given for each micro-batch: hidden states, and the experts chosen with their
    weights; kept where `rest` is. needs: the statistics to take of it, none if it is empty."""

    needs: frozenset[Need]
    rest: torch.device
    _given: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _all: Accumulator | None = None  # of the layer's input, for every expert without tokens enough

    @contextlib.contextmanager
    def watching(self, experts: nn.Module) -> Iterator[None]:
        """Inside, note what `experts` are given."""

        def note(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            hidden, chosen, weights = (tensor.to(self.rest) for tensor in given)
            self._given.append((hidden, chosen, weights))

        handle = experts.register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def of(self, expert: int, experts: nn.Module) -> ExpertStats:
        """What one of `experts`, dense still, read."""
        tokens = sum(int((chosen == expert).sum()) for _, chosen, _ in self._given)
        spread = tokens < FEWEST_TOKENS
        first, last = Accumulator(self.needs), Accumulator(self.needs)
        if spread and self._all is not None:
            first = self._all
        for hidden, chosen, weights in self._given:
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            read = hidden if spread else hidden[rows]
            counted = torch.ones(len(read)) if spread else weights[rows, places].float()
            device = experts.get_parameter(_LAST).device
            read, counted = read.to(device), counted.unsqueeze(1).to(device)
            if len(read):
                if first is not self._all:
                    first.add(read.float() * counted)
                last.add(_between(experts, expert, read).float() * counted)
        self._all = first if spread else self._all
        return ExpertStats(tokens, first, last, spread)


class _ReadError(Exception):
    """Unwinds an expert once the input of its last matrix is known."""


class _Reading(TorchFunctionMode):
    """Inside, notes what is multiplied by a part of `matrix`, and goes no further."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.storage = matrix.untyped_storage().data_ptr()
        self.read: Tensor | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        second = args[1] if len(args) > 1 else None
        if isinstance(second, Tensor) and second.untyped_storage().data_ptr() == self.storage:
            self.read = args[0]
            raise _ReadError
        return func(*args, **(kwargs or {}))


def _between(experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """The neurons of one expert, which its last matrix reads, for hidden states (tokens, width)."""
    alone = torch.full((len(hidden), 1), expert, device=hidden.device)
    reading = _Reading(experts.get_parameter(_LAST))
    with contextlib.suppress(_ReadError), reading:
        experts(hidden, alone, hidden.new_ones(len(hidden), 1))
    assert reading.read is not None
    return reading.read
