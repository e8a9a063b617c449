"""What healing is asked to do, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from crepe_deploy.errors import ConfigError
from crepe_deploy.limits import check_seed

TRAINED = ("norms", "kept")
DTYPES = ("auto", "bfloat16", "float32")
DEFAULT_STEPS = 200
WARM_UP = 0.05  # share of the budget over which the learning rate rises; then it falls as a cosine does


@dataclass(frozen=True)
class HealConfig:
    """Everything that decides the result, besides the models and the texts. Defaults are a start, not tuned.

    steps, minutes: the budget, one of them; without either DEFAULT_STEPS. batch_tokens: of a step, all processes
    together. window: tokens in each sequence. accumulate: parts that a step's batch is computed in. top_k: as of
    `loss.divergence`. lora: rank of adapters that are trained in place of the kept weights. train: of TRAINED.
    dtype: to compute in; "auto" is the checkpoint's, bfloat16 for float16. Updates are kept in float32 whatever it is.
    holdout: share of every text that is not trained on and decides which step is best.
    """

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 2e-4
    batch_tokens: int = 2048
    window: int = 512
    accumulate: int = 1
    checkpointing: bool = False
    top_k: int | None = None
    lora: int | None = None
    train: tuple[str, ...] = TRAINED
    dtype: str = "auto"
    seed: int = 0
    holdout: float = 0.05

    def check(self) -> None:
        """Raise ConfigError for values that cannot work."""
        check_seed(self.seed)
        if self.steps is not None and self.minutes is not None:
            raise ConfigError("--steps and --minutes are both a budget: give one")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"--learning-rate {self.learning_rate}: a number above 0 is needed")
        if not 0 < self.holdout <= 0.5:
            raise ConfigError(f"--holdout {self.holdout}: a share above 0 and of at most 0.5 is needed")
        if self.window < 2 or self.batch_tokens < self.window:
            raise ConfigError(f"--batch-tokens {self.batch_tokens} hold no window of {self.window} tokens")
        if (unknown := set(self.train) - set(TRAINED)) or not self.train:
            raise ConfigError(f"--train {','.join(sorted(unknown)) or 'nothing'}: one or both of {', '.join(TRAINED)}")
        if self.lora is not None and "kept" not in self.train:
            raise ConfigError("--lora trains the kept weights, which --train leaves out")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: healing computes in {', '.join(DTYPES[1:])}, or auto")

    @property
    def windows(self) -> int:
        """Sequences in the batch of a step."""
        return self.batch_tokens // self.window

    @property
    def budget_steps(self) -> int | None:
        """Steps to be taken; None where minutes decide."""
        return None if self.minutes is not None else self.steps or DEFAULT_STEPS

    def rate(self, share: float) -> float:
        """The learning rate once this share of the budget is used."""
        if share < WARM_UP:
            return self.learning_rate * (0.1 + 0.9 * share / WARM_UP)
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "train": list(self.train), "steps": self.budget_steps}
