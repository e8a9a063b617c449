"""What a pruning run is asked to do, resolved once: the built method and steps, and the names that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.decoder import check_dtype
from crepe_deploy.model.stats import Need
from crepe_deploy.nearest import unknown
from crepe_deploy.pattern import NM, Pattern, Unstructured, as_pattern
from crepe_deploy.store.values import AGAIN

from .methods import get_method
from .methods.base import Feed, ScoreMethod, SolveMethod
from .recipe import load_preset, load_recipe
from .steps import KINDS, Steps, build_steps
from .targets import name_filter

FEEDS: tuple[str, ...] = ("auto", *get_args(Feed))
DEFAULT_METHOD = "crepe"
DEFAULT_PRESETS = {"crepe": "default"}  # methods whose preset, when none is asked for, is not the built-in defaults


@dataclass(frozen=True)
class Origin:
    """The names that a configuration was made from, for its record.

    method: its name in `METHODS`. preset, recipe: the names that they give themselves. steps: by kind, as written.
    chosen: options that a person left out, as they were chosen (`api.choices`).
    """

    method: str
    preset: str | None = None
    recipe: str | None = None
    steps: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PruneConfig:
    """Everything that decides the result, besides the model and the calibration tokens; nothing in it is a name to be
    looked up again. `prune_config` makes one from what a person writes.

    method: scores or solves each layer. steps: what is done around it. origin: the names that both came from.
    feed: what the next block is fed while calibrating: "dense" the dense block's output, "pruned" the pruned one's,
    "both" each its own, layer by layer (see `model.paired`).
    include, exclude: regular expressions searched in the tensor's checkpoint name; exclude wins.
    dtype: of computation, "auto" = the checkpoint's.
    kinds: by kind of layer (`targets.kind_of`), the method with other hyperparameters; `method` elsewhere.
    Raises ConfigError for what does not go together.
    """

    method: ScoreMethod | SolveMethod
    pattern: Pattern
    origin: Origin
    steps: Steps = field(default_factory=Steps)
    feed: Feed = "dense"
    include: str | None = None
    exclude: str | None = None
    dtype: str = "auto"
    kinds: Mapping[str, ScoreMethod] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = self.steps
        if steps.permute is not None and not isinstance(self.pattern, NM):
            raise ConfigError(f"--permute changes nothing for pattern {self.pattern}: it is for N:M groups")
        if steps.reprune is not None:
            steps.reprune.check(self.pattern)
            if isinstance(self.method, SolveMethod) and steps.reconstruct is None:
                raise ConfigError(
                    f"--reprune undoes the weights that '{self.origin.method}' updates: give --reconstruct as well"
                )
        if self.feed == "both" and not (steps.beside_dense or steps.sweeps):
            raise ConfigError(
                "--feed both collects what only --reconstruct, --repair and the sweep of --values use: give one, or "
                "another feed"
            )
        if steps.repair is not None and self.feed != "both":
            raise ConfigError("--repair compares with the dense model on the way: give --feed both or none")
        if steps.rescale is not None and self.feed != "both":
            raise ConfigError("--rescale compares with the dense model on the way: give --reconstruct and --feed both")
        if steps.values is not None:
            self._check_values()
        name_filter(self.include, self.exclude)
        check_dtype(self.dtype)

    def _check_values(self) -> None:
        """Raise ConfigError for what values cannot be quantised behind."""
        if self.steps.repair is not None:
            raise ConfigError(
                "--values quantises each layer behind its pruning, and --repair trains it after: give one; weights "
                f"that were repaired are quantised {AGAIN}"
            )
        if isinstance(self.pattern, Unstructured) and self.pattern.granularity == "matrix" and self.pattern.sparsity:
            raise ConfigError(
                f"--values is for rows that keep equal counts, and pattern {self.pattern} counts over the matrix: give "
                "--granularity row or N:M"
            )

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that the method and the steps on each block read."""
        return self.steps.needs if self.keeps_all else self.method.needs | self.steps.needs

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is pruned and values are quantised alone: no method is asked."""
        return self.steps.values is not None and isinstance(self.pattern, Unstructured) and not self.pattern.sparsity

    @property
    def needs_text(self) -> bool:
        """Whether anything reads calibration statistics, the allocation included."""
        allocating = self.steps.allocate.needs if self.steps.allocate else frozenset()
        return bool(self.needs | allocating) or self.steps.beside_dense

    @property
    def title(self) -> str:
        """What is done, in a few words: the recipe's name, the method and the steps."""
        words = [f"{kind} {text.partition(':')[0]}" for kind, text in self.origin.steps.items()]
        if self.origin.recipe is None:
            return ", ".join([f"method {self.origin.method}", *words])
        return f"recipe {self.origin.recipe} ({', '.join([self.origin.method, *words])})"

    def record(self) -> dict[str, Any]:
        """As JSON for the manifest: what was asked for, and every parameter that it came to."""
        parameters = vars(self.method)
        return {
            "method": self.origin.method,
            "pattern": str(self.pattern),
            "params": dict(parameters),
            "preset": self.origin.preset,
            "feed": self.feed,
            "include": self.include,
            "exclude": self.exclude,
            "dtype": self.dtype,
            **{kind: self.origin.steps.get(kind) for kind in KINDS if kind != "values"},
            **({"values": values} if (values := self.origin.steps.get("values")) else {}),
            "recipe": self.origin.recipe,
            "resolved_method": {"class": type(self.method).__name__, **parameters},
            "resolved_steps": self.steps.record(),
            **({"kinds": {kind: dict(vars(own)) for kind, own in self.kinds.items()}} if self.kinds else {}),
            **({"chosen": dict(self.origin.chosen)} if self.origin.chosen else {}),
        }


