"""CRePE: RIA's relative importance with row and column coefficients and a 2D local neighbourhood term.

The paper (arXiv 2606.01544) publishes the three terms, one coefficient each, and a kernel size, but not the exact
formula. Here, with R = `relative_importance`:

S_ij = (R_ij + gamma * neighbourhood_ij) * ||X_j||_2 ^ exponent

`neighbourhoods` has the forms: two local windows, which are how we read the paper, and means without locality, ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Need, Stats, need_col_norm
from crepe_deploy.nearest import unknown

from .base import Feed, check_range
from .neighbourhoods import Neighbourhood, with_neighbourhood
from .ria import relative_importance


@dataclass(frozen=True)
class Crepe:
    """`alpha` weighs the row term, `beta` the column term, `gamma` the neighbourhood of this name.

    kernel_size: the odd side of a window, or the even number of columns of a group; other forms have no size.
    The defaults are exactly RIA; what makes it CRePE is data, in presets.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.0
    kernel_size: int = 7
    exponent: float = 0.5
    neighbourhood: Neighbourhood = "smooth"
    needs: ClassVar[frozenset[Need]] = frozenset({"col_norm"})
    feed: ClassVar[Feed] = "dense"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "exponent"):
            check_range(name, getattr(self, name), 0)
        if self.alpha == self.beta == self.gamma == 0:
            raise ConfigError("alpha, beta and gamma are all 0: every weight would score the same")
        if self.neighbourhood not in get_args(Neighbourhood):
            raise ConfigError(unknown("neighbourhood", str(self.neighbourhood), get_args(Neighbourhood)))
        odd = self.neighbourhood != "group"
        if type(self.kernel_size) is not int or self.kernel_size < 1 or self.kernel_size % 2 != odd:
            wanted = "an odd whole number" if odd else "an even whole number, the M of the pattern's groups"
            raise ConfigError(f"kernel_size is {self.kernel_size!r}; it must be {wanted}")

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """`weight` (out, in), any float dtype -> fp32 (out, in). Does not mutate.

        Raises CalibrationError if `stats.col_norm` (in,) is missing or misshapen.
        """
        score = relative_importance(weight, self.alpha, self.beta)
        if self.gamma:
            score = with_neighbourhood(score, weight, self.neighbourhood, self.gamma, self.kernel_size)
        return score.mul_(need_col_norm(stats, weight).pow(self.exponent))
