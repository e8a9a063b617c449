"""Registers our parts with transformers the moment it is used, without importing it before."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Final

# transformers' module -> ours that registers something there.
REGISTERS: Final = {
    "transformers.quantizers.auto": "crepe_deploy.packed.hf_quantizer",
    "transformers.models.auto.configuration_auto": "crepe_deploy.structural.hf_auto",
}


class _Watcher(MetaPathFinder):
    """Waits for these modules, lets each load as usual, and imports ours after it."""

    def __init__(self, waiting: dict[str, str]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        registers = self.waiting.pop(fullname, None)
        if registers is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(registers)

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now what transformers has loaded already, the rest when it is; once."""
    waiting = {}
    for theirs, ours in REGISTERS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        else:
            waiting[theirs] = ours
    if waiting and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(waiting))
