"""Recipes: a method and the steps around it as data, with where they come from; a preset is one with a method alone.

Shipped ones are in `recipes/` and `presets/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crepe_deploy.errors import ConfigError
from crepe_deploy.nearest import meant
from crepe_deploy.pattern import NM, Pattern
from crepe_deploy.store.reading import YAML_BYTES, parse_json, parse_yaml, read_text

from .methods import get_method
from .methods.base import ScoreMethod


class _Stored(BaseModel):
    """What every recipe and preset file holds. provenance: free facts on how it was found and what it reached."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    params: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)


class Preset(_Stored):
    """A method and its hyperparameters, those left out at their defaults.

    kinds: by kind of layer (`targets.kind_of`), hyperparameters that go before `params` there; of scores only.
    """

    method: str
    kinds: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Recipe(_Stored):
    """What `prune` is asked to do, besides the model, the pattern and the text; fields as its options.

    heal: minutes for which the pruned model is then trained, which `prune-and-export` does.
    """

    method: str | None = None
    preset: str | None = None
    feed: Literal["auto", "dense", "pruned", "both"] = "auto"
    allocate: str | None = None
    permute: str | None = None
    reprune: str | None = None
    reconstruct: str | None = None
    repair: str | None = None
    rescale: str | None = None
    values: str | None = None
    heal: float | None = Field(default=None, gt=0, strict=False)

    def options(self, pattern: Pattern) -> dict[str, Any]:
        """What is set, by option name; without `permute` where `pattern` has no groups for it to gain anything in."""
        left_out = {"name", "provenance", "heal"} | (set() if isinstance(pattern, NM) else {"permute"})
        return {name: value for name, value in self if name not in left_out and value not in (None, {})}


_File = TypeVar("_File", bound=_Stored)


def known_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(_shipped("recipes"))


def known_presets() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(_shipped("presets"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or any YAML or JSON file by path. Raises ConfigError naming what is wrong in it."""
    return _load(Recipe, "recipe", name_or_path)


def load_preset(name_or_path: str | Path) -> Preset:
    """A shipped preset by name, or any YAML or JSON file by path.

    Raises ConfigError naming what is wrong in it or what its method refuses.
    """
    preset = _load(Preset, "preset", name_or_path)
    built = get_method(preset.method, **preset.params)
    if preset.kinds and not isinstance(built, ScoreMethod):
        raise ConfigError(f"preset {name_or_path}: method '{preset.method}' has no coefficients by kind of layer")
    for own in preset.kinds.values():
        get_method(preset.method, **{**preset.params, **own})
    return preset


def _shipped(folder: str) -> Mapping[str, Any]:
    """The shipped files of one kind by name."""
    files = (resources.files("crepe_deploy.pruning") / folder).iterdir()
    return {file.name.rpartition(".")[0]: file for file in files if file.name.endswith((".yaml", ".json"))}


def _load(model: type[_File], kind: str, name_or_path: str | Path) -> _File:
    """The file of this kind, read and checked key by key."""
    shipped = _shipped(f"{kind}s")
    file = Path(str(shipped.get(str(name_or_path), name_or_path)))
    if str(name_or_path) not in shipped and not os.path.lexists(file):
        names = ", ".join(sorted(shipped)) + meant(str(name_or_path), shipped)
        raise ConfigError(f"{kind} '{name_or_path}' is neither a file nor a known name; known: {names}")
    try:
        return model.model_validate(_parse(read_text(file, ConfigError, YAML_BYTES), f"{kind} {name_or_path}"))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}"
            + (meant(str(fault["loc"][0]), model.model_fields) if fault["type"] == "extra_forbidden" else "")
            for fault in error.errors()
        )
        raise ConfigError(f"{kind} {name_or_path} is not valid: {faults[:1000]}") from error


def _parse(text: str, place: str) -> Any:
    """JSON as JSON, for YAML 1.1 takes 1e-5 for a word; anything else as YAML."""
    json = text.lstrip().startswith("{")
    try:
        return parse_json(text, place, ConfigError)
    except ConfigError as not_json:
        try:
            return parse_yaml(text, place, ConfigError)
        except ConfigError as not_yaml:
            raise (not_json if json else not_yaml) from None
