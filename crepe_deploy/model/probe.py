"""What a model does with its decoder blocks, seen before any weight is read.

The model's own forward pass runs once over two tokens with stand-ins that cost nothing: every linear layer returns
zeros, every other parameter is one number seen in its shape. What walking block by block takes for granted is looked
at while it runs, and a model that does otherwise is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import UserDict
from collections.abc import Iterator, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.store.stock import third_party

from .blocks import holds_experts, is_linear
from .calls import Form

TOKENS = 2


@dataclass(frozen=True)
class Probed:
    """forms: how each block is called. reads: paths of linear layers whose weight the model's code reads by itself."""

    forms: list[Form]
    reads: frozenset[str]


@dataclass
class _Seen:
    """One call of a block: where its arguments were and what they were, and what came back."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    held: dict[int, int]
    returned: Any = None


@dataclass
class _Watch:
    """Everything that happened in one forward pass.

    linears: how often each was called, by path. reads: see `Probed`. notes: what stood for the dictionaries that blocks
    are given, by id. carried: blocks that read there what an earlier one had written.
    """

    calls: list[_Seen] = field(default_factory=list)
    linears: dict[str, int] = field(default_factory=dict)
    reads: set[str] = field(default_factory=set)
    notes: dict[int, _Notes] = field(default_factory=dict)
    carried: list[int] = field(default_factory=list)

    def noted(self, value: Any) -> Any:
        """The same argument, with a dictionary replaced by one that notes who reads what of whom."""
        if not isinstance(value, MutableMapping):
            return value
        return self.notes.setdefault(id(value), _Notes(self, value))


class _Notes(UserDict[Any, Any]):
    """A dictionary that every block is given: what one writes, another must not read."""

    def __init__(self, watch: _Watch, content: MutableMapping[Any, Any]) -> None:
        super().__init__(content)
        self.watch, self.writers = watch, dict[Any, int]()

    def __setitem__(self, key: Any, value: Any) -> None:
        if hasattr(self, "writers"):
            self.writers[key] = len(self.watch.calls)
        self.data[key] = value

    def __getitem__(self, key: Any) -> Any:
        self._check(key)
        return self.data[key]

    def __contains__(self, key: object) -> bool:
        self._check(key)
        return key in self.data

    def __iter__(self) -> Iterator[Any]:
        self._check(*self.writers)
        return iter(self.data)

    def _check(self, *keys: Any) -> None:
        now = len(self.watch.calls)
        if any(self.writers.get(key, now) != now for key in keys):
            self.watch.carried.append(now - 1)


def probe(model: Any, path: str, blocks: list[nn.Module]) -> Probed:
    """Run `model`, whose blocks are at `path`, and see that they can be walked one by one.

    Raises UnsupportedModel naming what cannot be: modules that change; blocks that are not called once each in their
    order, that pass more than hidden states on, that share parameters; linear layers that are not called once each.
    """
    name = type(model).__name__
    _check_parameters(name, path, blocks)
    watch = _Watch()
    with stand_ins(model, watch.linears, watch.reads), _watching(blocks, watch):
        before = {path: id(module) for path, module in model.named_modules()}
        run(model, name)
        changed = {path: id(module) for path, module in model.named_modules()}.items() ^ before.items()
    if changed:
        raise UnsupportedModel(f"{name} replaces modules of its own while it runs: {min(changed)[0]}")
    _check_order(name, path, len(blocks), watch)
    if watch.carried:
        raise UnsupportedModel(f"{name}: '{path}.{watch.carried[0]}' reads what an earlier block wrote down")
    forms = [_form(f"{name}: '{path}.{seen.index}'", blocks[seen.index], seen) for seen in watch.calls]
    _check_chain(name, path, watch.calls, forms)
    _check_linears(name, path, blocks, watch)
    return Probed(forms, frozenset(watch.reads))


def run(model: Any, name: str) -> None:
    """One forward pass over two tokens. Raises UnsupportedModel where the model needs more than tokens."""
    place = f"{name} cannot be run on token ids alone, which is all that a decoder is given here"
    with third_party(place, UnsupportedModel), torch.inference_mode():
        model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)


@contextlib.contextmanager
def stand_ins(model: nn.Module, called: dict[str, int], reads: set[str]) -> Iterator[None]:
    """Inside, `model` computes without weights: see the module. called, reads: filled in, by path."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    emptied: list[tuple[nn.Module, str, nn.Parameter]] = []
    one: dict[torch.dtype, Tensor] = {}
    try:
        for path, module in list(model.named_modules()):
            for leaf, child in list(module._modules.items()):
                if child is not None and (is_linear(child) or holds_experts(child)):
                    module._modules[leaf] = _StandIn(child, f"{path}.{leaf}".lstrip("."), called, reads)
                    replaced.append((module, leaf, child))
        for module in list(model.modules()):
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None:
                    emptied.append((module, leaf, parameter))
                    module._parameters[leaf] = _of_one_number(parameter, one)
        yield
    finally:
        for module, leaf, parameter in emptied:
            module._parameters[leaf] = parameter
        for module, leaf, child in replaced:
            module._modules[leaf] = child


def _of_one_number(parameter: nn.Parameter, one: dict[torch.dtype, Tensor]) -> nn.Parameter:
    number = one.setdefault(parameter.dtype, torch.full((), 0.5, dtype=parameter.dtype))
    return nn.Parameter(number.expand(parameter.shape), requires_grad=False)


