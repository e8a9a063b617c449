"""Calibration with `--feed both`: the dense and the pruned model's activations walk side by side, layer by layer.

Each layer's statistics are taken behind everything pruned so far, the earlier layers of its own block included, and
beside them what the dense model has at the same place. Reconstruction can then aim at the dense model's output, and,
where a layer adds its output to the residual stream, make up for what that stream has lost already: D W^T + R is wanted
of it, with D its input in the dense model and R the stream there less the pruned model's.

Where an RMS norm of gain g stands between the output y and the stream (Gemma 2 and 3), what is added is g * y / rms(y).
Taken to first order, with the dense model's rms for either's, that is linear again: a token's input and output count
1 / rms(y) times, and a channel's share of R is to come from an output of R / g. Exactly that would ask everything of
the channels with the least gain, at the cost of all others, for the norm divides by what they have in common; so it
is R g / (g^2 + RIDGE * mean g^2) that is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from crepe_deploy.device import device_of, moved
from crepe_deploy.progress import unheard

from .blocks import is_linear
from .calibrate import Stream, bf16_products, shared_inputs
from .decoder import LinearSpec
from .families import Residual, family_of
from .stats import Stats, Variety, check_inputs

EPSILON = 1e-6  # to the mean square in an RMS norm
RIDGE = (
    0.1  # of 0, 0.1, 0.3, 1, 3 on toy models: within 1 % of the best for gains near 1; 0 fails for gains of many sizes
)
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
    power: Tensor | None = None
    drift: Tensor | None = None
    tokens: int = 0
    variety: Variety = field(default_factory=Variety)

    @classmethod
    def of(cls, width: int, device: torch.device) -> _Sums:
        """Nothing yet, for inputs (..., width)."""
        gram, cross = (torch.zeros(width, width, device=device) for _ in range(2))
        return cls(gram, cross, torch.zeros(width, device=device), torch.zeros(width, device=device))

    def add(self, pruned: Tensor, dense: Tensor, residual: Tensor | None, scale: Tensor | None) -> None:
        """`pruned`, `dense` (..., in); `residual` (..., width) fp32 or None; `scale` (..., 1), tokens' weights."""
        x, d = (batch.flatten(0, -2).float() for batch in (pruned, dense))
        self.squares += d.square().sum(0)
        self.total += x.sum(0)
        self.tokens += len(x)
        self.variety.see(x)
        if scale is not None:
            power = x.square().sum(0)
            self.power = power if self.power is None else self.power.add_(power)
            x, d = (rows * scale.reshape(-1, 1) for rows in (x, d))
        with bf16_products(pruned.dtype == torch.bfloat16 and scale is None):
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(d.T, x)
            if residual is not None:  # may round what is left of a residual; a sum over all tokens does not feel it
                product = residual.flatten(0, -2).T @ x
                self.drift = product if self.drift is None else self.drift.add_(product)

    def stats(self, sequences: int) -> Stats:
        """Closed: col_norm is the dense input's, everything else the pruned one's."""
        mean = self.total / self.tokens
        power = self.gram.diagonal() if self.power is None else self.power
        variance = (power / self.tokens).sub_(mean.square_()).clamp_(min=0)
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
    """One of the two models' hidden states, and what the finished parts of the present block returned for them.

    Outputs rest where the hidden states do.
    """

    stream: Stream
    outputs: list[Outputs] = field(default_factory=list)

    @torch.inference_mode()
    def inputs(
        self, block: nn.Module, index: int, position: int, path: str, residual: Residual | None, whole: str = ""
    ) -> tuple[Tensor, Tensor | None]:
        """What the layer at `path` reads, and the stream that its output is added to (fp32), for one micro-batch.

        Parts that return before that layer is reached are finished, for the layers come in the order of their calls:
        they are not run again. whole: a part that is to be finished as well.
        """
        hidden = self.stream.hidden[position].to(device_of(block))
        read: dict[str, Tensor] = {"": hidden}

        def note(name: str, stop: bool) -> Hook:
            def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
                read.setdefault(name, given[0])
                if stop:
                    raise _ReachedError

            return hook

        hooks = {path: note(path, not whole)}
        if residual is not None and residual.stream:
            hooks[residual.stream] = note(residual.stream, False)
        with _hooks(block, hooks), self._replayed(block, position, path, whole), contextlib.suppress(_ReachedError):
            self.stream.calls[position][index](block, hidden)
        if residual is None:
            return read[path], None
        stream = read[residual.stream].float()
        beside = (self.output(position, part).to(stream.device).float() for part in residual.beside)
        return read[path], sum(beside, stream)

    def output(self, position: int, part: str) -> Tensor:
        """What a finished part of the present block returned for a micro-batch: its first tensor."""
        returned = self.outputs[position][part]
        tensor: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return tensor

    def advance(self, block: nn.Module, index: int) -> None:
        """Send the hidden states through the block and forget its parts."""
        for position in range(len(self.stream.hidden)):
            call, hidden = self.stream.calls[position][index], self.stream.hidden[position]
            with torch.inference_mode(), self._replayed(block, position):
                self.stream.hidden[position] = call(block, hidden.to(device_of(block))).to(hidden.device)
        self.outputs = []

    @contextlib.contextmanager
    def _replayed(self, block: nn.Module, position: int, path: str = "", whole: str = "") -> Iterator[None]:
        """Inside, parts with a known output return it, but for the one that `path` is in; other outputs are noted."""
        self.outputs = self.outputs or [{} for _ in self.stream.hidden]
        known, device = self.outputs[position], device_of(block)
        handles, replaced = [], []
        for name, part in _parts(block).items():
            if name in known and name != _part(path):
                part.forward = lambda *_, output=known[name], **__: moved(output, device)
                replaced.append(part)
            else:
                rest = self.stream.hidden[position].device
                handles.append(part.register_forward_hook(_keep(known, name, rest, name == whole)))
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
    def start(cls, stream: Stream, config: Any) -> Pair:
        """Both sides in front of the first block, where they are equal; config: transformers' of the model."""
        return cls(Side(stream), Side(stream.twin()), residuals_of(config))

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

    def stats(
        self,
        before: nn.Module,
        block: nn.Module,
        index: int,
        group: list[LinearSpec],
        tick: Callable[[float], None] = unheard,
    ) -> Stats:
        """Statistics of the input that `group` shares; `before` is the block as it was, `block` pruned so far.

        tick: told the share of this that each micro-batch was.
        """
        path, width = group[0].path, group[0].in_features
        sums = _Sums.of(width, device_of(block))
        residual = next((entry for entry in self.residuals if entry.path == path), None)
        whole = _part(path) if residual is not None else ""  # its last layer: nearly done anyway
        gain = None if residual is None or not residual.norm else _gain(before.get_submodule(residual.norm))
        for position in range(len(self.pruned.stream.hidden)):
            dense, beside_dense = self.dense.inputs(before, index, position, path, residual, whole)
            pruned, beside_pruned = self.pruned.inputs(block, index, position, path, residual)
            lost = None if beside_dense is None or beside_pruned is None else beside_dense - beside_pruned
            scale = None
            if gain is not None and lost is not None:
                added = self.dense.output(position, whole).to(lost.device).float()
                scale = added.square().mean(-1, keepdim=True).add(EPSILON).rsqrt()
                lost *= gain / (gain.square() + RIDGE * gain.square().mean())
            sums.add(pruned, dense, lost, scale)
            tick(1 / len(self.pruned.stream.hidden))
        stats = sums.stats(self.pruned.stream.sequences)
        check_inputs(group[0].key, stats, varied=sums.variety.varied)
        return replace(stats, cross=None) if path in self.own else stats

    def advance(self, before: nn.Module, block: nn.Module, index: int) -> None:
        """Send both on to the next block."""
        self.dense.advance(before, index)
        self.pruned.advance(block, index)


def residuals_of(config: Any) -> tuple[Residual, ...]:
    """What is known of the layers that write to the residual stream of a model with this configuration."""
    return tuple(entry for entry in family_of(config.model_type).residuals if entry.holds(config))


def _gain(norm: nn.Module) -> Tensor:
    """The gain (width,) fp32 of an RMS norm, however it is stored: what the norm makes of ones."""
    weight = norm.get_parameter("weight")
    with torch.inference_mode():
        gain: Tensor = norm(torch.ones_like(weight))
    return gain.float()


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


def _keep(known: Outputs, name: str, rest: torch.device, stop: bool) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_module: nn.Module, _given: Any, output: Any) -> None:
        known[name] = moved(output, rest)
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
