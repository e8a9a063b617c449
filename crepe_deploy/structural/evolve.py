"""The evolutionary search of the Týr paper: flips within a kind, staged selection, elitism.

A candidate keeps, for every layer, some attention units and some FFN units. A flip takes one level's worth of units
from one module and gives it to another one of the same kind, so the parameters of attention and FFN stay as they are.
Every generation's draws come from a generator of its own, so a resumed search goes on as if it had never stopped.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from crepe_deploy.store.journal import Journal, numbers

from .units import Allocation, Units, levels

MOST_FLIPS = 4
ATTEMPTS_A_CHILD = 50

Kind = Literal["attention", "neurons"]
Score = Callable[[Sequence[Allocation], Sequence[int]], list[float]]
Say = Callable[[str], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Ladders:
    """The levels of every module, ascending, in units; one tuple for each layer."""

    attention: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]

    def of(self, kind: Kind) -> tuple[tuple[int, ...], ...]:
        """The levels of one kind of module."""
        return self.attention if kind == "attention" else self.neurons


@dataclass(frozen=True)
class Stage:
    """One round of selection: candidates are judged on `windows` windows, and the best `keep` go on."""

    windows: int
    keep: int


@dataclass(frozen=True)
class Rules:
    """generations and offspring of every iteration; pool: windows of search text there are."""

    generations: int
    offspring: int
    pool: int
    seed: int

    def stages(self) -> tuple[Stage, ...]:
        """A quarter of the offspring after an eighth of the windows, an eighth after a quarter, one after all.

        (The paper: an eighth and a thirty-second of 128, on 2,048, 16,384 and 131,072 tokens.)
        """
        return selection(self.offspring, self.pool)


def selection(candidates: int, pool: int) -> tuple[Stage, ...]:
    """The stages for so many candidates and windows; those that would judge all on everything are left out."""
    stages = (
        Stage(max(1, pool // 8), max(1, candidates // 4)),
        Stage(max(1, pool // 4), max(1, candidates // 8)),
        Stage(pool, 1),
    )
    early = [stage for stage in stages[:-1] if stage.windows < pool and stage.keep < candidates]
    return (*early, stages[-1])


def ladders(units: Units, centre: Allocation, attention_step: int, neuron_step: int) -> Ladders:
    """The levels around an allocation: the same step for all modules of a kind."""
    return Ladders(
        tuple(levels(kept, attention_step, units.attention_count) for kept in centre.attention),
        tuple(levels(kept, neuron_step, units.neuron_count) for kept in centre.neurons),
    )


def mutate(parent: Allocation, rungs: Ladders, draw: random.Random) -> Allocation:
    """A child of `parent`: the smaller of two draws from 1 to 4 flips. Budgets of both kinds are kept.

    A flip that has no partner is left out, so where nothing can move the child is the parent.
    """
    kept: dict[Kind, list[int]] = {"attention": list(parent.attention), "neurons": list(parent.neurons)}
    for _ in range(min(draw.randint(1, MOST_FLIPS), draw.randint(1, MOST_FLIPS))):
        kind: Kind = draw.choice(("attention", "neurons"))
        _flip(kept[kind], rungs.of(kind), draw)
    return Allocation(tuple(kept["attention"]), tuple(kept["neurons"]))


def _flip(kept: list[int], rungs: tuple[tuple[int, ...], ...], draw: random.Random) -> None:
    lower = [index for index, level in enumerate(kept) if level > rungs[index][0]]
    if not lower:
        return
    taken = draw.choice(lower)
    higher = [index for index, level in enumerate(kept) if level < rungs[index][-1] and index != taken]
    if not higher:
        return
    given = draw.choice(higher)
    kept[taken] = rungs[taken][rungs[taken].index(kept[taken]) - 1]
    kept[given] = rungs[given][rungs[given].index(kept[given]) + 1]


def brood(parent: Allocation, rungs: Ladders, count: int, draw: random.Random) -> list[Allocation]:
    """Up to `count` different children, none of them the parent; fewer where so many do not exist."""
    children: dict[Allocation, None] = {}
    for _ in range(count * ATTEMPTS_A_CHILD):
        child = mutate(parent, rungs, draw)
        if child != parent:
            children[child] = None
        if len(children) == count:
            break
    return list(children)


def staged(
    candidates: Sequence[Item],
    stages: Sequence[Stage],
    score: Callable[[Sequence[Item], Sequence[int]], list[float]],
    pool: int,
    draw: random.Random,
) -> tuple[Item, float]:
    """The best of `candidates` after all stages, and its fitness on the whole pool.

    Every early stage draws its windows anew; equal fitness goes to the earlier candidate.
    """
    alive = list(candidates)
    ranked: list[tuple[float, int]] = []
    for stage in stages:
        windows = sorted(draw.sample(range(pool), stage.windows))
        values = score(alive, windows)
        ranked = sorted((value, position) for position, value in enumerate(values))
        alive = [alive[position] for _, position in ranked[: stage.keep]]
    return alive[0], ranked[0][0]


def evolve(
    parent: Allocation, rungs: Ladders, rules: Rules, iteration: int, score: Score, journal: Journal, say: Say
) -> tuple[Allocation, float]:
    """Run one iteration's generations from `parent`; returns the best allocation and its fitness.

    A generation that the journal holds is not run again. The parent is judged on the whole pool once and replaced only
    by a better child (elitism).
    """
    fitness: float | None = None
    for generation in range(rules.generations + 1):
        key = f"{iteration}.{generation}"
        entry = journal.get("generation", key, partial(_is_entry, parent=parent, rungs=rungs))
        if entry is None:
            started, counted = time.monotonic(), _Counted(score)
            draw = random.Random(f"{rules.seed}.{key}")
            if fitness is None:
                fitness = counted([parent], range(rules.pool))[0]
                judged = 1
            else:
                children = brood(parent, rungs, rules.offspring, draw)
                judged = len(children)
                if children:
                    best, value = staged(children, rules.stages(), counted, rules.pool, draw)
                    parent, fitness = (best, value) if value < fitness else (parent, fitness)
            pace = 60 * judged / max(time.monotonic() - started, 1e-9)
            say(
                f"iteration {iteration + 1}, generation {generation}/{rules.generations}: best fitness so far "
                f"{fitness:.5g}, {judged} candidates, {pace:.0f} a minute"
            )
            entry = {
                "attention": list(parent.attention), "neurons": list(parent.neurons), "fitness": fitness,
                "evaluations": counted.candidates,
            }  # fmt: skip
            journal.add("generation", key, entry)
        parent = Allocation(tuple(entry["attention"]), tuple(entry["neurons"]))
        fitness = float(entry["fitness"])
    assert fitness is not None
    return parent, fitness


def evaluations(journal: Journal, iteration: int, generations: int) -> int:
    """How many candidates an iteration has judged in all, before a stop and after; older journals count none."""
    entries = (journal.get("generation", f"{iteration}.{number}") for number in range(generations + 1))
    return sum(entry.get("evaluations", 0) for entry in entries if entry is not None)


@dataclass
class _Counted:
    """A score that counts the candidates it is asked for."""

    score: Score
    candidates: int = 0

    def __call__(self, allocations: Sequence[Allocation], windows: Sequence[int]) -> list[float]:
        self.candidates += len(allocations)
        return self.score(allocations, windows)


def _is_entry(value: Any, parent: Allocation, rungs: Ladders) -> bool:
    """Whether a generation could have ended there: the parent's budgets, levels of the ladders, a fitness."""
    if not isinstance(value, dict) or value.keys() - {"evaluations"} != {"attention", "neurons", "fitness"}:
        return False
    kinds: tuple[Kind, ...] = ("attention", "neurons")
    for kind, budget in zip(kinds, (parent.attention, parent.neurons), strict=True):
        kept, levels_of = value[kind], rungs.of(kind)
        if not numbers(kept, len(levels_of)) or sum(kept) != sum(budget):
            return False
        if not all(type(one) is int and one in known for one, known in zip(kept, levels_of, strict=True)):
            return False
    count = value.get("evaluations", 0)
    return numbers([value["fitness"]]) and type(count) is int and 0 <= count < 1 << 31
