"""Registers `crepe_deploy.hf` with transformers the moment transformers is used, without importing it before."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Final

WATCHED: Final = "transformers.quantizers.auto"
REGISTERS: Final = "crepe_deploy.hf"


class _Watcher(MetaPathFinder):
    """Waits for one module, lets it load as usual, and imports ours after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(REGISTERS)

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if transformers' quantizers are loaded already, else when they are; once."""
    if WATCHED in sys.modules:
        importlib.import_module(REGISTERS)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