def prune_config(
    method: str | None = None,
    pattern: Pattern | str | float = "2:4",
    *,
    preset: str | Path | None = None,
    params: Mapping[str, Any] | None = None,
    recipe: str | Path | None = None,
    feed: str | None = None,
    allocate: str | None = None,
    permute: str | None = None,
    reprune: str | None = None,
    reconstruct: str | None = None,
    repair: str | None = None,
    rescale: str | None = None,
    values: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    dtype: str = "auto",
) -> PruneConfig:
    """Resolve what a person writes into a configuration. Arguments go before what the recipe says.

    method: a name in `METHODS`; without one it is the recipe's or the preset's, or crepe. A method that is not the
    recipe's takes nothing of the recipe's preset and params. pattern: "2:4", "0.5", "0.5/matrix" or 0.5 (of zeros).
    preset: a name or file; crepe's default is "default". params: hyperparameters that go before the preset's.
    recipe: a name or file. feed: "auto" (default: the better one for the method and steps), "dense", "pruned", "both".
    allocate, permute, reprune, reconstruct, repair, rescale, values: steps as `NAME` or `NAME:PARAMETER=VALUE,...`.
    include, exclude, dtype: as in `PruneConfig`.
    Raises ConfigError and PatternError; no model is looked at.
    """
    kept = as_pattern(pattern)
    loaded = None if recipe is None else load_recipe(recipe)
    asked = {} if loaded is None else loaded.options(kept)
    if method not in (None, asked.get("method")):
        asked = {name: value for name, value in asked.items() if name not in ("preset", "params")}
    name, built, kinds, preset_name = _method(
        method or asked.get("method"), preset or asked.get("preset"), {**asked.get("params", {}), **(params or {})}
    )
    given = {
        "allocate": allocate, "permute": permute, "reprune": reprune, "reconstruct": reconstruct, "repair": repair,
        "rescale": rescale, "values": values,
    }  # fmt: skip
    texts = {kind: text for kind in KINDS if (text := given[kind] or asked.get(kind)) is not None}
    steps = build_steps(texts)
    return PruneConfig(
        method=built,
        pattern=kept,
        origin=Origin(name, preset_name, None if loaded is None else loaded.name, texts),
        steps=steps,
        feed=_feed(feed or asked.get("feed", "auto"), built, steps),
        include=include,
        exclude=exclude,
        dtype=dtype,
        kinds=kinds,
    )


def _method(
    method: str | None, preset: str | Path | None, params: Mapping[str, Any]
) -> tuple[str, ScoreMethod | SolveMethod, dict[str, ScoreMethod], str | None]:
    """(name, built method, those by kind of layer, preset name or None).

    Raises ConfigError if the preset is for another method.
    """
    wanted = preset if preset is not None else DEFAULT_PRESETS.get(method or DEFAULT_METHOD)
    if wanted is None:
        name = method or DEFAULT_METHOD
        return name, get_method(name, **params), {}, None
    loaded = load_preset(wanted)
    if method is not None and method != loaded.method:
        raise ConfigError(f"preset '{preset}' is for method '{loaded.method}', not '{method}'")
    built = get_method(loaded.method, **{**loaded.params, **params})
    kinds = {
        kind: own
        for kind, params_there in loaded.kinds.items()
        if isinstance(own := get_method(loaded.method, **{**loaded.params, **params_there, **params}), ScoreMethod)
    }
    return loaded.method, built, kinds, loaded.name


def _feed(wanted: str, method: ScoreMethod | SolveMethod, steps: Steps) -> Feed:
    """The feed that is meant by a name; "auto": the one that kept more of a real model (docs/methods.md)."""
    if wanted == "auto":
        return "both" if steps.beside_dense else method.feed
    for feed in get_args(Feed):
        if wanted == feed:
            return feed  # type: ignore[no-any-return]
    raise ConfigError(unknown("feed", wanted, FEEDS))
