"""What is chosen where a person leaves it out: pattern, recipe, text and formats, from the machine and the model.

One rule for `prune`, `prune-and-export` and `plan`, and the only place that has these defaults. What is given keeps its
meaning; what is chosen is said in one line and recorded as `chosen`. Who names a method, its parameters, a step, a feed
or layers, and no target, is taken at their word: FIXED fills the rest, and only missing text is chosen. And who names
no method, but pattern, text and formats, has chosen all: the method is then `pruning.config.DEFAULT_METHOD`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from crepe_deploy.errors import InputError
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.families import family_of
from crepe_deploy.model.inside import matrices
from crepe_deploy.packed.config import PackedConfig
from crepe_deploy.pattern import Pattern, Unstructured
from crepe_deploy.progress import Say, unsaid
from crepe_deploy.pruning.recipe import Recipe, load_recipe
from crepe_deploy.selftext import SELF

from .inputs import Granularity, pattern_of

Target = Literal["auto", "cpu", "gpu"]
RECIPE: Final = "best"
PATTERNS: Final = {"cpu": ("16:32", "8:16", "4:8", "2:4"), "gpu": ("2:4",)}  # best first; the first that fits is taken
OWN_TEXT: Final[dict[str, int]] = {"calib_samples": 64, "calib_length": 512}  # windows that it writes itself
FIXED: Final[dict[str, Any]] = {"sparsity": "2:4", "calib_samples": 128, "calib_length": 2048, "format": "dense"}
OWN_DOMAIN: Final = "text of your own domain is better: --calib FILE"
HINT: Final = (
    "the method is crepe, for none is named and the rest is given: --recipe best fits the kept weights too and keeps "
    "far more of the model, in minutes instead of seconds"
)


@dataclass(frozen=True)
class Machine:
    """gpu: there is one. vllm, onnx: what serves packed folders, and graphs, is installed."""

    gpu: bool
    vllm: bool
    onnx: bool


@dataclass(frozen=True)
class Shape:
    """A model as far as the choices depend on it.

    widths: input columns of its linear layers; packable: of those stored (out, in). steps: options of a recipe that
    can do something for its family. onnx: whether it can be exported as a graph. experts: whether it holds some, which
    are not walked through beside the dense model.
    """

    widths: frozenset[int]
    packable: frozenset[int]
    steps: frozenset[str]
    onnx: bool
    experts: bool = False


@dataclass(frozen=True)
class Given:
    """What a person gave; None was left out.

    calib: whether there is text. exports: whether there are formats to choose. named: a method, its parameters, a step,
    a feed, or which layers. recipe: one. needs_text: whether what is named reads text.
    """

    target: str | None = None
    sparsity: Pattern | str | float | None = None
    granularity: Granularity = "row"
    calib: bool = False
    calib_samples: int | None = None
    calib_length: int | None = None
    format: str | Sequence[str] | None = None
    exports: bool = True
    named: bool = False
    recipe: bool = False
    needs_text: bool = True

    @property
    def settled(self) -> bool:
        """Whether nothing is left to choose."""
        method = self.named or self.recipe or self.complete
        rest = self.sparsity is not None and (self.format is not None or not self.exports)
        return ((method and rest) or not self.choosing) and (self.calib or not self.needs_text)

    @property
    def options(self) -> dict[str, Any]:
        """Those options that `filled` fills; text is given by itself."""
        names = ("sparsity", "calib_samples", "calib_length", "format")
        return {"calib": None} | {name: getattr(self, name) for name in names}

    @property
    def choosing(self) -> bool:
        """Whether more than text may be chosen."""
        return self.target is not None or not self.named

    @property
    def complete(self) -> bool:
        """Whether pattern, text and formats are all given, and no target asks for a choice."""
        all_given = self.sparsity is not None and self.calib and (self.format is not None or not self.exports)
        return all_given and self.target is None


def choices_of(given: Given, model: Decoder | Path, say: Say | None = None) -> dict[str, Any]:
    """What is chosen on this machine for a model, or the one in a folder; say: told so, and what is as always."""
    chosen: dict[str, Any] = {}
    other: dict[str, Any] = {}
    lines = [HINT] if given.complete and not (given.named or given.recipe) else []
    if not given.settled or {"sparsity", "format"} & fixed(given, {}).keys():
        machine, shape = machine_of(), shape_of(model if isinstance(model, Decoder) else Decoder(model, experts=True))
        other = choose(replace(given, target="auto"), machine, shape)
        if not given.settled:
            chosen = choose(given, machine, shape)
            lines = [line(given, chosen, machine)]
    if kept := fixed(given, chosen):
        lines.append(fixed_line(kept, other))
    for one in lines:
        (say or unsaid)(one)
    return chosen


def fixed(given: Given, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What is neither given nor chosen, and so as in FIXED, by option."""
    windows = ("calib_samples", "calib_length") if given.needs_text else ()
    names = ("sparsity", *(("format",) if given.exports else ()), *windows)
    return {name: FIXED[name] for name in names if given.options[name] is None and name not in chosen}


