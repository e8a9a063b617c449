"""What a model's family cannot do of what was asked: refused where nothing would happen, else said in the manifest."""

from __future__ import annotations

from crepe_deploy.errors import ConfigError, UnsupportedModel
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.families import family_of, known
from crepe_deploy.model.paired import residuals_of

from .steps import Steps
from .steps.folds import foldables
from .steps.rescale import last_norm


def limits(decoder: Decoder, targets: list[list[LinearSpec]], steps: Steps, feed: str) -> list[str]:
    """What will be done only in part, a sentence each; targets: the linears to prune in each block.

    Raises UnsupportedModel where a step would do nothing at all with this family, ConfigError where that is for want of
    layers to prune.
    """
    said = []
    if steps.permute is not None:
        said += _of_folding(decoder, targets)
    if steps.rescale is not None:
        last_norm(decoder)
    if feed == "both":
        said += _of_pairing(decoder)
    return said


def _of_folding(decoder: Decoder, targets: list[list[LinearSpec]]) -> list[str]:
    kind = decoder.config.model_type
    folds = family_of(kind).folds
    if not folds:
        raise UnsupportedModel(
            f"--permute fold does not know which layers of '{kind}' compute another one's inputs; known: "
            f"{known('folds')}"
        )
    pruned = [{spec.path for spec in block} for block in targets]
    if not any(fold.path in paths for index, paths in enumerate(pruned) for fold in foldables(decoder, index)):
        paths = ", ".join(fold.path for fold in folds)
        raise ConfigError(f"--permute fold reorders the inputs of {paths}, and none of them is to be pruned")
    left = {"neurons", "values"} - {fold.kind.partition(" ")[0] for fold in folds}
    return [f"--permute fold: {name} are not reordered, for their order in '{kind}' is not known" for name in left]


def _of_pairing(decoder: Decoder) -> list[str]:
    kind = decoder.config.model_type
    if residuals_of(decoder.config):
        return []
    return [
        f"--feed both: layers aim at the dense model's outputs, but what the residual stream of '{kind}' has lost is "
        f"not made up for: which layers write to it is not known; known: {known('residuals')}"
    ]
