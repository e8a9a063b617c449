"""The losses of masked models: KL to the dense one, and likelihood, of several settings in one walk over the blocks.

Each block is loaded once; for every setting it is masked as `prune` masks it with dense statistics, run on that
setting's hidden states, and restored. So memory holds one block, a copy of it, and hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crepe_deploy.errors import ConfigError, NumericalError
from crepe_deploy.model.calibrate import Stream, embed
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import Pattern
from crepe_deploy.progress import Progress, silent
from crepe_deploy.pruning.methods.base import ScoreMethod, SolveMethod
from crepe_deploy.pruning.targets import kind_of
from crepe_deploy.select import select

from .space import Setting

LOGIT_ROWS = 256


@dataclass(frozen=True)
class Losses:
    """Means over the predicted tokens of each window, in nats: KL(dense || pruned), and negative log likelihood."""

    kl: list[float]
    nll: list[float]

    @property
    def mean_kl(self) -> float:
        """Over all windows, which are equally long."""
        return sum(self.kl) / len(self.kl)

    @property
    def mean_nll(self) -> float:
        """Over all windows; its exponential is the perplexity."""
        return sum(self.nll) / len(self.nll)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MaskedModel:
    """A model to mask, the tokens (windows, length) that losses are taken on, and the dense statistics behind masks."""

    decoder: Decoder
    targets: list[list[LinearSpec]]
    pattern: Pattern
    tokens: Tensor
    col_norms: Mapping[str, Tensor]

    @torch.inference_mode()
    def __call__(self, settings: list[Setting], step: Progress = silent) -> list[Losses]:
        """The losses of every setting. Raises ConfigError for a method that is no score, NumericalError for NaN."""
        kinds = {kind_of(spec.path) for block in self.targets for spec in block}
        methods = [{kind: _score_method(setting, kind) for kind in kinds} for setting in settings]
        dense = embed(self.decoder, [self.tokens])[0]
        streams = [Stream(list(dense.hidden), dense.calls) for _ in settings]
        for index, specs in enumerate(self.targets):
            with self.decoder.block(index) as (block, weights):
                for by_kind, stream in zip(methods, streams, strict=True):
                    self._run_masked(by_kind, stream, block, index, specs, weights)
                dense.run(block, index, advance=True)
            step(index + 1, len(self.targets))
        return self._compare(settings, dense, streams)

    def _run_masked(
        self,
        methods: Mapping[str, ScoreMethod],
        stream: Stream,
        block: nn.Module,
        index: int,
        specs: list[LinearSpec],
        weights: Mapping[str, Tensor],
    ) -> None:
        memo: dict[int, Stats] = {}
        dense: list[tuple[Tensor, Tensor]] = []
        try:
            for spec in specs:
                stored = weights[spec.key]
                weight = stored.T if spec.transposed else stored
                norm = self.col_norms[spec.key]
                stats = memo.setdefault(norm.data_ptr(), Stats(col_norm=norm))
                mask = select(methods[kind_of(spec.path)].score(weight, stats), self.pattern)
                computed: Tensor = block.get_submodule(spec.path).get_parameter("weight")
                dense.append((computed, computed.clone()))
                computed.masked_fill_(~(mask.T if spec.transposed else mask), 0)
            stream.run(block, index, advance=True)
        finally:
            for computed, before in dense:
                computed.copy_(before)

    def _compare(self, settings: list[Setting], dense: Stream, streams: list[Stream]) -> list[Losses]:
        losses = [Losses([], []) for _ in settings]
        windows = [torch.cat(stream.hidden) for stream in (dense, *streams)]
        for number, ids in enumerate(self.tokens):
            likely = torch.log_softmax(self._logits(ids, windows[0][number]), dim=-1)
            reference = likely.exp()  # shared by all settings, as is its entropy
            entropy = -torch.linalg.vecdot(reference, likely)
            for setting, own, hidden in zip(settings, losses, windows[1:], strict=True):
                logits = self._logits(ids, hidden[number])
                kl, nll = _compare_logits(reference, entropy, logits, ids[1:].to(logits.device))
                if not kl + nll < float("inf"):
                    raise NumericalError(f"{setting.key} gives NaN or infinite likelihoods on the search text")
                own.kl.append(kl)
                own.nll.append(nll)
        return losses

    def _logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        return self.decoder.logits(ids[None], hidden[None])[0, :-1]


def _score_method(setting: Setting, kind: str) -> ScoreMethod:
    method = setting.build(kind)
    if isinstance(method, SolveMethod):
        raise ConfigError(f"method '{setting.method}' updates weights and cannot be searched; search scores only")
    return method


def _compare_logits(reference: Tensor, entropy: Tensor, logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Mean KL and mean negative log likelihood of `logits` (n, vocabulary).

    reference: the dense model's probabilities (n, vocabulary); entropy: their entropies (n,).
    """
    kl, nll = 0.0, 0.0
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        likely = torch.log_softmax(logits[rows], dim=-1)
        cross = torch.linalg.vecdot(reference[rows], likely)
        kl -= float((entropy[rows] + cross).clamp_max(0).double().sum())
        nll -= float(likely.gather(1, targets[rows, None]).double().sum())
    return kl / len(targets), nll / len(targets)