def fixed_line(kept: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What was left as it always is, and what would be chosen for this machine instead, for a person."""
    said = f"not given, so as always: {' '.join(_written(name, value) for name, value in kept.items())}"
    chosen = [_written(name, other[name]) for name in kept if other.get(name, kept[name]) != kept[name]]
    return said + (f"; --target auto chooses for this machine: {' '.join(chosen)}" if chosen else "")


def choose(given: Given, machine: Machine, model: Shape) -> dict[str, Any]:
    """What is chosen, by option, its values as `prune` takes them; `target` first. Empty where nothing is."""
    target = given.target if given.target in PATTERNS else "gpu" if machine.gpu else "cpu"
    pattern = pattern_of(_fitting(target, model) if given.sparsity is None else given.sparsity, given.granularity)
    chosen: dict[str, Any] = {}
    if given.choosing and not (given.named or given.recipe or given.complete):
        chosen |= _method(pattern, model)
    if given.choosing and given.sparsity is None:
        chosen["sparsity"] = str(pattern)
    if given.needs_text and not given.calib:
        chosen["calib"] = SELF
        chosen |= {name: size for name, size in OWN_TEXT.items() if getattr(given, name) is None}
    if given.choosing and given.exports and given.format is None:
        chosen["format"] = ",".join(_formats(pattern, machine, model))
    return {"target": target, **chosen} if chosen else {}


def _fitting(target: str, model: Shape) -> str:
    """The first of the target's patterns whose groups divide every layer; the last where none does, to be refused."""
    fits = (text for text in PATTERNS[target] if not any(width % int(text.split(":")[1]) for width in model.widths))
    return next(fits, PATTERNS[target][-1])


def _method(pattern: Pattern, model: Shape) -> dict[str, Any]:
    """The recipe, or what it says, less the steps that do not know the model."""
    wanted = load_recipe(RECIPE).options(pattern)
    known = {name: value for name, value in wanted.items() if name in model.steps}
    if model.experts:
        known["feed"] = "pruned"
    return {"recipe": RECIPE} if known == wanted else known


def _formats(pattern: Pattern, machine: Machine, model: Shape) -> list[str]:
    """dense, which everything reads; packed where the pattern packs; a graph where nothing else can be served here."""
    packs = any(_packs(width, pattern) for width in model.packable)
    graph = machine.onnx and model.onnx and not machine.vllm
    return ["dense", *(["packed"] if packs else []), *(["onnx"] if graph else [])]


def packable(layer: LinearSpec, pattern: Pattern) -> bool:
    """Whether the packed format holds this tensor: counted by group or row, stored (out, in)."""
    return not layer.transposed and _packs(layer.in_features, pattern)


def _packs(in_features: int, pattern: Pattern) -> bool:
    by_matrix = isinstance(pattern, Unstructured) and pattern.granularity == "matrix"
    return not by_matrix and PackedConfig(pattern).fits(in_features)


def filled(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options: as given, what was left out as chosen, and what is neither as in FIXED."""
    named = {name: value for name, value in given.items() if value is not None}
    return {**dict.fromkeys(given), **FIXED, **{name: chosen[name] for name in given if name in chosen}, **named}


def line(given: Given, chosen: Mapping[str, Any], machine: Machine) -> str:
    """What was chosen and how to choose otherwise, for a person."""
    seen = "this machine has one; --target cpu for another" if machine.gpu else "no GPU here; --target gpu for one"
    why = "--target" if given.target in PATTERNS else seen
    words = " ".join(_written(name, value) for name, value in chosen.items() if name != "target")
    said = f"chosen for a {chosen['target'].upper()} ({why}): {words}. Give any of them to choose otherwise"
    if "calib" in chosen:
        said += f"; {OWN_DOMAIN}"
    if "format" in chosen and not machine.vllm and "onnx" not in chosen["format"]:
        said += "; nothing that serves them is installed here yet (docs/install.md)"
    return said


def _written(name: str, value: Any) -> str:
    """A choice as it is typed."""
    if name == "params":
        return " ".join(f"--param {key}={number}" for key, number in value.items())
    return f"--{name.replace('_', '-')} {value}"


def machine_of() -> Machine:
    """This machine."""
    import torch

    from crepe_deploy.exporting.onnx.support import check_options

    onnx = not _refused(check_options, "portable", "fp32")
    return Machine(torch.cuda.is_available(), importlib.util.find_spec("vllm") is not None, onnx)


def shape_of(decoder: Decoder) -> Shape:
    """A model, from its configuration and headers."""
    from crepe_deploy.exporting.onnx.support import check_model

    linears = [spec for index in range(len(decoder.blocks)) for spec in matrices(decoder, index)]
    experts = any(spec.expert is not None for spec in linears)
    family = family_of(decoder.config.model_type)
    unsure = {name for name, known in (("permute", family.folds), ("rescale", family.last_norm)) if not known}
    return Shape(
        widths=frozenset(spec.in_features for spec in linears),
        packable=frozenset(spec.in_features for spec in linears if not (spec.transposed or experts)),
        steps=frozenset(Recipe.model_fields) - unsure,
        onnx=not _refused(check_model, decoder.config, "portable"),
        experts=experts,
    )


def _refused(check: Callable[..., object], *arguments: Any) -> bool:
    try:
        check(*arguments)
    except InputError:
        return True
    return False
