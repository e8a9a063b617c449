"""Repair of a whole block under fixed zeros: its output on the pruned stream is brought near the dense model's.

A layer-wise fit cannot make up for what a nonlinearity does between two layers. So once all layers of a block are
pruned and fitted, the weights that they keep, and the block's norms, are tuned together: given the hidden states as the
pruned model has them in front of the block, it is to put out what the dense model has behind it. The error of a token
counts over the size of what is wanted for it, as the next norm sees it. Adam on fp32 masters; the block always computes
with what would be written, in the file's dtype. Some windows are held out from every fit, and the step that is best on
them stays, the start among them: no block ends worse there than it began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from crepe_deploy.model.calibrate import Stream
from crepe_deploy.model.calls import Call
from crepe_deploy.model.decoder import follow
from crepe_deploy.progress import unheard

from ..methods.base import check_range

CHECKS = 6  # times that the held-out error is taken on the way
TINY = 1e-30


@dataclass(frozen=True)
class Lesson:
    """A micro-batch: how the block is called, what it reads, and what it is to put out (windows, length, width)."""

    call: Call
    given: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Lessons(Sequence[Lesson]):
    """What block number `block` reads in the pruned model and is to put out, with the dense side behind it already.

    Each comes to the device that computes when it is asked for.
    """

    pruned: Stream
    dense: Stream
    block: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.pruned.hidden)

    def __getitem__(self, place: Any) -> Any:
        given, wanted = (stream.hidden[place].to(self.device) for stream in (self.pruned, self.dense))
        return Lesson(self.pruned.calls[place][self.block], given, wanted)


@dataclass(frozen=True)
class Repaired:
    """Mean relative squared error of a block's output on held-out windows, before and after; step: the one kept."""

    before: float
    after: float
    step: int


def is_repaired(value: Any) -> bool:
    """Whether what a journal holds is a `Repaired`."""
    return (
        isinstance(value, dict)
        and value.keys() == {field.name for field in fields(Repaired)}
        and all(type(value[name]) is float and math.isfinite(value[name]) for name in ("before", "after"))
        and type(value["step"]) is int
    )


@dataclass(frozen=True)
class BlockRepair:
    """steps: of one micro-batch each. rate: Adam's, falling to 0. windows: held out, at most a quarter."""

    steps: int = 32
    rate: float = 1e-3
    windows: int = 8

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1)
        check_range("rate", self.rate, 1e-8, 1)
        check_range("windows", self.windows, 1)

    def __call__(
        self,
        block: nn.Module,
        tuned: Mapping[str, Tensor],
        learnt: Sequence[Lesson],
        held: Sequence[Lesson],
        tick: Callable[[float], None] = unheard,
    ) -> Repaired:
        """Tune parameters of `block` in place on `learnt`, judged by `held`.

        tuned: by their names in the block, as stored: they follow, their zeros stay. tick: told the share of this that
        each step was.
        """
        with _Masters(block, tuned) as masters:
            least = first = _error(block, held)
            kept = 0
            every = max(1, self.steps // CHECKS)
            for step in range(1, self.steps + 1):
                lesson = _plain(learnt[(step - 1) % len(learnt)])
                loss = relative_error(lesson.call(block, lesson.given), lesson.wanted)
                if not loss.isfinite():
                    break
                masters.step(loss, self.rate * (1 - (step - 1) / self.steps))
                if step % every == 0 or step == self.steps:
                    error = _error(block, held)
                    if error < least:
                        least, kept = error, step
                        masters.keep()
                tick(1 / self.steps)
        return Repaired(first, least, kept)


def tunable(block: nn.Module, targets: Collection[str], linear: Collection[str]) -> list[str]:
    """Names in the block of what may be tuned: the weights of layers at `targets`, and the norms.

    linear: the paths of all linear layers, whose biases are none.
    """
    return [
        name
        for name, parameter in block.named_parameters()
        if name.removesuffix(".weight") in targets
        or (parameter.ndim == 1 and not name.startswith(tuple(f"{path}." for path in linear)))
    ]


REPAIRERS: dict[str, type[BlockRepair]] = {"block": BlockRepair}


def relative_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of the squared error over the squared size of what was wanted; both (windows, length, width)."""
    wanted = wanted.float()
    return ((output.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(TINY)).mean()


class _Masters:
    """fp32 copies of parameters that are tuned, which at the end hold what was last kept; for a `with` block."""

    def __init__(self, block: nn.Module, tuned: Mapping[str, Tensor]) -> None:
        self._stored = dict(tuned)
        self._parameters = {name: block.get_parameter(name) for name in tuned}
        self._start = {name: tensor.clone() for name, tensor in tuned.items()}
        self._best = self._start
        self._masters = {name: tensor.float().clone() for name, tensor in tuned.items()}
        self._alive = {name: tensor != 0 for name, tensor in tuned.items() if tensor.ndim > 1}
        self._adam = torch.optim.Adam(list(self._masters.values()))

    def __enter__(self) -> _Masters:
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        self._write(self._best)

    def step(self, loss: Tensor, rate: float) -> None:
        """One step of Adam down the gradient of `loss`."""
        for name, gradient in zip(
            self._masters, torch.autograd.grad(loss, list(self._parameters.values())), strict=True
        ):
            alive = self._alive.get(name)
            self._masters[name].grad = gradient.float() if alive is None else gradient.float() * alive
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._write(self._masters)

    def keep(self) -> None:
        """Remember what the block computes with now."""
        self._best = {name: tensor.clone() for name, tensor in self._stored.items()}

    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Into the tensors as stored, and from there into the block; what would round to 0 stays as it began."""
        for name, stored in self._stored.items():
            value = values[name].to(stored.dtype)
            if name in self._alive:
                value = torch.where((value == 0) & self._alive[name], self._start[name], value)
            stored.copy_(value)
            follow(self._parameters[name], stored)


@torch.no_grad()
def _error(block: nn.Module, lessons: Sequence[Lesson]) -> float:
    errors = [relative_error(lesson.call(block, lesson.given), lesson.wanted) for lesson in lessons]
    return float(torch.stack(errors).mean())


def _plain(lesson: Lesson) -> Lesson:
    """The same for the autograd, which refuses tensors that were made in inference mode."""
    call = lesson.call
    plain = Call(call.form, _copied(call.args), _copied(call.kwargs))
    return Lesson(plain, lesson.given.clone(), lesson.wanted)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(part) for part in value)
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items()}
    return value
