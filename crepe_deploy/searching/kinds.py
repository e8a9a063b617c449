"""Coefficients that adapt to the kind of layer (q, k, v, o, gate, up, down), found by whole passes of the masked model.

What a layer's own output loses ranks settings wrongly, and so does a block's (docs/methods.md). So every candidate is
judged as a whole model: its KL to the dense one on the search text, masks made from one collection of dense statistics.

1. Start at the one setting for all layers that has the least KL: the anchors and a few more.
2. For each kind, that of most weights first, judge the other families at its exponent, and its family at an exponent a
   step up and down; keep the best of those that are better on both halves of the windows, so that none is kept for
   what it gains on one text. One walk is all: the count of passes is known before. Wanda, which is CRePE with beta 0
   where zeros are counted in groups or rows, is the result where nothing came below it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from crepe_deploy.model.decoder import LinearSpec
from crepe_deploy.progress import Say
from crepe_deploy.pruning.targets import kind_of

from .evaluate import Evaluator
from .hybrid import SearchResult
from .losses import Losses
from .optimise import Expired
from .space import Setting, anchors

STEP: Final = 0.25  # of the exponent
RIA: Final = {"alpha": 1.0, "beta": 1.0, "gamma": 0.0, "kernel_size": 7, "neighbourhood": "smooth"}
FAMILIES: Final[tuple[dict[str, Any], ...]] = (
    RIA,
    {**RIA, "gamma": 0.1},
    {**RIA, "gamma": 0.3, "neighbourhood": "column"},
    {**RIA, "beta": 0.0},  # Wanda's masks in groups and rows, at exponent 1
    {**RIA, "beta": 3.0},
)
STARTS: Final = (*({**family, "exponent": 0.75} for family in FAMILIES[:3]), {**FAMILIES[3], "exponent": 1.0})


def kinds_of(targets: list[list[LinearSpec]]) -> list[str]:
    """The kinds of the layers to prune, that of most weights first."""
    sizes: Counter[str] = Counter()
    for spec in (spec for block in targets for spec in block):
        sizes[kind_of(spec.path)] += spec.in_features * spec.out_features
    return [kind for kind, _ in sizes.most_common()]


def candidates(params: dict[str, Any]) -> list[dict[str, Any]]:
    """What is tried in place of these hyperparameters."""
    exponent = params["exponent"]
    others = [{**family, "exponent": exponent} for family in FAMILIES]
    moved = [{**params, "exponent": value} for value in (exponent + STEP, exponent - STEP) if value >= 0]
    return [other for other in [*others, *moved] if other != params]


def walk(evaluator: Evaluator, *, evaluations: int, expired: Expired, say: Say) -> SearchResult:
    """Steps 1 and 2. It ends early where the next kind would exceed `evaluations` settings, or once `expired`."""
    starts = [*anchors().values(), *(Setting("crepe", dict(params)) for params in STARTS)]
    judged = {setting.key: (setting, own) for setting, own in zip(starts, evaluator.losses(starts), strict=True)}
    known = sorted(judged.values(), key=lambda pair: pair[1].mean_kl)
    current, losses = next(pair for pair in known if pair[0].method == "crepe")
    for kind in kinds_of(evaluator.targets):
        tried = [Setting("crepe", current.params, {**current.kinds, kind: own}) for own in candidates(current.params)]
        if len(judged) + len(tried) > evaluations or expired():
            break
        pairs = list(zip(tried, evaluator.losses(tried, f"settings for {kind}"), strict=True))
        judged |= {setting.key: (setting, own) for setting, own in pairs}
        better = [pair for pair in pairs if _on_both_halves(pair[1], losses)]
        current, losses = min([*better, (current, losses)], key=lambda pair: pair[1].mean_kl)
        say(f"{kind}: {_words(current, kind)}, KL {losses.mean_kl:.4f} after {len(judged)} passes")
    best = current if losses.mean_kl <= known[0][1].mean_kl else known[0][0]
    return SearchResult(list(judged.values()), len(judged), [], best)


def _on_both_halves(new: Losses, old: Losses) -> bool:
    half = len(new.kl) // 2
    return sum(new.kl[:half]) < sum(old.kl[:half]) and sum(new.kl[half:]) < sum(old.kl[half:])


def _words(setting: Setting, kind: str) -> str:
    own = setting.kinds.get(kind)
    return "as all" if own is None else ", ".join(f"{name} {value}" for name, value in own.items() if name != "alpha")
