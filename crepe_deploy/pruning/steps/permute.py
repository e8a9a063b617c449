"""Channel permutation: reorder the input columns of a layer so that its N:M groups lose less score. Pure maths; which
layers can be reordered for free is in `folds`.

Two stages, after RIA (Zhang et al., ICLR 2024). `spread_columns` deals columns sorted by their total score over the
groups. `assign_columns` then improves an order slot by slot: it takes one column out of every group and gives the
columns back by linear sum assignment. With t_rb the N-th largest score of row r among those that stay in group b,
column j is worth sum_r max(0, S_rj - t_rb) there. The column a group had is among its choices, so no slot lowers what
is retained; and the order that was there is kept where the search finds none better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crepe_deploy.errors import NumericalError
from crepe_deploy.model.stats import Need

from ..methods.base import check_range


@dataclass(frozen=True)
class Fold:
    """Reorder what folds into the layers before at no cost at run time: FFN neurons, and channels within a head."""

    rounds: int = 1
    needs: ClassVar[frozenset[Need]] = frozenset({"col_norm"})

    def __post_init__(self) -> None:
        check_range("rounds", self.rounds, 1)

    def search(self, score: Tensor, n: int, m: int) -> Tensor:
        """`score` (rows, in), higher = keep -> the order (in,) int64: new column i was column order[i].

        What is retained is never less than in the given order.
        """
        identity = torch.arange(score.shape[1], device=score.device)
        if score.shape[1] == m:
            return identity  # one group: every order keeps the same
        best, retained = identity, retained_score(score, n, m)
        for start in (spread_columns(score, m), identity):
            order = start
            for _ in range(self.rounds):
                order = assign_columns(score, order, n, m)
            reached = retained_score(score[:, order], n, m)
            if reached > retained:
                best, retained = order, reached
        return best

    def gain(self, score: Tensor, order: Tensor, n: int, m: int) -> float:
        """What `order` retains over what the given order does, less 1."""
        return retained_score(score[:, order], n, m) / max(retained_score(score, n, m), 1e-30) - 1


Permuter = Fold
PERMUTERS: dict[str, type[Fold]] = {"fold": Fold}


def retained_score(score: Tensor, n: int, m: int) -> float:
    """The sum of what N:M keeps of `score` (rows, in)."""
    return float(score.float().reshape(-1, m).topk(n, dim=1).values.sum(dtype=torch.float64))


def spread_columns(score: Tensor, m: int) -> Tensor:
    """RIA's first stage: an order (in,) in which every group gets one column of each m-th part by importance.

    Columns ascend by their sum; slot s of group b comes from part s, taken forwards for even s and backwards for odd.
    """
    parts = score.sum(0, dtype=torch.float64).argsort(stable=True).view(m, -1)
    flipped = [part if slot % 2 == 0 else part.flip(0) for slot, part in enumerate(parts)]
    return torch.stack(flipped, dim=1).flatten()


def assign_columns(score: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """RIA's second stage, one round over all slots: an order (in,) whose retained score is at least that of `order`."""
    groups = order.view(-1, m).clone()
    for slot in range(m):
        others = torch.cat([groups[:, :slot], groups[:, slot + 1 :]], dim=1)
        taken = groups[:, slot]
        groups[:, slot] = taken[_assign(worth(score, others, taken, n))]
    return groups.flatten()


def worth(score: Tensor, others: Tensor, columns: Tensor, n: int) -> Tensor:
    """(groups, columns) fp64: what each column adds to what each group retains.

    score (rows, in); others (groups, m - 1), the columns that stay; columns (k,), those to give.
    """
    staying = score[:, others]  # (rows, groups, m - 1)
    limits = staying.topk(n, dim=2).values[:, :, -1].T.float().contiguous()  # (groups, rows)
    offered = score[:, columns].T.float().contiguous()  # (columns, rows)
    gain = torch.empty(len(limits), len(offered), dtype=torch.float64, device=score.device)
    excess = torch.empty_like(offered)  # one group's at a time, so that it stays in the cache
    for group, limit in enumerate(limits):
        gain[group] = torch.sub(offered, limit, out=excess).clamp_(min=0).sum(1)
    return gain


def _assign(gain: Tensor) -> Tensor:
    """For each row of `gain` (k, k) the column it gets, so that the sum is largest."""
    from scipy.optimize import linear_sum_assignment

    if not torch.isfinite(gain).all():
        raise NumericalError(
            "the scores are too large to compare what columns add: smaller hyperparameters, or --dtype float32"
        )
    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]).to(gain.device)