class _StandIn(nn.Module):
    """A linear layer, or all experts of one, that returns zeros and notes that it was called, or its weight read."""

    def __init__(self, linear: nn.Module, path: str, called: dict[str, int], reads: set[str]) -> None:
        super().__init__()
        self._linear, self._path, self._called, self._reads = [linear], path, called, reads

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            linear = self.__dict__["_linear"][0]
            if name != "weight":
                return getattr(linear, name)
            self._reads.add(self._path)
            return _of_one_number(linear.get_parameter("weight"), {})

    def forward(self, hidden: Tensor, *_chosen: Tensor) -> Tensor:
        self._called[self._path] = self._called.get(self._path, 0) + 1
        linear = self._linear[0]
        if not is_linear(linear):
            return torch.zeros_like(hidden)
        width = linear.get_parameter("weight").shape[0 if isinstance(linear, nn.Linear) else 1]
        return hidden.new_zeros(*hidden.shape[:-1], width)


@contextlib.contextmanager
def _watching(blocks: list[nn.Module], watch: _Watch) -> Iterator[None]:
    handles = []
    for index, block in enumerate(blocks):

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> Any:
            args = tuple(watch.noted(value) for value in args)
            kwargs = {key: watch.noted(value) for key, value in kwargs.items()}
            watch.calls.append(_Seen(index, args, kwargs, _held((args, kwargs))))
            return args, kwargs

        def after(_module: nn.Module, _args: Any, _kwargs: Any, returned: Any) -> None:
            watch.calls[-1].returned = returned

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _held(value: Any) -> dict[int, int]:
    """The number of entries of every container among these arguments that a block could write to, by id."""
    if isinstance(value, MutableMapping | MutableSequence) and not isinstance(value, _Notes):
        inner = value.values() if isinstance(value, MutableMapping) else value
        return {id(value): len(value)} | {key: size for part in inner for key, size in _held(part).items()}
    if isinstance(value, tuple):
        return {key: size for part in value for key, size in _held(part).items()}
    return {}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | MutableSequence | MutableMapping):
        for part in value.values() if isinstance(value, MutableMapping) else value:
            yield from _tensors(part)


def _check_parameters(name: str, path: str, blocks: list[nn.Module]) -> None:
    owners: dict[int, str] = {}
    for index, block in enumerate(blocks):
        for leaf, parameter in block.named_parameters():
            owner = owners.setdefault(id(parameter), f"{index}.{leaf}")
            if owner != f"{index}.{leaf}":
                raise UnsupportedModel(
                    f"{name}: '{path}.{owner}' and '{path}.{index}.{leaf}' are one parameter; blocks that share "
                    "weights cannot be pruned one by one"
                )


def _check_order(name: str, path: str, count: int, watch: _Watch) -> None:
    order = [seen.index for seen in watch.calls]
    if order != list(range(count)):
        calls = ", ".join(map(str, order[:12])) or "none"
        raise UnsupportedModel(
            f"{name}: the {count} blocks of '{path}' are not called once each in their order, but: {calls}"
        )


def _form(where: str, block: nn.Module, seen: _Seen) -> Form:
    """How a block is called. Raises UnsupportedModel where it does not take hidden states and give them back."""
    first = next(iter(inspect.signature(block.forward).parameters), "")
    place: int | str = 0 if seen.args else first
    hidden = seen.args[0] if seen.args else seen.kwargs.get(first)
    returned = seen.returned
    length = len(returned) if type(returned) in (tuple, list) else None
    behind = returned[0] if length else returned
    if not isinstance(hidden, Tensor) or not isinstance(behind, Tensor):
        raise UnsupportedModel(
            f"{where} takes {type(hidden).__name__} and gives back {type(behind).__name__} first; a block has to take "
            "hidden states and give them back"
        )
    if hidden.shape != behind.shape or hidden.ndim != 3:
        raise UnsupportedModel(
            f"{where} makes {tuple(behind.shape)} of hidden states {tuple(hidden.shape)}; one sequence of vectors is "
            "handled"
        )
    return Form(place, length)


def _check_chain(name: str, path: str, calls: list[_Seen], forms: list[Form]) -> None:
    """Nothing but the hidden states goes from block to block, and they go as they are."""
    from transformers.cache_utils import Cache

    made: set[int] = set()
    for seen, form in zip(calls, forms, strict=True):
        where = f"{name}: '{path}.{seen.index}'"
        previous = calls[seen.index - 1]
        if seen.index and form.taken(seen.args, seen.kwargs) is not forms[seen.index - 1].unwrapped(previous.returned):
            raise UnsupportedModel(f"{where} does not read what the block before it gives back, but something else")
        if made & {id(tensor) for tensor in _tensors((seen.args, seen.kwargs))}:
            raise UnsupportedModel(f"{where} reads more of an earlier block than its hidden states")
        if _held((seen.args, seen.kwargs)) != seen.held:
            raise UnsupportedModel(f"{where} leaves something for later blocks besides its hidden states")
        if any(isinstance(value, Cache) for value in (*seen.args, *seen.kwargs.values())):
            raise UnsupportedModel(f"{where} is given a cache, though none is asked for")
        extra = seen.returned[1:] if form.length else ()
        made |= {id(tensor) for tensor in _tensors(tuple(extra))}


def _check_linears(name: str, path: str, blocks: list[nn.Module], watch: _Watch) -> None:
    for index, block in enumerate(blocks):
        for leaf, module in block.named_modules():
            times = watch.linears.get(f"{path}.{index}.{leaf}", 0)
            if (is_linear(module) or holds_experts(module)) and times != 1:
                said = "is not called" if not times else f"is called {times} times"
                raise UnsupportedModel(
                    f"{name}: '{path}.{index}.{leaf}' {said} when the model runs on tokens alone; each linear layer of "
                    "a block has to be called once (cross-attention, experts and shared layers are not handled)"
                )
