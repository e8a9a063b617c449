"""Presets: named hyperparameters as data, with where they come from. Shipped ones live in `pruning/presets/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from crepe_deploy.errors import ConfigError

from . import get_method
from .base import ScoreMethod, SolveMethod

DEFAULT_METHOD = "crepe"
DEFAULT_PRESETS = {"crepe": "default"}  # methods whose preset, when none is asked for, is not the built-in defaults


@dataclass(frozen=True)
class Preset:
    """A method's hyperparameters and their provenance: free facts on how they were found (model, data, date, ...)."""

    name: str
    method: str
    params: dict[str, Any]
    provenance: dict[str, Any]

    def build(self) -> ScoreMethod | SolveMethod:
        """The method with these hyperparameters."""
        return get_method(self.method, **self.params)


def known_presets() -> list[str]:
    """Names of the shipped presets, sorted."""
    folder = resources.files("crepe_deploy.pruning") / "presets"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def load_preset(name_or_path: str) -> Preset:
    """Load a shipped preset by name, or any by the path of its JSON file.

    Raises ConfigError if there is none, if a key is missing, unknown or of the wrong type, and if the method refuses
    its values.
    """
    if name_or_path in known_presets():
        text = (resources.files("crepe_deploy.pruning") / "presets" / f"{name_or_path}.json").read_text("utf-8")
    elif Path(name_or_path).is_file():
        text = _read(Path(name_or_path))
    else:
        names = ", ".join(known_presets())
        raise ConfigError(f"preset '{name_or_path}' is neither a file nor a known name; known: {names}")
    return _parse(text, name_or_path)


def resolve_method(
    method: str | None, preset: str | None, params: Mapping[str, object]
) -> tuple[str, dict[str, Any], str | None]:
    """Turn what a user asked for into (method, every hyperparameter, preset name or None).

    Without a method it is the preset's, or crepe; crepe without a preset starts from 'default'. `params` override the
    preset. Raises ConfigError if the preset is for another method, and as `load_preset` and `get_method` do.
    """
    wanted = preset if preset is not None else DEFAULT_PRESETS.get(method or DEFAULT_METHOD)
    loaded = load_preset(wanted) if wanted is not None else Preset("", method or DEFAULT_METHOD, {}, {})
    if method is not None and method != loaded.method:
        raise ConfigError(f"preset '{preset}' is for method '{loaded.method}', not '{method}'")
    built = get_method(loaded.method, **{**loaded.params, **params})
    return loaded.method, vars(built).copy(), loaded.name or None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset file {path} cannot be read: {error}") from error


def _parse(text: str, source: str) -> Preset:
    """Check the document key by key. The method's own checks run last, on the built method."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"preset '{source}' is not JSON: {error}") from error
    keys = [field.name for field in fields(Preset)]
    if not isinstance(document, dict) or sorted(document) != sorted(keys):
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ConfigError(f"preset '{source}' must have exactly the keys {', '.join(keys)}; found {found}")
    for key, expected in (("name", str), ("method", str), ("params", dict), ("provenance", dict)):
        if not isinstance(document[key], expected):
            raise ConfigError(f"preset '{source}': {key} must be a {expected.__name__}")
    preset = Preset(**document)
    preset.build()
    return preset
