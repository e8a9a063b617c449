"""A valid JSON document spoilt in every place: what a reader must refuse by a message, or take.

For each place of a document (its leaves, and its objects and lists) one copy without it and one for each of SPOILT in
its stead. Deterministic, so that a failure names its document.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from crepe_deploy.errors import CrepeError

Place = tuple[str | int, ...]

SPOILT: tuple[Any, ...] = (
    None, True, "", "x" * 300, "\x00|`<b>\n", -1, 0, 2**64, 10**30, 0.5, 1e308, [], {}, [None], {"x": None},
)  # fmt: skip
MISSING = object()


def places(document: Any, path: Place = ()) -> Iterator[Place]:
    """Every place of a document but its root, outermost first; of a list's members the first and the last."""
    if isinstance(document, dict):
        inside: list[str | int] = list(document)
    elif isinstance(document, list):
        inside = sorted({0, len(document) - 1} & set(range(len(document))))
    else:
        return
    for name in inside:
        yield (*path, name)
        yield from places(document[name], (*path, name))


def mutations(document: Any, spoilt: tuple[Any, ...] = SPOILT) -> Iterator[tuple[str, Any]]:
    """(what was done, the document so spoilt) for each place and each value, the place left out, and other roots."""
    for value in spoilt:
        yield f"the document: {value!r:.40}", copy.deepcopy(value)
    for path in places(document):
        for value in (MISSING, *spoilt):
            changed = copy.deepcopy(document)
            parent = changed
            for name in path[:-1]:
                parent = parent[name]
            if value is MISSING:
                del parent[path[-1]]
            else:
                parent[path[-1]] = copy.deepcopy(value)
            where = ".".join(map(str, path))
            yield f"{where}: {'missing' if value is MISSING else repr(value)[:40]}", changed


def refusal(change: str, read: Callable[[], object]) -> str:
    """What `read` refused a document with, "" where it took it; any other exception fails the test, naming `change`."""
    try:
        read()
    except CrepeError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the fault looked for
        pytest.fail(f"{change}: {type(error).__name__}: {error}")
    return ""
