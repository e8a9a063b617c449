"""What to say of a name that is none: which there are, and which was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the known name nearest to `name`, or nothing where none is near."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""


def unknown(what: str, name: str, known: Iterable[str], verb: str = "is") -> str:
    """The message for `what` of an unknown `name`: the known ones, and the nearest."""
    names = list(known)
    return f"{what} '{name:.80}' {verb} unknown; known: {', '.join(names)}{meant(name, names)}"
