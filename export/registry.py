"""The formats by name. A new one is a file in `formats/` with a class, and a line here.

`EXPORTERS` are written, `IMPORTERS` are foreign checkpoints that are read and made ours first.

Nothing is imported before a format is asked for, so that `--help` can name them.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError
from ..nearest import unknown

if TYPE_CHECKING:
    from .frame.exporter import Exporter
    from .frame.importer import Importer

EXPORTERS: Final = {
    "dense": "crepe_deploy.exporting.formats.dense:Dense",
    "packed": "crepe_deploy.exporting.formats.packed:Packed",
    "int8": "crepe_deploy.exporting.formats.int8:Int8",
    "onnx": "crepe_deploy.exporting.formats.onnx:Onnx",
    "deci": "crepe_deploy.exporting.formats.deci:Deci",
    "gguf": "crepe_deploy.exporting.formats.gguf:Gguf",
}
IMPORTERS: Final = {
    "sparse-24-bitmask": "crepe_deploy.exporting.formats.bitmask24:Bitmask24",
}


def check_formats(formats: Sequence[str]) -> list[str]:
    """Refuse unknown, missing or repeated formats. Raises ConfigError listing the known."""
    for name in formats:
        if name not in EXPORTERS:
            raise ConfigError(unknown("format", name, EXPORTERS))
    if not formats or len(set(formats)) != len(formats):
        raise ConfigError(f"--format needs one or more different formats of: {', '.join(EXPORTERS)}")
    return list(formats)


def build(formats: Sequence[str], options: Mapping[str, str] | None = None) -> list[Exporter[Any]]:
    """The exporters of these formats, each with those of the options that it takes, checked.

    Raises ConfigError for formats as `check_formats` does and for an option that none of them takes, MissingExtra.
    """
    given = dict(options or {})
    classes = [exporter_class(name) for name in check_formats(formats)]
    takes = {kind.name: [option.name for option in dataclasses.fields(kind)] for kind in classes}
    for option in given:
        if not any(option in names for names in takes.values()):
            known = "; ".join(f"{name} takes {', '.join(names) or 'none'}" for name, names in takes.items())
            raise ConfigError(f"option '{option}' is not for --format {','.join(formats)}: {known}")
    exporters = [kind(**{name: given[name] for name in takes[kind.name] if name in given}) for kind in classes]
    for exporter in exporters:
        exporter.check()
    return exporters


def exporter_class(name: str) -> type[Exporter[Any]]:
    """The class that `EXPORTERS` names, imported now."""
    loaded: type[Exporter[Any]] = pkgutil.resolve_name(EXPORTERS[name])
    return loaded


def importers() -> list[Importer]:
    """One of each class that `IMPORTERS` names, imported now."""
    return [pkgutil.resolve_name(name)() for name in IMPORTERS.values()]
