"""The optional steps around a method, by kind and name. Adding one takes its class and a line in its own registry.

On the command line and in recipes a step is written `NAME` or `NAME:PARAMETER=VALUE,PARAMETER=VALUE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Need
from crepe_deploy.nearest import unknown
from crepe_deploy.parameters import build
from crepe_deploy.store.reading import parse_value

from .allocators import ALLOCATORS, Allocator
from .permute import PERMUTERS, Permuter
from .reconstruct import RECONSTRUCTORS, Reconstructor
from .repair import REPAIRERS, BlockRepair
from .reprune import REPRUNERS, Repruner
from .rescale import RESCALERS, LogitRescaler
from .values import VALUES, Int8

KINDS: dict[str, dict[str, Any]] = {
    "allocate": ALLOCATORS,
    "permute": PERMUTERS,
    "reprune": REPRUNERS,
    "reconstruct": RECONSTRUCTORS,
    "repair": REPAIRERS,
    "rescale": RESCALERS,
    "values": VALUES,
}


@dataclass(frozen=True)
class Steps:
    """What was asked for, built; None where a step is left out."""

    allocate: Allocator | None = None
    permute: Permuter | None = None
    reprune: Repruner | None = None
    reconstruct: Reconstructor | None = None
    repair: BlockRepair | None = None
    rescale: LogitRescaler | None = None
    values: Int8 | None = None

    @property
    def beside_dense(self) -> bool:
        """Whether a step aims at what the dense model has at the same place."""
        return self.reconstruct is not None or self.repair is not None

    @property
    def sweeps(self) -> bool:
        """Whether values are quantised by a sweep, whose errors the columns behind make up for."""
        return self.values is not None and bool(self.values.needs)

    def held_out(self, samples: int) -> int:
        """How many of `samples` calibration windows are kept from the fits, to judge by. Raises ConfigError if none."""
        judges = {kind: step for kind, step in (("repair", self.repair), ("rescale", self.rescale)) if step}
        if judges and samples < 4:
            raise ConfigError(
                f"--{next(iter(judges))} holds out a quarter of the calibration windows: {samples} are too few"
            )
        return min(max((step.windows for step in judges.values()), default=0), samples // 4)

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that the steps on each block read; allocation walks the model by itself."""
        several = (self.permute, self.reprune, self.reconstruct, self.values)
        return frozenset().union(*(step.needs for step in several if step))

    def record(self) -> dict[str, Any]:
        """Every parameter of every step, for the manifest."""
        return {kind: {"class": _recorded_name(step), **vars(step)} for kind, step in vars(self).items() if step}


def _recorded_name(step: object) -> str:
    """What manifests call a step: its class, or what its class was called when they were first written."""
    return str(getattr(step, "recorded_as", type(step).__name__))


def build_step(kind: str, text: str) -> Any:
    """The step `text` of a kind. Raises ConfigError for an unknown name or parameter, listing the known."""
    known = KINDS[kind]
    name, _, settings = text.partition(":")
    if name not in known:
        raise ConfigError(unknown(f"--{kind}", name, known))
    allowed = [field.name for field in fields(known[name])]
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        parameter, equals, value = setting.partition("=")
        if not equals or parameter not in allowed:
            raise ConfigError(f"--{kind} {name}: '{setting}' is not NAME=VALUE with a NAME of: {', '.join(allowed)}")
        values[parameter] = parse_value(value)
    return build(known[name], values, f"--{kind} {name}")


def build_steps(texts: Mapping[str, str]) -> Steps:
    """The steps that are written, by kind. Raises ConfigError."""
    return Steps(**{kind: build_step(kind, text) for kind, text in texts.items()})
