"""The stages of a run: which widths the layers get, and their last pruning."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

from crepe_deploy.progress import Meter
from crepe_deploy.store.journal import numbers

from .allocate import flap_allocation, flap_scores
from .build import Builder
from .config import METHODS
from .evolve import Rules, Stage, evaluations, evolve, ladders, selection, staged
from .fitness import FitnessJudge, Reference
from .prepare import Run, even_splits, split_levels
from .repair import repair_plans
from .stored import StoredPlans
from .supernet import LayerLevels, Store
from .units import Allocation, Budget, Units, Width, even, plan_budget, proportional, step_units

Widths = tuple[Width, ...]


def find_widths(run: Run) -> tuple[Widths, dict[str, Any]]:
    """The width of every layer, and what the report says of how it was found."""
    allocate = METHODS[run.config.method].allocate
    if run.config.widths == "uniform":
        return _search_shared(run) if allocate == "search" else (_shared_start(run), {})
    budget, facts = _budget(run)
    if allocate == "search":
        widths, search = _search(run, budget)
        return widths, {**facts, **search}
    if allocate == "flap":
        with run.phases("allocate"), run.show("scoring channels") as step:
            scores = flap_scores(run.decoder, run.pruning_tokens, step)
        return run.units.widths(flap_allocation(scores, run.units, budget)), facts
    return run.units.widths(even(run.units, budget)), facts


def _shared_start(run: Run) -> Widths:
    """The uniform widths of no search: the split that prunes attention and FFN most alike."""
    return (proportional(run.geometry, run.shared),) * run.geometry.layers


def finish(run: Run, widths: Widths) -> StoredPlans:
    """Prune the dense model once more to `widths`, or take the supernet's levels; see `TyrConfig.finish`."""
    config, rules = run.config, run.config.rules()
    if config.searches and config.finish == "supernet":
        return StoredPlans(run.store(_last_store(run)), widths)
    store, wanted = run.store("final"), [_single(width) for width in widths]
    with run.phases("finish"), run.show("pruning to the found widths") as step:
        builder = _builder(run, step)
        if rules.refit and config.finish == "paired":
            builder.build_paired(wanted, store)
        else:
            builder.build(wanted, store, "single" if rules.refit else "none")
    return StoredPlans(store, widths)


def repaired(run: Run, plans: StoredPlans) -> tuple[StoredPlans, dict[str, Any]]:
    """The plans with their layers repaired where that was asked for, and what the report says of it."""
    repair = run.config.block_repair()
    if repair is None:
        return plans, {}
    with run.phases("repair"), run.show("repairing the narrowed blocks") as step:
        plans, results = repair_plans(run, plans, repair, Meter(step, len(plans)))
    return plans, {"repair": [asdict(result) for result in results]}


def _last_store(run: Run) -> str:
    return "shared" if run.config.widths == "uniform" else f"iteration-{run.config.iterations - 1}"


def _single(width: Width) -> LayerLevels:
    attention = (width.groups, width.queries)
    return LayerLevels((attention,), (width.neurons,), attention, width.neurons)


def _builder(run: Run, step: Any) -> Builder:
    tick = Meter(step, run.geometry.layers)
    return Builder(run.decoder, run.geometry, run.pruning_tokens, run.config.rules(), run.say, tick)


def _build(run: Run, wanted: Sequence[LayerLevels], store: Store, label: str) -> None:
    with run.phases("supernet"), run.show(label) as step:
        _builder(run, step).build(wanted, store, run.config.accumulation)


def iteration_levels(units: Units, centre: Allocation, iteration: int) -> list[LayerLevels]:
    """The levels of one iteration's supernet around `centre`."""
    rungs = ladders(units, centre, *_steps(units, iteration))
    return [
        LayerLevels(
            tuple(units.attention_level(level) for level in attention),
            tuple(level * units.multiple for level in neurons),
            units.attention_level(kept[0]),
            kept[1] * units.multiple,
        )
        for attention, neurons, kept in zip(
            rungs.attention, rungs.neurons, zip(centre.attention, centre.neurons, strict=True), strict=True
        )
    ]


def _steps(units: Units, iteration: int) -> tuple[int, int]:
    return step_units(units.attention_count, iteration), step_units(units.neuron_count, iteration)


