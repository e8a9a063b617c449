"""How a model calls a decoder block, and what a block gives back: learnt from the model's own forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """Where a block takes the hidden states, and how it returns them.

    place: their position among the arguments, or their name. length: of the tuple that they come first in; None where
    the block returns them alone.
    """

    place: int | str = 0
    length: int | None = None

    def taken(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden states among the arguments of a call."""
        return args[self.place] if isinstance(self.place, int) else kwargs[self.place]

    def unwrapped(self, returned: Any) -> Tensor:
        """The hidden states in what a block returned."""
        hidden: Tensor = returned if self.length is None else returned[0]
        return hidden

    def wrapped(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """What a block that does nothing else returns."""
        return hidden if self.length is None else (hidden, *[None] * (self.length - 1))


@dataclass(frozen=True)
class Call:
    """One call of a block, to be repeated with other hidden states."""

    form: Form
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states behind `block`."""
        if isinstance(self.form.place, int):
            args = (*self.args[: self.form.place], hidden, *self.args[self.form.place + 1 :])
            return self.form.unwrapped(block(*args, **self.kwargs))
        return self.form.unwrapped(block(*self.args, **{**self.kwargs, self.form.place: hidden}))

    @classmethod
    def noted(cls, form: Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call with these arguments, its own hidden states forgotten."""
        if isinstance(form.place, int):
            return cls(form, (*args[: form.place], None, *args[form.place + 1 :]), kwargs)
        return cls(form, args, {**kwargs, form.place: None})

    def sharing(self, other: Call, memo: dict[int, Any]) -> Call:
        """The same call, with the tensors of `other` where they are equal, so that they are held once.

        memo: what was decided for the tensors seen so far, by id.
        """
        args = _shared(self.args, other.args, memo)
        return Call(self.form, args, _shared(self.kwargs, other.kwargs, memo))


def _shared(value: Any, other: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in memo:
            same = isinstance(other, Tensor) and value.dtype == other.dtype and torch.equal(value, other)
            memo[id(value)] = other if same else value
        return memo[id(value)]
    if type(value) in (tuple, list) and type(other) is type(value) and len(other) == len(value):
        return type(value)(_shared(one, two, memo) for one, two in zip(value, other, strict=True))
    if type(value) is dict and type(other) is dict:
        return {key: _shared(one, other.get(key), memo) for key, one in value.items()}
    return value


class BlockSlot(nn.Module):
    """Stands where a decoder block stood: notes how it was called and passes the hidden states on.

    `replacement`, when set, is returned instead. Unknown attributes are looked up on the block.
    """

    def __init__(self, block: nn.Module, form: Form) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that its parameters are not this module's
        self.form = form
        self.hidden: Tensor | None = None
        self.call = Call(form, (), {})
        self.replacement: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        hidden: Tensor = self.form.taken(args, kwargs)
        self.hidden = hidden
        self.call = Call.noted(self.form, args, kwargs)
        return self.form.wrapped(hidden if self.replacement is None else self.replacement)
