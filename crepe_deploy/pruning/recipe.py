"""Recipes: a method and the steps around it as data, with where they come from. Shipped ones are in `recipes/`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crepe_deploy.errors import ConfigError
from crepe_deploy.pattern import NM, Pattern


class Recipe(BaseModel):
    """What `prune` is asked to do, besides the model, the pattern and the text; fields as its options.

    provenance: free facts on how the recipe was found and what it reached.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    method: str | None = None
    preset: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    feed: Literal["auto", "dense", "pruned", "both"] = "auto"
    allocate: str | None = None
    permute: str | None = None
    reprune: str | None = None
    reconstruct: str | None = None
    rescale: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    def options(self, pattern: Pattern) -> dict[str, Any]:
        """What is set, by option name; without `permute` where `pattern` has no groups for it to gain anything in."""
        left_out = {"name", "provenance"} | (set() if isinstance(pattern, NM) else {"permute"})
        return {name: value for name, value in self if name not in left_out and value not in (None, {})}


def known_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    folder = resources.files("crepe_deploy.pruning") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name, or any YAML or JSON file by path. Raises ConfigError naming what is wrong in it."""
    if name_or_path in known_recipes():
        text = (resources.files("crepe_deploy.pruning") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    elif Path(name_or_path).is_file():
        try:
            text = Path(name_or_path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe file {name_or_path} cannot be read: {error}") from error
    else:
        names = ", ".join(known_recipes())
        raise ConfigError(f"recipe '{name_or_path}' is neither a file nor a known name; known: {names}")
    try:
        return Recipe.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {name_or_path} is not YAML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"recipe {name_or_path} is not valid: {faults}") from error
