"""What an engine must do to be measured: load a folder, continue prompts and say when each token was there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError
from ...nearest import meant

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Settings:
    """How an engine is to be loaded.

    max_tokens: of the longest sequence, prompt and output. max_batch: sequences in lock step. dtype: to compute in;
    auto: the engine's choice for this checkpoint. threads: for an engine that is not steered by OMP_NUM_THREADS; 0:
    its own choice. options: the engine's own, such as `compiled` of vLLM.
    """

    max_tokens: int = 1024
    max_batch: int = 4
    dtype: str = "auto"
    threads: int = 0
    options: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A loaded model. An implementation is a class taking (folder, settings), in a file of its own with its heavy
    imports inside the methods, so that naming it costs nothing."""

    def __init__(self, folder: Path, settings: Settings) -> None: ...

    @classmethod
    def require(cls, options: dict[str, Any]) -> None:
        """Before anything slow: raise MissingExtra where its library is not installed, ConfigError for an option that
        it does not know."""

    def generate(self, prompts: Prompts, tokens: int) -> list[float]:
        """Continue every prompt greedily by exactly `tokens` tokens, all in one batch, ignoring end-of-text.

        Returns, for each of them, the `time.perf_counter()` at which it was there for every prompt. Raises
        RuntimeError where that did not come about: the request is recorded as failed.
        """

    def describe(self) -> dict[str, Any]:
        """`dtype`: what it computes in. `linear_bytes`: held by the decoder blocks' linear layers, None where unknown;
        `linears`: how many; `kernels`: what serves them, where that is known."""

    def close(self) -> None:
        """Free what the engine holds."""


def check_lengths(counts: Sequence[int], tokens: int) -> None:
    """Raise RuntimeError when an engine stopped early: its time would be too good."""
    if any(count != tokens for count in counts):
        raise RuntimeError(f"asked for {tokens} new tokens, got {list(counts)}")


def check_options(engine: str, options: dict[str, Any], known: Sequence[str]) -> None:
    """Raise ConfigError naming the first option that `engine` does not know, and those it does."""
    for name in options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"engine {engine} has no option '{name}': {has}{meant(name, known)}")


def held_bytes(module: Any) -> int:
    """Bytes of all parameters and buffers of a module."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def plan_names(plan: Sequence[int]) -> dict[str, str]:
    """The packed kernel of each batch bucket that was measured, by the bucket's largest batch."""
    from ...packed.dispatch import NAMES

    return {str(1 << index): NAMES[code] for index, code in enumerate(plan) if code}
