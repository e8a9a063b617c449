"""What decides the result of a structural pruning, besides the model and the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crepe_deploy.errors import ConfigError
from crepe_deploy.pruning.steps import build_step
from crepe_deploy.pruning.steps.repair import BlockRepair

from .accumulate import ACCUMULATIONS
from .fitness import FITNESSES
from .levels import LocalRules
from .local import DEFAULT_VARIANT

FINISHES = ("paired", "single", "supernet")
SHARES = ("best", "target")


@dataclass(frozen=True)
class Method:
    """One way to a smaller model. select: of channels, see `LocalRules`. refit: the default. allocate: of units."""

    select: str
    refit: bool
    allocate: Literal["search", "even", "flap"]


METHODS: dict[str, Method] = {
    "tyr": Method("saliency", True, "search"),
    "uniform": Method("saliency", True, "even"),
    "flap": Method("flap", False, "flap"),
    "magnitude": Method("magnitude", False, "even"),
    "random": Method("random", False, "even"),
}


@dataclass(frozen=True)
class TyrConfig:
    """The options of a run.

    sparsity: share of the decoder layers' linear parameters to remove. widths: "uniform" or "per-layer".
    multiple: neurons in an FFN unit. attention: "groups", "queries" or "auto" (groups where there are at least four).
    attention_share: of attention units that stay, with per-layer widths: a number, "target" (as large a share as of
    everything) or "best" (even splits are judged first); None is "best" for a search and "target" for a baseline.
    top_k: logits that the fitness compares. refit: None is the method's own.
    finish: how the found widths are pruned at the end: "single" prunes the dense model once more, each layer behind
    what was pruned before it; "paired" does and aims at the dense model's output; "supernet" takes the last levels.
    repair: `block` or `block:PARAMETER=VALUE,...`: narrowed blocks are tuned at the end, as `--repair` of `prune` does.
    search_samples: the last windows of the text, kept for the search alone; 0 searches on the windows that pruning is
    calibrated on.
    """

    sparsity: float
    method: str = "tyr"
    widths: str = "per-layer"
    iterations: int = 4
    generations: int = 10
    offspring: int = 16
    multiple: int = 128
    attention: str = "auto"
    attention_share: float | str | None = None
    accumulation: str = "expectation"
    variant: str = DEFAULT_VARIANT
    fitness: str = "logits"
    top_k: int = 1024
    refit: bool | None = None
    finish: str = "single"
    repair: str | None = None
    search_samples: int = 0
    seed: int = 0
    dtype: str = "auto"

    def check(self) -> None:
        """Raise ConfigError for what is unknown, listing the known, or does not go together."""
        for option, value, known in (
            ("--method", self.method, tuple(METHODS)),
            ("--widths", self.widths, ("uniform", "per-layer")),
            ("--attention", self.attention, ("auto", "groups", "queries")),
            ("--accumulation", self.accumulation, ACCUMULATIONS),
            ("--fitness", self.fitness, FITNESSES),
            ("--finish", self.finish, FINISHES),
        ):
            if value not in known:
                raise ConfigError(f"{option} '{value}' is unknown; known: {', '.join(known)}")
        if isinstance(self.attention_share, str) and self.attention_share not in SHARES:
            raise ConfigError(
                f"--attention-share '{self.attention_share}' is unknown; known: {', '.join(SHARES)}, a number"
            )
        if self.widths == "uniform" and self.attention_share is not None:
            raise ConfigError("--attention-share is for per-layer widths: --widths uniform judges every split anyway")
        if min(self.iterations, self.generations, self.offspring, self.top_k) < 1 or self.search_samples < 0:
            raise ConfigError("iterations, generations, offspring and top-k start at 1, search samples at 0")
        self.block_repair()
        rules = self.rules()
        if rules.select == "saliency" and not rules.refit and self.finish == "paired":
            raise ConfigError("--finish paired aims at the dense model's output, which needs the refit: give another")

    @property
    def searches(self) -> bool:
        """Whether the method looks for the widths by search."""
        return METHODS[self.method].allocate == "search"

    @property
    def judges_splits(self) -> bool:
        """Whether the attention share of per-layer widths is found by judging even splits."""
        share = ("best" if self.searches else "target") if self.attention_share is None else self.attention_share
        return self.widths == "per-layer" and share == "best"

    def block_repair(self) -> BlockRepair | None:
        """How narrowed blocks are repaired, None where they are not. Raises ConfigError."""
        built: BlockRepair | None = None if self.repair is None else build_step("repair", self.repair)
        return built

    def rules(self) -> LocalRules:
        """How projections are pruned. Raises ConfigError."""
        method = METHODS[self.method]
        refit = method.refit if self.refit is None else self.refit
        return LocalRules(self.variant, method.select, refit, seed=self.seed)
