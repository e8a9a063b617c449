"""Which layers are pruned: names by regular expression, and shapes that the pattern fits."""

from __future__ import annotations

import re
from collections.abc import Callable

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.inside import matrices
from crepe_deploy.pattern import Pattern, check_divides


def name_filter(include: str | None, exclude: str | None) -> Callable[[str], bool]:
    """Whether a tensor of this checkpoint name is wanted; regular expressions are searched in it, `exclude` wins.

    Raises ConfigError for what is no regular expression.
    """
    try:
        wanted = re.compile(include or "")
        unwanted = re.compile(exclude) if exclude else None
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"--include/--exclude is not a regular expression: {error}") from error
    return lambda name: bool(wanted.search(name)) and not (unwanted and unwanted.search(name))


def kind_of(path: str) -> str:
    """The kind of a layer: the last name of its module's path, as `down_proj`."""
    return path.rpartition(".")[2]


def choose_targets(
    decoder: Decoder, pattern: Pattern, include: str | None, exclude: str | None
) -> list[list[LinearSpec]]:
    """What to prune in each block: linears, and matrices of experts where `decoder` knows of these.

    Raises ConfigError when none is left, PatternError naming a misfit.
    """
    wanted = name_filter(include, exclude)
    targets = [
        [spec for spec in matrices(decoder, index) if wanted(spec.tensor)] for index in range(len(decoder.blocks))
    ]
    if not any(targets):
        raise ConfigError(f"--include/--exclude leave nothing to prune; names look like {decoder.linears[0][0].key}")
    for spec in (spec for block in targets for spec in block):
        check_divides(pattern, spec.key, spec.in_features)
    return targets
