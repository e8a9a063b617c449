"""What a shell offers for the values of options: names by what knows them, files where a file may stand.

No name is looked up where that takes torch: a shell waits for the key. A test compares the tuples with the registries.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Final

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

METHODS: Final = ("magnitude", "wanda", "ria", "crepe", "sparsegpt")
DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
STEPS: Final = {
    "allocate": ("owl", "alpha", "error"),
    "permute": ("fold",),
    "reprune": ("dsnot", "dsnot-ria", "swaps"),
    "reconstruct": ("exact", "admm", "obs"),
    "repair": ("block",),
    "rescale": ("logits",),
    "values": ("int8", "int4"),
}


def one_of(*names: str, or_file: bool = False) -> Complete:
    """One of these names, or a file as well."""
    return lambda _context, _parameter, typed: _starting(names, typed) + (_files(typed) if or_file else [])


def files(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Files and folders; what else may stand there, a hub id for example, nobody can list."""
    return _files(typed)


def formats(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Names of export formats, the last one of a list too."""
    from crepe_deploy.exporting.registry import EXPORTERS

    before, comma, last = typed.rpartition(",")
    given = before.split(",")
    return [
        CompletionItem(f"{before}{comma}{name}") for name in EXPORTERS if name.startswith(last) and name not in given
    ]


def shipped(kind: str) -> Complete:
    """Shipped "recipes" or "presets" by name, or a file."""

    def complete(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
        folder = resources.files("crepe_deploy.pruning") / kind
        names = sorted(file.name.rpartition(".")[0] for file in folder.iterdir() if not file.name.startswith("_"))
        return _starting(names, typed) + _files(typed)

    return complete


def _starting(names: tuple[str, ...] | list[str], typed: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(typed)]


def _files(typed: str) -> list[CompletionItem]:
    return [CompletionItem(typed, type="file")]


methods: Final = one_of(*METHODS)
dtypes: Final = one_of(*DTYPES)
steps: Final = {kind: one_of(*names) for kind, names in STEPS.items()}
