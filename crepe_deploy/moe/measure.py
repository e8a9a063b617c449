"""What the experts of every layer do on the calibration text: one pass, one block in memory, each output computed once.

All that any method reads is measured, so that one measurement serves every method and every ratio.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor, nn

from crepe_deploy.device import CPU, device_of
from crepe_deploy.errors import NumericalError
from crepe_deploy.model.blocks import expert_layer
from crepe_deploy.model.calibrate import embed
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.experts import Spread
from crepe_deploy.progress import Progress, going_on, silent

from .kept import Kept

PART_NUMBERS: Final = 1 << 24  # in memory at a time for the outputs of single experts, fp32


@dataclass(frozen=True)
class LayerStats:
    """Sums over the tokens of a layer, for each of its experts; fp32.

    tokens (experts,): that were routed to it. weights: their router weights. reap: of router weight x norm of output.
    gram (experts, experts): inner products of what the layer's output gains when the one, and when the other, is gone.

    Without an expert its tokens go to those left and to the router's next one, its weight spread as the model would
    without its row; the choice of groups stays.
    """

    tokens: Tensor
    weights: Tensor
    reap: Tensor
    gram: Tensor

    @classmethod
    def zeros(cls, experts: int, device: torch.device = CPU) -> LayerStats:
        """Of nothing seen yet; fp64."""
        shapes = {field.name: (experts,) for field in fields(cls)} | {"gram": (experts, experts)}
        return cls(**{name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()})


class Meter:
    """Stands where the experts of a layer compute: gives their output and adds to `stats`.

    spread: as of `Experts.spread`.
    """

    def __init__(self, router: nn.Module, experts: nn.Module, spread: Spread) -> None:
        self.router: Any = router
        self.compute: Callable[..., Tensor] = experts.forward
        self.spread = spread
        self.count = len(experts.get_parameter("down_proj"))
        self.stats = LayerStats.zeros(self.count, device_of(experts))

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The experts' output; hidden (tokens, width), chosen and weights (tokens, experts for a token)."""
        size = max(1, PART_NUMBERS // (4 * (chosen.shape[1] + 1) * hidden.shape[1]))
        parts = zip(*(torch.split(tensor, size) for tensor in (hidden, chosen, weights)), strict=True)
        return torch.cat([self._part(*part) for part in parts])

    def _part(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        following, its_weight = self._following(hidden, chosen, weights)
        outputs = self._outputs(hidden, torch.cat([chosen, following], dim=1))
        given = weights.float().unsqueeze(-1)
        shares = outputs[:, :-1] * given
        whole = shares.sum(1, keepdim=True)
        without = whole - shares + outputs[:, -1:] * its_weight.unsqueeze(-1)
        total = given.sum(1, keepdim=True)
        if self.spread == "chosen":
            without = without * (total / (total - given + its_weight.unsqueeze(-1)))
        elif self.spread == "all":
            without = without / (1 - given).clamp(min=1e-6)
        self._add(chosen, given.squeeze(-1), torch.linalg.vector_norm(shares, dim=-1), without - whole)
        return whole.squeeze(1).to(hidden.dtype)

    def _following(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The expert that the router would choose next, (tokens, 1), and its weight beside the others'."""
        self.router.top_k += 1
        try:
            _, more, longer = self.router(hidden)
        finally:
            self.router.top_k -= 1
        known = (longer.unsqueeze(-1) == chosen.unsqueeze(1)).any(-1)
        place = (~known).int().argmax(1, keepdim=True)
        following, its_weight = longer.gather(1, place), more.float().gather(1, place)
        if self.spread == "chosen":  # the longer choice sums to the same as the shorter one
            total = weights.float().sum(1, keepdim=True)
            its_weight = its_weight * (total / (more.float().sum(1, keepdim=True) - its_weight))
        return following, its_weight

    def _outputs(self, hidden: Tensor, asked: Tensor) -> Tensor:
        """What each asked expert makes of its token, (tokens, asked, width), fp32."""
        outputs = hidden.new_empty(*asked.shape, hidden.shape[1], dtype=torch.float32)
        for expert in torch.unique(asked).tolist():
            rows, places = (asked == expert).nonzero(as_tuple=True)
            alone, ones = asked.new_full((len(rows), 1), expert), hidden.new_ones(len(rows), 1)
            outputs[rows, places] = self.compute(hidden[rows], alone, ones).float()
        return outputs

    def _add(self, chosen: Tensor, weights: Tensor, norms: Tensor, changes: Tensor) -> None:
        experts, stats = chosen.flatten(), self.stats
        stats.tokens.add_(torch.bincount(experts, minlength=self.count))
        stats.weights.index_add_(0, experts, weights.flatten().double())
        stats.reap.index_add_(0, experts, norms.flatten().double())
        pairs = chosen.unsqueeze(2) * self.count + chosen.unsqueeze(1)
        products = changes @ changes.transpose(1, 2)
        stats.gram.view(-1).index_add_(0, pairs.flatten(), products.flatten().double())


@contextlib.contextmanager
def metered(router: nn.Module, experts: nn.Module, spread: Spread) -> Iterator[Meter]:
    """Inside, the experts of a layer compute through a meter."""
    meter = Meter(router, experts, spread)
    experts.forward = meter
    try:
        yield meter
    finally:
        del experts.forward


def measure(
    decoder: Decoder, tokens: Tensor, step: Progress = silent, kept: Kept | None = None
) -> dict[int, LayerStats]:  # fmt: skip
    """The statistics of every layer with experts, by its number, on tokens (samples, length) through the dense model.

    decoder: made with `experts=True`. kept: what a stopped measurement left, and where this one's layers go.
    Raises NumericalError naming a layer whose outputs are not finite, and what `kept` raises.
    """
    assert decoder.experts is not None
    spread = decoder.experts.spread(decoder.config)
    (stream,) = embed(decoder, [tokens])
    found: dict[int, LayerStats] = {}
    done = -1 if kept is None else kept.last(len(decoder.blocks))
    if kept is not None and done >= 0:
        kept.restore(done, stream)
        stats = {index: kept.stats(index) for index in range(done + 1)}
        found = {index: LayerStats(**tensors) for index, tensors in stats.items() if tensors}
        going_on(step, done + 1)
    for index in range(done + 1, len(decoder.blocks)):
        with decoder.block(index) as (block, _):
            layer = expert_layer(block, decoder.experts)
            if layer is None:
                stream.run(block, index, advance=True)
            else:
                with metered(*layer, spread) as meter:
                    stream.run(block, index, advance=True)
                found[index] = _closed(meter.stats, index)
        if kept is not None:
            kept.note(index, vars(found[index]) if index in found else {}, stream)
        step(index + 1, len(decoder.blocks))
    return found


def _closed(stats: LayerStats, index: int) -> LayerStats:
    values = {field.name: getattr(stats, field.name).to(CPU, torch.float32) for field in fields(LayerStats)}
    if not all(value.isfinite().all() for value in values.values()):
        raise NumericalError(f"layer {index}: its experts' outputs are not finite: compute with --dtype float32")
    return LayerStats(**values)
