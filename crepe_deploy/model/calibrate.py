"""The calibration batch on its way through the blocks, and the statistics of what each linear layer reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crepe_deploy.device import device_of, resting_place
from crepe_deploy.progress import unheard

from .calls import Call
from .decoder import Decoder, LinearSpec
from .stats import Need, Stats, Variety, check_inputs

BATCH_TOKENS = 2048


@dataclass
class Stream:
    """Hidden states of a token set in front of one block, in micro-batches, and how every block is to be called.

    hidden: tensors (batch, length, width), compute dtype, which rest where `embed` put them and visit a block's device.
    calls: for each micro-batch, one call for each block, on the device that computes.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]

    @property
    def sequences(self) -> int:
        return sum(batch.shape[0] for batch in self.hidden)

    def twin(self) -> Stream:
        """The same hidden states, free to go their own way: a run replaces a batch and changes none."""
        return Stream(list(self.hidden), self.calls)

    @torch.inference_mode()
    def run(self, block: nn.Module, index: int, *, advance: bool, tick: Callable[[float], None] = unheard) -> None:
        """Send every micro-batch through `block`; with `advance` its output replaces the hidden states.

        tick: told the share of this that each one was.
        """
        device = device_of(block)
        for position, batch in enumerate(self.hidden):
            output = self.calls[position][index](block, batch.to(device))
            if advance:
                self.hidden[position] = output.to(batch.device)
            tick(1 / len(self.hidden))


def embed(decoder: Decoder, token_sets: list[Tensor]) -> list[Stream]:
    """Run the embeddings over token sets, each (samples, length) int64, and note how the model calls its blocks."""
    size = max(tokens.numel() for tokens in token_sets) * int(decoder.config.hidden_size) * decoder.dtype.itemsize
    rest = resting_place(decoder.device, size)
    with decoder.embedder() as run:
        return [_embed_one(run, tokens, rest) for tokens in token_sets]


def _embed_one(run: Any, tokens: Tensor, rest: torch.device) -> Stream:
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    first: dict[int, list[Call]] = {}
    for batch in torch.split(tokens, max(1, BATCH_TOKENS // tokens.shape[1])):
        slots = run(batch)
        noted = [slot.call for slot in slots]
        alike, memo = first.setdefault(len(batch), noted), dict[int, Any]()
        hidden.append(slots[0].hidden.to(rest))
        calls.append([call.sharing(other, memo) for call, other in zip(noted, alike, strict=True)])
    return Stream(hidden, calls)


def shared_inputs(block: nn.Module, linears: list[LinearSpec], stream: Stream, index: int) -> list[list[str]]:
    """Group the paths of linears that read one and the same tensor, in the order in which they are called."""
    groups: list[tuple[Tensor, list[str]]] = []

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for seen, paths in groups:
                if seen is args[0]:
                    paths.append(path)
                    return
            groups.append((args[0], [path]))

        return hook

    handles = [block.get_submodule(spec.path).register_forward_pre_hook(note(spec.path)) for spec in linears]
    try:
        Stream(stream.hidden[:1], stream.calls).run(block, index, advance=False)
    finally:
        for handle in handles:
            handle.remove()
    return [paths for _, paths in groups]


@contextlib.contextmanager
def bf16_products(allowed: bool = True) -> Iterator[None]:
    """Inside, where `allowed`, products of fp32 tensors may use bf16 units, several times faster on some CPUs.

    They round factors to bf16 and add in fp32: nothing is lost where the factors were bf16 numbers.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Accumulator:
    """Sums over the calibration tokens of one linear input: squares and values (in,), Gram matrix (in, in); fp32."""

    needs: frozenset[Need]
    squares: Tensor | None = None
    total: Tensor | None = None
    tokens: int = 0
    gram: Tensor | None = None
    variety: Variety = field(default_factory=Variety)
    _stats: Stats | None = None

    def add(self, batch: Tensor) -> None:
        """`batch` (..., in), any float dtype."""
        rows = batch.reshape(-1, batch.shape[-1])
        self.variety.see(rows)
        if "moments" in self.needs:
            total = rows.sum(0, dtype=torch.float32)
            self.total = total if self.total is None else self.total.add_(total)
            self.tokens += len(rows)
        if self.needs & {"col_norm", "moments"}:
            squares = rows.to(torch.float32, copy=True).square_().sum(0)  # ten times faster than vector_norm here
            self.squares = squares if self.squares is None else self.squares.add_(squares)
        if "hessian" in self.needs:
            rows = rows.float()
            if self.gram is None:
                self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            with bf16_products(batch.dtype == torch.bfloat16):
                self.gram.addmm_(rows.T, rows)

    @torch.inference_mode()
    def stats(self, layer: str, sequences: int) -> Stats:
        """Close the sums; every call returns the same object, so that methods can recognise a shared input.

        Raises NumericalError naming `layer`, see `check_inputs`.
        """
        if self._stats is None:
            stats = Stats(
                col_norm=None if self.squares is None else (self.squares / sequences).sqrt_(),
                hessian=None if self.gram is None else self.gram.mul_(2 / sequences),
                total=None if self.total is None else self.total / sequences,
                variance=self._variance(),
            )
            self._stats = check_inputs(layer, stats, varied=self.variety.varied)
        return self._stats

    def _variance(self) -> Tensor | None:
        if self.total is None or self.squares is None:
            return None
        return (self.squares / self.tokens).sub_((self.total / self.tokens).square_()).clamp_(min=0)


@dataclass
class Collector:
    """Accumulates `needs` for the inputs of chosen linears; linears that read one tensor share one accumulator."""

    needs: frozenset[Need]
    _by_path: dict[str, Accumulator] = field(default_factory=dict)
    _batch: list[tuple[Tensor, Accumulator]] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self, block: nn.Module, linears: list[LinearSpec]) -> Iterator[None]:
        """Hook the named linears of `block` while the block runs. Does nothing when nothing is needed."""
        handles = []
        if self.needs:
            for spec in linears:
                handles.append(block.get_submodule(spec.path).register_forward_pre_hook(self._hook(spec.path)))
            handles.append(block.register_forward_hook(lambda *_: self._batch.clear()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._batch.clear()

    def _hook(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for seen, accumulator in self._batch:
                if seen is args[0] and self._by_path.setdefault(path, accumulator) is accumulator:
                    return
            accumulator = self._by_path.setdefault(path, Accumulator(self.needs))
            accumulator.add(args[0])
            self._batch.append((args[0], accumulator))

        return hook

    def stats(self, spec: LinearSpec, sequences: int) -> Stats:
        """The statistics of one linear's input; linears with a shared input get the same. Raises NumericalError."""
        if not self.needs:
            return Stats()
        return self._by_path[spec.path].stats(spec.key, sequences)
