"""What a model's family cannot do of what was asked: refused where nothing would happen, else said in the manifest."""

from __future__ import annotations

import torch

from crepe_deploy.errors import ConfigError, UnsupportedModel
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.families import family_of, known
from crepe_deploy.model.paired import residuals_of
from crepe_deploy.pattern import NM

from .config import PruneConfig
from .steps.folds import foldables
from .steps.rescale import last_norm
from .steps.values import COLUMNS
from .targets import kind_of


def limits(decoder: Decoder, targets: list[list[LinearSpec]], config: PruneConfig) -> list[str]:
    """What will be done only in part, a sentence each; targets: the linears to prune in each block.

    Raises UnsupportedModel where a step would do nothing at all with this family, ConfigError where that is for want of
    layers to prune.
    """
    if any(spec.expert is not None for block in targets for spec in block):
        _of_experts(config)
    known_kinds = {kind_of(spec.path) for block in targets for spec in block}
    said = [
        f"the preset's coefficients for {kind} are for no layer that is pruned here"
        for kind in config.kinds
        if kind not in known_kinds
    ]
    if config.steps.permute is not None and isinstance(config.pattern, NM):
        said += _of_folding(decoder, targets, config.pattern)
    if config.steps.rescale is not None:
        last_norm(decoder)
    if config.feed == "both":
        said += _of_pairing(decoder)
    if config.steps.values is not None:
        _check_values(decoder, targets)
    return said


def _check_values(decoder: Decoder, targets: list[list[LinearSpec]]) -> None:
    for spec in (spec for block in targets for spec in block):
        dtype = decoder.reader.info(spec.key).dtype
        if spec.in_features % COLUMNS:
            raise ConfigError(
                f"--values: {spec.key} has {spec.in_features} input columns, and codes are stored for multiples of "
                f"{COLUMNS}: leave such layers out with --exclude"
            )
        if dtype == torch.float64:
            raise ConfigError(f"--values: {spec.key} is float64; convert the model to bfloat16, float16 or float32")


def _of_experts(config: PruneConfig) -> None:
    """Raise ConfigError for what does not look inside experts."""
    outside = "; or leave experts whole: --exclude [.]experts[.]"
    if config.feed == "both":
        raise ConfigError(
            "--feed both does not walk through experts, so neither do --repair and --rescale: give --reconstruct with "
            f"--feed pruned, or neither recipe nor method, and what can be done there is chosen{outside}"
        )
    if config.steps.allocate is not None:
        raise ConfigError(f"--allocate does not look inside experts: leave it out{outside}")
    if config.steps.values is not None:
        raise ConfigError(f"--values does not look inside experts: leave it out{outside}")


def _of_folding(decoder: Decoder, targets: list[list[LinearSpec]], pattern: NM) -> list[str]:
    kind = decoder.config.model_type
    folds = family_of(kind).folds
    if not folds:
        raise UnsupportedModel(
            f"--permute fold does not know which layers of '{kind}' compute another one's inputs; known: "
            f"{known('folds')}"
        )
    reordered: set[str] = set()
    wide: set[str] = set()
    for index, block in enumerate(targets):
        by_path = {fold.path: fold for fold in foldables(decoder, index)}
        for spec in (spec for spec in block if spec.path in by_path):
            fits = spec.in_features // by_path[spec.path].heads % pattern.m == 0
            (reordered if fits else wide).add(spec.path)
    if not reordered:
        paths = ", ".join(fold.path for fold in folds)
        raise ConfigError(f"--permute fold reorders the inputs of {paths}, and none is to be pruned in groups that fit")
    unknown = {"neurons", "values"} - {fold.kind.partition(" ")[0] for fold in folds}
    return [
        *(f"--permute fold: {name} are not reordered, for their order in '{kind}' is not known" for name in unknown),
        *(
            f"--permute fold: inputs of {path} are not reordered, for groups of {pattern.m} span several heads"
            for path in sorted(wide)
        ),
    ]


def _of_pairing(decoder: Decoder) -> list[str]:
    kind = decoder.config.model_type
    if residuals_of(decoder.config):
        return []
    return [
        f"--feed both: layers aim at the dense model's outputs, but what the residual stream of '{kind}' has lost is "
        f"not made up for: which layers write to it is not known; known: {known('residuals')}"
    ]
