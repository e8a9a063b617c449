"""Calibration with `--feed both`: the dense and the pruned model's activations walk side by side, layer by layer.

Each layer's statistics are taken behind everything pruned so far, the earlier layers of its own block included, and
beside them what the dense model has at the same place. Reconstruction can then aim at the dense model's output, and,
where a layer adds its output to the residual stream, make up for what that stream has lost already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Stream, bf16_products, shared_inputs
from .decoder import LinearSpec, is_linear
from .families import Residual, family_of
from .stats import Stats

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
Outputs = dict[str, Any]  # what the parts of a block returned for one micro-batch, by their names


class _ReachedError(Exception):
    """Unwinds a block once what is wanted of it is known."""


@dataclass
class _Sums:
    """Running sums over tokens (X pruned, D dense, R dense less pruned residual); fp32."""

    gram: Tensor
    cross: Tensor
    squares: Tensor
    total: Tensor
    drift: Tensor | None = None
    tokens: int = 0

    def add(self, pruned: Tensor, dense: Tensor, residual: Tensor | None) -> None:
        """`pruned`, `dense` (..., in); `residual` (..., width) fp32 or None."""
        x, d = (batch.flatten(0, -2).float() for batch in (pruned, dense))
        with bf16_products(pruned.dtype == torch.bfloat16):
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(d.T, x)
            if residual is not None:  # may round what is left of a residual; a sum over all tokens does not feel it
                product = residual.flatten(0, -2).T @ x
                self.drift = product if self.drift is None else self.drift.add_(product)
        self.squares += d.square().sum(0)
        self.total += x.sum(0)
        self.tokens += len(x)

    def stats(self, sequences: int) -> Stats:
        """Closed: col_norm is the dense input's, everything else the pruned one's."""
        mean = self.total / self.tokens
        variance = (self.gram.diagonal() / self.tokens).sub_(mean.square_()).clamp_(min=0)
        return Stats(
            col_norm=(self.squares / sequences).sqrt_(),
            hessian=self.gram.mul_(2 / sequences),
            total=self.total / sequences,
            variance=variance,
            cross=self.cross.mul_(2 / sequences),
            drift=None if self.drift is None else self.drift.mul_(2 / sequences),
        )


@dataclass
class Side:
    """One of the two models' hidden states, and what the finished parts of the present block returned for them."""

    stream: Stream
    outputs: list[Outputs] = field(default_factory=list)

    @torch.inference_mode()
    def inputs(
        self, block: nn.Module, index: int, position: int, path: str, residual: str | None, whole: str = ""
    ) -> tuple[Tensor, Tensor | None]:
        """What the layer at `path` reads, and what the module at `residual` reads, for one micro-batch.

        Parts that return before that layer is reached are finished, for the layers come in the order of their calls:
        they are not run again. whole: a part that is to be finished as well.
        """
        hidden = self.stream.hidden[position]
        args, kwargs = self.stream.calls[hidden.shape[0]][index]
        found: dict[str, Tensor] = {} if residual != "" else {"residual": hidden}

        def note(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            found.setdefault("residual", given[0])

        def reach(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            found["input"] = given[0]
            if not whole:
                raise _ReachedError

        hooks: dict[str, Hook] = {path: reach}
        if residual:
            hooks[residual] = note
        with _hooks(block, hooks), self._replayed(block, position, path, whole), contextlib.suppress(_ReachedError):
            block(hidden, *args, **kwargs)
        return found["input"], found.get("residual") if residual is not None else None

    def advance(self, block: nn.Module, index: int) -> None:
        """Send the hidden states through the block and forget its parts."""
        for position in range(len(self.stream.hidden)):
            hidden = self.stream.hidden[position]
            args, kwargs = self.stream.calls[hidden.shape[0]][index]
            with torch.inference_mode(), self._replayed(block, position):
                self.stream.hidden[position] = block(hidden, *args, **kwargs)
        self.outputs = []

    @contextlib.contextmanager
    def _replayed(self, block: nn.Module, position: int, path: str = "", whole: str = "") -> Iterator[None]:
        """Inside, parts with a known output return it, but for the one that `path` is in; other outputs are noted."""
        self.outputs = self.outputs or [{} for _ in self.stream.hidden]
        known = self.outputs[position]
        handles, replaced = [], []
        for name, part in _parts(block).items():
            if name in known and name != _part(path):
                part.forward = lambda *_, output=known[name], **__: output
                replaced.append(part)
            else:
                handles.append(part.register_forward_hook(_keep(known, name, name == whole)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part in replaced:
                del part.forward


@dataclass
class Pair:
    """The dense and the pruned model's hidden states in front of one block; `residuals`, see `Family`.

    For each block: `stats` for its `groups` in order, each pruned before the next is asked for, and then `advance`.
    own: paths of layers that aim at their own output, not at the dense model's.
    """

    dense: Side
    pruned: Side
    residuals: tuple[Residual, ...]
    own: frozenset[str] = frozenset()

    @classmethod
    def start(cls, stream: Stream, model_type: str) -> Pair:
        """Both sides in front of the first block, where they are equal."""
        return cls(Side(stream), Side(stream.twin()), family_of(model_type).residuals)

    def groups(
        self, block: nn.Module, index: int, linears: list[LinearSpec], targets: list[LinearSpec]
    ) -> list[list[LinearSpec]]:
        """The `targets` among the block's `linears` by shared input, in the order in which the block calls them.

        Where the last layer of a part is no target nothing makes up for what the fits before it lose: outputs fitted
        to wanted ones from noisy inputs are too small, block after block. The part's layers then aim at their own.
        """
        called = shared_inputs(block, linears, self.pruned.stream, index)
        last = {_part(path): path for paths in called for path in paths}
        by_path = {spec.path: spec for spec in targets}
        self.own = frozenset(path for path in by_path if last[_part(path)] not in by_path)
        chosen = ([by_path[path] for path in paths if path in by_path] for paths in called)
        return [group for group in chosen if group]

    def stats(self, before: nn.Module, block: nn.Module, index: int, group: list[LinearSpec]) -> Stats:
        """Statistics of the input that `group` shares; `before` is the block as it was, `block` pruned so far."""
        path, width = group[0].path, group[0].in_features
        square, row = (width, width), (width,)
        sums = _Sums(torch.zeros(square), torch.zeros(square), torch.zeros(row), torch.zeros(row))
        residual = next((entry.stream for entry in self.residuals if entry.path == path), None)
        whole = _part(path) if residual is not None else ""  # its last layer: nearly done anyway
        for position in range(len(self.pruned.stream.hidden)):
            dense, beside_dense = self.dense.inputs(before, index, position, path, residual, whole)
            pruned, beside_pruned = self.pruned.inputs(block, index, position, path, residual)
            lost = None
            if beside_dense is not None and beside_pruned is not None:
                lost = beside_dense.float() - beside_pruned.float()
            sums.add(pruned, dense, lost)
        stats = sums.stats(self.pruned.stream.sequences)
        return replace(stats, cross=None) if path in self.own else stats

    def advance(self, before: nn.Module, block: nn.Module, index: int) -> None:
        """Send both on to the next block."""
        self.dense.advance(before, index)
        self.pruned.advance(block, index)


def _parts(block: nn.Module) -> dict[str, nn.Module]:
    """The modules right under the block that hold linear layers, without being one: attention, feed-forward."""
    return {
        name: part
        for name, part in block.named_children()
        if not is_linear(part) and any(is_linear(module) for module in part.modules())
    }


def _part(path: str) -> str:
    """The name of the part that the layer at `path` is in; "" where it lies right under the block."""
    name, _, rest = path.partition(".")
    return name if rest else ""


def _keep(known: Outputs, name: str, stop: bool) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_module: nn.Module, _given: Any, output: Any) -> None:
        known[name] = output
        if stop:
            raise _ReachedError

    return keep


@contextlib.contextmanager
def _hooks(block: nn.Module, hooks: dict[str, Hook]) -> Iterator[None]:
    handles = [block.get_submodule(path).register_forward_pre_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
