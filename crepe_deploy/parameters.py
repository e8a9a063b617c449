"""The one place where methods and steps are built from named values: every value has its field's type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from crepe_deploy.nearest import meant

from .errors import ConfigError
from .limits import MOST

LARGEST: Final = 1e30  # of fractions, whose products must stay finite

Built = TypeVar("Built")


def build(kind: type[Built], values: Mapping[str, Any], place: str) -> Built:
    """The dataclass `kind` with these fields, the others at their defaults; place: what messages begin with.

    Raises ConfigError for an unknown field, listing the known, a value of another type, and as `kind` itself does.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            names = f"{', '.join(known) or 'none'}{meant(name, known)}"
            raise ConfigError(f"{place} has no hyperparameter '{name:.60}'; known: {names}")
        if (wanted := _refused(hints[name], value)) is not None:
            raise ConfigError(f"{place}: {name} is {_short(value)}; it must be {wanted}")
    return kind(**values)


def _refused(hint: Any, value: Any) -> str | None:
    """What a value should be instead; None where it will do. True and false are no numbers."""
    if hint is int and not (type(value) is int and abs(value) <= MOST):
        return f"a whole number of at most {MOST}"
    if hint is float and not (type(value) in (int, float) and abs(value) <= LARGEST):
        return f"a number of at most {LARGEST:g}"
    if get_origin(hint) is Literal and value not in get_args(hint):
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return None


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**60 else "a number of more than 60 digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
