"""Tied weights as the files bear them out, which is what transformers and vLLM go by, whatever config.json says.

A configuration may tie an output layer to the embedding, and the files hold both: where they differ, each is its own.
Where they hold the output layer alone, the embedding is read from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from crepe_deploy.store.checkpoint import CheckpointReader, same_stored

Find = Callable[[str], str | None]


@dataclass(frozen=True)
class Ties:
    """own: parameters that config.json ties to others and the files do not. instead: of each parameter that is not
    stored, the stored one that it is tied to."""

    own: list[str]
    instead: dict[str, str]

    def settle(self, model: Any) -> None:
        """Give each of `own` a parameter of its own in a model on the meta device that was built from config.json."""
        for name in self.own:
            module, _, leaf = name.rpartition(".")
            shared = model.get_parameter(name)
            apart = nn.Parameter(shared.detach().clone(), requires_grad=False)
            model.get_submodule(module)._parameters[leaf] = apart
            model.all_tied_weights_keys.pop(name)


def ties_of(model: Any, reader: CheckpointReader, find: Find) -> Ties:
    """Compare what config.json ties with what the files hold; find: a parameter's name in them, or None."""
    own: list[str] = []
    instead: dict[str, str] = {}
    for name, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        stored, other = find(name), find(source)
        if stored is not None and other is not None and stored != other and not same_stored(reader, stored, other):
            own.append(name)
        elif stored is not None and other is None:
            instead.setdefault(source, name)
    return Ties(own, instead)
