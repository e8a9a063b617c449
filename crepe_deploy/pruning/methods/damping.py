"""Damping: what is added to the diagonal of a Gram matrix, so that it can be inverted and a fit holds on other text.

With d_i its diagonal, the sizes of the input channels, and m their mean, a damping of f adds by the rule

- `mean`        f * m to every channel, as SparseGPT does; next to a few outliers that drowns all others
- `geometric`   f * sqrt(d_i * m) to channel i, half way in logarithms between that and f * d_i
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from torch import Tensor

from crepe_deploy.errors import ConfigError, NumericalError
from crepe_deploy.nearest import unknown

DampingRule = Literal["mean", "geometric"]
RULES: Final[tuple[DampingRule, ...]] = get_args(DampingRule)


def check_rule(rule: DampingRule) -> None:
    """Raise ConfigError for a rule that there is not."""
    if rule not in RULES:
        raise ConfigError(unknown("damping_rule", str(rule), RULES))


def ridge(diagonal: Tensor, rule: DampingRule) -> Tensor:
    """What a damping of 1 adds to the `diagonal` (in,) of a Gram matrix: one number for all channels, or (in,)."""
    mean = diagonal.mean()
    return mean if rule == "mean" else (diagonal * mean).sqrt()


def revive(gram: Tensor) -> Tensor:
    """Give inputs that were 0 on every calibration token a diagonal of 1, in place -> which ones, bool (in,).

    Raises NumericalError where `gram` (in, in) is not finite.
    """
    if not gram.isfinite().all():
        raise NumericalError("the hessian is not finite: calibration produced NaN or infinite activations")
    diagonal = gram.diagonal()
    dead: Tensor = diagonal == 0
    diagonal[dead] = 1
    return dead
