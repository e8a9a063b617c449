"""The pieces of the healing study: their names, and what each costs before and after it was measured.

A piece is [KIND/]START@STEPS with a seed: a pruned model, healed for so many steps, 0 for none, and scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ...errors import ConfigError
from ...nearest import unknown
from .grid import Cell

NARROWED, ZERO_SHOT = "narrowed", "zero-shot"
STEPS: Final = (0, 30, 60, 130, 200)
SEEDS: Final = (0, 1, 2)
IDLE_CORES: Final = 2  # that minutes are told of


@dataclass(frozen=True)
class Start:
    """A pruned model: the command that makes it, and about how many minutes of processor time that takes."""

    command: tuple[str, ...]
    cpu_minutes: float


_BEST: Final = ("prune", "--recipe", "best", "--calib-samples", "64", "--calib-length", "512")
_TYR: Final = ("tyr", "--iterations", "1", "--generations", "6", "--search-samples", "8", "--calib-length", "512")
STARTS: Final[dict[str, Start]] = {
    "16:32": Start((*_BEST, "--sparsity", "16:32"), 10),
    "2:4": Start((*_BEST, "--sparsity", "2:4"), 10),
    "tyr25": Start((*_TYR, "--sparsity", "0.25"), 30),
    "tyr50": Start((*_TYR, "--sparsity", "0.5"), 30),
}
NARROWING: Final = Start((*_TYR, "--sparsity", "0.125", "--offspring", "16", "--seed", "0"), 30)  # of the second model
STEP_SECONDS: Final = 19.0  # of processor time, on SmolLM2 without AMX, until a cell was measured
SCORE_MINUTES: Final = {"": 0.5, NARROWED: 0.5, ZERO_SHOT: 15.0}


@dataclass(frozen=True)
class Piece:
    """kind: "" on SmolLM2, NARROWED on the second model, ZERO_SHOT for tasks in place of perplexity."""

    kind: str
    start: str
    steps: int

    @property
    def label(self) -> str:
        """Without the steps."""
        return f"{self.kind}/{self.start}" if self.kind else self.start

    @property
    def name(self) -> str:
        """As `--cell` takes it."""
        return f"{self.label}@{self.steps}"

    @property
    def model(self) -> str:
        """The kind whose models it uses."""
        return NARROWED if self.kind == NARROWED else ""

    def key(self, seed: int) -> str:
        """In the results file."""
        return f"{self.label}|{self.steps}|{seed}"


def pieces() -> list[Piece]:
    """What the study is made of, the cheapest and most wanted first; other steps may be asked for by name."""
    curves = [Piece("", start, steps) for steps in STEPS for start in STARTS]
    tasks = [Piece(ZERO_SHOT, start, steps) for steps in (0, STEPS[-1]) for start in STARTS]
    second = [
        Piece(NARROWED, start, steps) for steps in (0, STEPS[-1]) for start in STARTS if start in ("16:32", "2:4")
    ]
    return [*curves, *tasks, *second]


def parse(name: str) -> Piece:
    """The piece of this name. Raises ConfigError."""
    label, _, steps = name.rpartition("@")
    kind, _, start = label.rpartition("/")
    if start not in STARTS or kind not in SCORE_MINUTES or not steps.isdecimal():
        raise ConfigError(unknown("cell", name, [piece.name for piece in pieces()]))
    return Piece(kind, start, int(steps))


def of_key(key: str) -> tuple[Piece, int]:
    """The piece and the seed of a key in the results file."""
    label, steps, seed = key.split("|")
    kind, _, start = label.rpartition("/")
    return Piece(kind, start, int(steps)), int(seed)


def step_seconds(cells: Iterable[Cell]) -> float | None:
    """Processor time of a step of healing, its looks at held-out text included: the mean over cells that knew it."""
    known = [cell["step_cpu_seconds"] for cell in cells if cell.get("step_cpu_seconds") is not None]
    return sum(known) / len(known) if known else None


def cost(piece: Piece, seed: int, cells: Mapping[str, Cell], made: Callable[[Piece, int], bool]) -> float:
    """Minutes of processor time that a piece took, or will take. made: whether its model is still in the folder."""
    if (known := cells.get(piece.key(seed))) is not None:
        return float(known["cpu_seconds"]) / 60
    minutes = SCORE_MINUTES[piece.kind]
    if not made(piece, seed):
        minutes += piece.steps * (step_seconds(cells.values()) or STEP_SECONDS) / 60
        if not made(Piece(piece.model, piece.start, 0), seed):
            minutes += STARTS[piece.start].cpu_minutes + (NARROWING.cpu_minutes if piece.kind == NARROWED else 0)
    return minutes


def listed(
    cells: Mapping[str, Cell], made: Callable[[Piece, int], bool], begun: Callable[[Piece, int], bool]
) -> list[str]:
    """A line for each piece and seed: whether it is done, and its cost. begun: whether a stopped one can go on."""
    lines = []
    for piece in pieces():
        for seed in SEEDS:
            minutes, known = cost(piece, seed, cells, made), cells.get(piece.key(seed))
            if known is None:
                state = "begun" if begun(piece, seed) else "left"
            else:
                part = " (cost of what came behind a stop)" if any(run["went_on"] for run in known["runs"]) else ""
                state = f"done: {figures(known)}{part}"
            lines.append(
                f"{piece.name:22} seed {seed}  {minutes:6.1f} CPU-minutes, {minutes / IDLE_CORES:5.1f} on {IDLE_CORES} "
                f"idle cores  {state}"
            )
    return lines


def figures(cell: Mapping[str, Any]) -> str:
    """What a cell found, in a line."""
    if "tasks" in cell:
        return ", ".join(f"{task} {one['acc']['value']:.3f}" for task, one in cell["tasks"].items())
    return ", ".join(f"{text} {one['value']:.2f}" for text, one in cell["perplexity"].items())
