"""The evolutionary search by itself: children, stages, generations and their journal."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_deploy.store.journal import open_journal
from crepe_deploy.structural.evolve import Rules, brood, evolve, ladders, selection, staged
from crepe_deploy.structural.plan import Geometry
from crepe_deploy.structural.units import Allocation, Units


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 6))
def test_children_keep_both_budgets_and_their_levels(seed: int, attention_step: int, neuron_step: int) -> None:
    units = Units(Geometry(64, 8, 4, 8, 256, 6), 16, "groups")
    draw = random.Random(seed)
    parent = Allocation(tuple(draw.randint(1, 4) for _ in range(6)), tuple(draw.randint(1, 16) for _ in range(6)))
    rungs = ladders(units, parent, attention_step, neuron_step)
    children = brood(parent, rungs, 12, draw)
    assert len(children) == len(set(children)) and parent not in children
    for child in children:
        assert sum(child.attention) == sum(parent.attention) and sum(child.neurons) == sum(parent.neurons)
        assert all(kept in levels for kept, levels in zip(child.attention, rungs.attention, strict=True))
        assert all(kept in levels for kept, levels in zip(child.neurons, rungs.neurons, strict=True))


def test_where_nothing_can_move_there_are_no_children() -> None:
    units = Units(Geometry(64, 8, 4, 8, 256, 1), 16, "groups")
    parent = Allocation((2,), (8,))
    assert brood(parent, ladders(units, parent, 1, 1), 4, random.Random(0)) == []


def test_stages_judge_fewer_on_more() -> None:
    stages = selection(16, 16)
    assert [(stage.windows, stage.keep) for stage in stages] == [(2, 4), (4, 2), (16, 1)]
    assert [stage.windows for stage in selection(16, 1)] == [1]
    seen: list[tuple[int, int]] = []

    def score(alive: list[int], windows: list[int]) -> list[float]:
        seen.append((len(alive), len(windows)))
        assert len(set(windows)) == len(windows)
        return [abs(candidate - 11) for candidate in alive]

    assert staged(list(range(16)), stages, score, 16, random.Random(0)) == (11, 0.0)
    assert seen == [(16, 2), (4, 4), (2, 16)]


def test_evolution_finds_the_optimum_never_worsens_and_replays_its_journal(tmp_path: Path) -> None:
    units = Units(Geometry(64, 8, 4, 8, 256, 6), 16, "groups")

    def flat(allocation: Allocation) -> tuple[int, ...]:
        return (*allocation.attention, *allocation.neurons)

    wanted = Allocation((4, 3, 2, 1, 1, 1), (12, 10, 8, 8, 6, 4))
    parent = Allocation((2,) * 6, (8,) * 6)

    def score(candidates: list[Allocation], windows: list[int]) -> list[float]:
        return [
            float(sum(abs(a - b) for a, b in zip(flat(candidate), flat(wanted), strict=True)))
            for candidate in candidates
        ]

    journal = open_journal(tmp_path / "journal", {"run": 1}, resume=False)
    rungs = ladders(units, parent, 1, 1)
    rules = Rules(generations=30, offspring=24, pool=8, seed=0)
    said: list[str] = []
    found, fitness = evolve(parent, rungs, rules, 0, score, journal, said.append)
    assert found == wanted and fitness == 0
    values = [float(line.split("so far ")[1].split(",")[0]) for line in said]
    assert values == sorted(values, reverse=True)

    def never(candidates: list[Allocation], windows: list[int]) -> list[float]:
        raise AssertionError("a recorded generation was run again")

    again = open_journal(tmp_path / "journal", {"run": 1}, resume=True)
    assert evolve(parent, rungs, rules, 0, never, again, said.append) == (wanted, 0.0)
    lines = (tmp_path / "journal").read_text().splitlines()
    (tmp_path / "journal").write_text("\n".join(lines[:9]) + "\n")
    half = open_journal(tmp_path / "journal", {"run": 1}, resume=True)
    assert evolve(parent, rungs, rules, 0, score, half, said.append) == (wanted, 0.0)
    assert (tmp_path / "journal").read_text().splitlines() == lines
