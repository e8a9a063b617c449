"""The judge of candidates: how far each one is from the dense model on the search text, many candidates in one walk.

All candidates go through the blocks together. At every block those that have been alike so far share one hidden state,
and those that want the block equally narrow share its slicing; so a block is read once, a level once, and a prefix is
computed once however many candidates have it. Blocks really are narrow while they run, not masked.

Fitness "logits" is the paper's default: KL(dense || candidate) over the top-k logits of the dense model, both
normalised over that set, as in the public code; lower is better. "hidden" (the other term of Eq. 6) is the squared
difference of hidden states behind the middle and the last block over the dense ones' square, alike weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError, NumericalError
from crepe_deploy.model.calibrate import Stream, embed
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.nearest import unknown

from .levels import layer_plan
from .narrow import narrowed
from .plan import Geometry
from .supernet import Store
from .units import Width

FITNESSES = ("logits", "hidden")
LOGIT_ROWS = 512
INDEX_BYTES, VALUE_BYTES = 4, 4

Candidate = tuple[Width, ...]


@dataclass(frozen=True)
class Reference:
    """What the dense model says of every window, on the CPU.

    tokens: int64 (windows, length). indices (windows, length, k) int32 and likely (the same) fp32: the k largest
    logits of every position and their log-probabilities within this set. hidden: by block index, the hidden states
    (windows, length, width) behind it, compute dtype. Only what the fitness reads is there.
    """

    tokens: Tensor
    indices: Tensor | None
    likely: Tensor | None
    hidden: dict[int, Tensor]

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self.tokens)


def cache_bytes(decoder: Decoder, tokens: Tensor, fitness: str, top_k: int) -> int:
    """Memory that the reference takes. Raises ConfigError for an unknown fitness."""
    if fitness not in FITNESSES:
        raise ConfigError(unknown("--fitness", fitness, FITNESSES))
    if fitness == "logits":
        return tokens.numel() * min(top_k, decoder.vocab_size) * (INDEX_BYTES + VALUE_BYTES)
    return tokens.numel() * len(_watched(decoder)) * int(decoder.config.hidden_size) * decoder.dtype.itemsize


def _watched(decoder: Decoder) -> list[int]:
    last = len(decoder.blocks) - 1
    return sorted({last // 2, last})


@torch.inference_mode()
def dense_reference(decoder: Decoder, tokens: Tensor, fitness: str, top_k: int) -> Reference:
    """Run the dense model over all windows once and keep what `fitness` compares with."""
    (stream,) = embed(decoder, [tokens])
    watched = _watched(decoder) if fitness == "hidden" else []
    hidden: dict[int, Tensor] = {}
    for index in range(len(decoder.blocks)):
        with decoder.block(index) as (block, _):
            stream.run(block, index, advance=True)
        if index in watched:
            hidden[index] = torch.cat(stream.hidden).cpu()
    if fitness == "hidden":
        return Reference(tokens, None, None, hidden)
    count = min(top_k, decoder.vocab_size)
    indices = torch.empty((*tokens.shape, count), dtype=torch.int32)
    likely = torch.empty((*tokens.shape, count))
    with decoder.head() as head:
        for window, states in enumerate(torch.cat(stream.hidden)):
            logits = head(tokens[window : window + 1], states[None])[0]
            for first in range(0, len(logits), LOGIT_ROWS):
                rows = slice(first, first + LOGIT_ROWS)
                values, places = logits[rows].float().topk(count)
                indices[window, rows] = places.to(torch.int32).cpu()
                likely[window, rows] = torch.log_softmax(values, dim=-1).cpu()
    return Reference(tokens, indices, likely, {})


@dataclass
class FitnessJudge:
    """Measures candidates against the dense reference. evaluated: candidates so far, by windows they were run on."""

    decoder: Decoder
    geometry: Geometry
    reference: Reference
    store: Store
    evaluated: dict[int, int] = field(default_factory=dict)
    blocks_run: int = 0
    blocks_alone: int = 0

    @torch.inference_mode()
    def __call__(self, candidates: Sequence[Candidate], windows: Sequence[int]) -> list[float]:
        """The fitness of each candidate on these windows, a mean over their tokens; lower is better.

        Raises NumericalError where a candidate gives NaN, VerifyError naming a damaged level.
        """
        chosen = torch.tensor(windows)
        (stream,) = embed(self.decoder, [self.reference.tokens[chosen]])
        nodes = [0] * len(candidates)
        hidden: dict[int, list[Tensor]] = {0: stream.hidden}
        distance = [0.0] * len(candidates)
        for index in range(len(self.decoder.blocks)):
            nodes, hidden = self._advance(index, candidates, nodes, hidden, stream)
            if index in self.reference.hidden:
                per_node = {node: self._difference(states, index, chosen) for node, states in hidden.items()}
                distance = [before + per_node[node] for before, node in zip(distance, nodes, strict=True)]
        self.evaluated[len(windows)] = self.evaluated.get(len(windows), 0) + len(candidates)
        if self.reference.hidden:
            fitness = [total / len(self.reference.hidden) for total in distance]
        else:
            per_node = self._divergences(hidden, chosen)
            fitness = [per_node[node] for node in nodes]
        for candidate, value in zip(candidates, fitness, strict=True):
            if not value < float("inf"):
                raise NumericalError(f"a candidate gives NaN or infinite outputs; its first layer is {candidate[0]}")
        return fitness

    def _advance(
        self, index: int, candidates: Sequence[Candidate], nodes: list[int], hidden: dict[int, list[Tensor]],
        stream: Stream,
    ) -> tuple[list[int], dict[int, list[Tensor]]]:  # fmt: skip
        """One block for all: the node of each candidate behind it, and each node's hidden states."""
        wanted: dict[Width, dict[int, int]] = {}
        after: list[int] = []
        count = 0
        for candidate, node in zip(candidates, nodes, strict=True):
            children = wanted.setdefault(candidate[index], {})
            if node not in children:
                children[node] = count
                count += 1
            after.append(children[node])
        uses = {node: sum(node in children for children in wanted.values()) for node in set(nodes)}
        behind: dict[int, list[Tensor]] = {}
        with self.decoder.block(index) as (block, _):
            for width, children in wanted.items():
                attention = self.store.attention(index, (width.groups, width.queries))
                plan = layer_plan(attention, self.store.neurons(index, width.neurons))
                with narrowed(block, plan, self.geometry):
                    for node, child in children.items():
                        states = list(hidden[node])
                        Stream(states, stream.calls).run(block, index, advance=True)
                        behind[child] = states
                        uses[node] -= 1
                        if not uses[node]:
                            del hidden[node]
        self.blocks_run += count
        self.blocks_alone += len(candidates)
        return after, behind

    def _difference(self, states: list[Tensor], index: int, chosen: Tensor) -> float:
        dense = self.reference.hidden[index][chosen].to(states[0].device).float()
        return float((torch.cat(states).float() - dense).square().sum() / dense.square().sum())

    def _divergences(self, hidden: dict[int, list[Tensor]], chosen: Tensor) -> dict[int, float]:
        assert self.reference.indices is not None and self.reference.likely is not None
        tokens = self.reference.tokens[chosen]
        totals = dict.fromkeys(hidden, 0.0)
        with self.decoder.head() as head:
            for node, states in hidden.items():
                for place, state in enumerate(torch.cat(states)):
                    logits = head(tokens[place : place + 1], state[None])[0]
                    window = int(chosen[place])
                    places, likely = self.reference.indices[window], self.reference.likely[window]
                    totals[node] += top_k_divergence(logits, places.to(logits.device), likely.to(logits.device))
        return {node: total / tokens.numel() for node, total in totals.items()}


def top_k_divergence(logits: Tensor, indices: Tensor, likely: Tensor) -> float:
    """Sum over positions of KL(dense || candidate) in nats within the dense top-k set.

    logits: (length, vocabulary), any float dtype. indices, likely: (length, k), see `Reference`.
    """
    candidate = torch.log_softmax(logits.gather(1, indices.long()).float(), dim=-1)
    return float((likely.exp() * (likely - candidate)).sum(dtype=torch.float64))


Evaluate = Callable[[Sequence[Candidate], Sequence[int]], list[float]]