def _search(run: Run, budget: Budget) -> tuple[Widths, dict[str, Any]]:
    """The paper's search: iterations of a supernet around the best so far, each with finer levels."""
    config, units = run.config, run.units
    allocation, history = even(units, budget), []
    reference: Reference | None = None
    candidates, judged, seconds = 0, 0, 0.0  # in all; here and now
    for iteration in range(config.iterations):
        store = run.store(f"iteration-{iteration}")
        rules = Rules(config.generations, config.offspring, len(run.search_tokens), config.seed)
        keys = (f"{iteration}.{generation}" for generation in range(config.generations + 1))
        unfinished = any(run.journal.get("generation", key) is None for key in keys)  # a damaged journal may lack any
        if unfinished or (iteration == config.iterations - 1 and config.finish == "supernet"):
            if iteration:
                run.store(f"iteration-{iteration - 1}").remove()
            wanted = iteration_levels(units, allocation, iteration)
            _build(run, wanted, store, f"supernet {iteration + 1}/{config.iterations}")
            reference = run.reference
        judge = FitnessJudge(run.decoder, run.geometry, reference, store) if reference is not None else None
        rungs = ladders(units, allocation, *_steps(units, iteration))
        begun = time.monotonic()
        with run.phases("search"):
            allocation, fitness = evolve(
                allocation, rungs, rules, iteration, _scorer(judge, units), run.journal, run.say
            )  # fmt: skip
        seconds += time.monotonic() - begun
        judged += sum(judge.evaluated.values()) if judge is not None else 0
        candidates += evaluations(run.journal, iteration, config.generations)
        history.append({"fitness": fitness, **asdict(allocation)})
    facts = {
        "search": {
            "iterations": history,
            "candidate_evaluations": candidates,
            "evaluations_a_minute": round(60 * judged / seconds, 1) if seconds and judged else None,
        }
    }
    return units.widths(allocation), facts


def _scorer(judge: FitnessJudge | None, units: Units) -> Any:
    def score(allocations: Sequence[Allocation], windows: Sequence[int]) -> list[float]:
        assert judge is not None
        return judge([units.widths(allocation) for allocation in allocations], windows)

    return score


def _budget(run: Run) -> tuple[Budget, dict[str, Any]]:
    """The budget of per-layer widths, from the best even split where splits are judged, and what the report says."""
    if not run.config.judges_splits:
        return run.budgets[0], {}
    units, pool = run.units, len(run.search_tokens)
    own = plan_budget(units, run.config.sparsity)
    splits = _judge_splits(run, units.widths(even(units, own)), (Stage(pool, 1),), "split", keep=False)
    judged = [
        {
            "attention_share": units.attention_share(budget),
            "attention": budget.attention,
            "neurons": budget.neurons,
            **fit,
        }
        for budget, fit in zip(run.budgets, splits["judged"], strict=True)
    ]
    return run.budgets[splits["best"]], {"split": {"judged": judged, "best": judged[splits["best"]]}}


def _search_shared(run: Run) -> tuple[Widths, dict[str, Any]]:
    """One width for all layers: every split of the budget between attention and FFN, judged in stages."""
    stages = selection(len(run.shared), len(run.search_tokens))
    stages = tuple(replace(stage, keep=max(stage.keep, 2)) for stage in stages[:-1]) + stages[-1:]
    splits = _judge_splits(run, _shared_start(run), stages, "shared", keep=run.config.finish == "supernet")
    judged = [{**asdict(width), **fit} for width, fit in zip(run.shared, splits["judged"], strict=True)]
    best = (run.shared[splits["best"]],) * run.geometry.layers
    return best, {"split": {"judged": judged, "best": judged[splits["best"]]}}


def _judge_splits(run: Run, centre: Widths, stages: Sequence[Stage], name: str, *, keep: bool) -> dict[str, Any]:
    """Judge even widths, one candidate for every split of the run, on levels of their own; the best one's position.

    "judged" has each one's fitness in the last stage that it came to, and how many windows that was on. centre: one
    of the candidates. keep: the levels are needed afterwards.
    """
    candidates = even_splits(run.units, run.shared, run.budgets)
    entry = run.journal.get("split", "best", partial(_is_split, count=len(candidates)))
    store = run.store(name)
    if entry is None or keep:
        _build(run, split_levels(candidates, centre), store, f"supernet of {len(candidates)} splits")
    if entry is None:
        judge, pool = FitnessJudge(run.decoder, run.geometry, run.reference, store), len(run.search_tokens)
        fits: dict[int, dict[str, Any]] = {}

        def score(alive: Sequence[int], windows: Sequence[int]) -> list[float]:
            values = judge([candidates[position] for position in alive], windows)
            fits.update(
                {at: {"fitness": value, "windows": len(windows)} for at, value in zip(alive, values, strict=True)}
            )
            return values

        with run.phases("search"):
            best, fitness = staged(range(len(candidates)), stages, score, pool, random.Random(str(run.config.seed)))
        run.say(f"{len(candidates)} splits judged: best fitness {fitness:.5g} with {candidates[best][0]}")
        entry = {"best": best, "judged": [fits[position] for position in range(len(candidates))]}
        run.journal.add("split", "best", entry)
    if not keep:
        store.remove()
    return cast(dict[str, Any], entry)


def _is_split(value: Any, count: int) -> bool:
    """Whether an entry names the best of `count` splits and how each one fits."""
    return (
        isinstance(value, dict)
        and value.keys() == {"best", "judged"}
        and type(value["best"]) is int
        and 0 <= value["best"] < count
        and isinstance(value["judged"], list)
        and len(value["judged"]) == count
        and all(
            isinstance(fit, dict) and fit.keys() == {"fitness", "windows"} and numbers([*fit.values()])
            for fit in value["judged"]
        )
    )
