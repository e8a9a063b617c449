"""The zeros of a model held inside `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from .zeros import HeldZeros, hold_zeros


class HoldZeros(TrainerCallback):  # type: ignore[misc]
    """Holds the zeros of the trained model from the first step on, and proves them at the end.

    names: as of `hold_zeros`. zeros: once trained, how many were held and found again, by parameter name.
    Training ends in a VerifyError where one was lost, and begins with a ConfigError where there is none.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        self._names = None if names is None else list(names)
        self._held: HeldZeros | None = None
        self.zeros: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Take the zeros as they are."""
        if self._held is not None:  # of a training that an error ended
            self._held.release()
        self._held = hold_zeros(about["model"], self._names)

    def on_train_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Count them."""
        assert self._held is not None
        held, self._held = self._held, None
        self.zeros = held.release()
