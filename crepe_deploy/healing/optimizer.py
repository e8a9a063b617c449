"""AdamW on float32 masters of weights that are computed with in a coarser dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Masters:
    """Keeps what is trained in float32, steps there, and rounds into the model. parameters: by name.

    Without decay nothing but its gradient moves a weight: the master of a held zero stays one.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._masters = {name: nn.Parameter(one.detach().float()) for name, one in self._parameters.items()}
        self._adam = torch.optim.AdamW(self._masters.values(), weight_decay=0.0, fused=True)
        self._adam.state.update({
            master: {"step": torch.zeros((), device=master.device)}
            | {moment: torch.zeros_like(master) for moment in ("exp_avg", "exp_avg_sq")}
            for master in self._masters.values()
        })  # fmt: skip

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at this learning rate, and the gradients gone."""
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None, name
            self._masters[name].grad = parameter.grad.float()
            parameter.grad = None
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        self._round()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that a stopped run goes on from, by name."""
        for name, master in self._masters.items():
            yield f"master.{name}", master.data
            yield f"first.{name}", self._adam.state[master]["exp_avg"]
            yield f"second.{name}", self._adam.state[master]["exp_avg_sq"]

    @torch.no_grad()
    def restored(self, steps: int) -> None:
        """What `state` gives was filled with the state behind so many steps."""
        for master in self._masters.values():
            self._adam.state[master]["step"].fill_(steps)
        self._round()

    def _round(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._masters[name])
