"""A search's journal gives back what it was given, and is refused where it is damaged or another's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crepe_deploy.errors import ConfigError, OutputError
from crepe_deploy.searching.evaluate import Evaluator
from crepe_deploy.searching.hybrid import spearman
from crepe_deploy.searching.losses import Losses
from crepe_deploy.searching.proxies import PROXIES
from crepe_deploy.store.journal import open_journal
from crepe_deploy.store.manifest import versions
from crepe_deploy.structural.evolve import Ladders, Rules, evaluations, evolve
from crepe_deploy.structural.stages import _is_split
from crepe_deploy.structural.units import Allocation
from tests.mutations import mutations, refusal

HEADER = {"version": 1, "versions": versions()}


def journal(path: Path, **more: object) -> Path:
    book = open_journal(path, {"seed": 0, **more}, resume=False)
    book.add("proxies", "a", {"gini": 0.1 + 0.2})
    book.add("losses", "a", {"kl": [1.5]})
    return path


def test_a_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = journal(tmp_path / "j")
    book = open_journal(path, {"seed": 0}, resume=True)
    assert book.get("proxies", "a") == {"gini": 0.1 + 0.2} and len(book) == 2
    assert book.get("losses", "b") is None


def test_a_line_cut_short_is_evaluated_again(tmp_path: Path) -> None:
    path = journal(tmp_path / "j")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    book = open_journal(path, {"seed": 0}, resume=True)
    assert book.get("losses", "a") is None and len(book) == 1
    book.add("losses", "a", {"kl": [1.5]})
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"kind"', '"kin', 1), "line 2 is not JSON"),
        (lambda text: text.replace('"kind"', '"sort"', 1), "line 2 is no result"),
        (lambda text: text.replace("\n", "\n[]\n", 1), "line 2 is no object"),
        (lambda text: text[:10], "no complete line"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "its seed is 1, this one's 0"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "its version is 9"),
        (lambda text: text.replace('"torch": "', '"torch": "0.'), "its versions is"),
    ],
)
def test_a_damaged_or_foreign_journal_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = journal(tmp_path / "j")
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message) as refusal:
        open_journal(path, {"seed": 0}, resume=True)
    assert str(path) in str(refusal.value)


def test_a_journal_is_not_taken_for_granted(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with pytest.raises(ConfigError, match="nothing to resume"):
        open_journal(path, {}, resume=True)
    journal(path)
    with pytest.raises(OutputError, match="--resume"):
        open_journal(path, {"seed": 0}, resume=False)
    assert len(open_journal(path, {"seed": 0}, resume=False, overwrite=True)) == 0
    assert json.loads(path.read_text()) == {**HEADER, "seed": 0}


def test_a_journal_without_a_piece_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for left in ("", '{"version', json.dumps({**HEADER, "seed": 1}) + "\n"):
        path.write_text(left)
        assert len(open_journal(path, {"seed": 0}, resume=False)) == 0
    open_journal(path, {"seed": 0}, resume=True).add("losses", "a", 1)
    path.write_bytes(path.read_bytes()[:-3])  # even a piece that is cut off is not for silence to throw away
    with pytest.raises(OutputError, match="--resume, or start anew with --overwrite"):
        open_journal(path, {"seed": 0}, resume=False)


def search_entries() -> list[dict[str, Any]]:
    return [
        {"kind": "proxies", "key": "a", "value": dict.fromkeys(PROXIES, 0.5)},
        {"kind": "losses", "key": "a", "value": {"kl": [0.5, 0.25], "nll": [3.0, 2.5]}},
    ]


PARENT = Allocation((2, 2), (4, 4))
RUNGS = Ladders(((1, 2, 3), (1, 2, 3)), ((3, 4, 5), (3, 4, 5)))


def tyr_entries() -> list[dict[str, Any]]:
    ended = {"attention": [1, 3], "neurons": [4, 4], "fitness": 0.5, "evaluations": 3}
    return [
        {"kind": "generation", "key": "0.0", "value": {**ended, "attention": [2, 2]}},
        {"kind": "generation", "key": "0.1", "value": ended},
        {"kind": "split", "best": "best", "value": {"best": 0, "judged": [{"fitness": 0.5, "windows": 2}]}},
    ]


def resume_search(path: Path) -> None:
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.journal = open_journal(path, {}, resume=True)
    evaluator.text = SimpleNamespace(tokens=[0, 1])  # type: ignore[assignment]
    setting = SimpleNamespace(key="a")
    evaluator._in_threads = lambda settings: [{} for _ in settings]  # type: ignore[method-assign]
    evaluator._measure = lambda settings, label: [Losses([0.1], [0.1]) for _ in settings]  # type: ignore[method-assign]
    for row in evaluator.proxies([setting]):  # type: ignore[list-item]
        spearman(list(row.values()), range(len(row)))
    for losses in evaluator.losses([setting]):  # type: ignore[list-item]
        math.exp(losses.mean_nll)


def resume_tyr(path: Path) -> None:
    journal = open_journal(path, {}, resume=True)
    rules = Rules(generations=2, offspring=3, pool=2, seed=0)
    evolve(PARENT, RUNGS, rules, 0, lambda ones, _: [1.0] * len(ones), journal, lambda _: None)
    assert evaluations(journal, 0, 2) >= 0
    entry = journal.get("split", "best", partial(_is_split, count=1))
    if entry is not None:
        assert entry["judged"][entry["best"]]["fitness"] < 1e31


@pytest.mark.parametrize(("entries", "resume"), [(search_entries, resume_search), (tyr_entries, resume_tyr)])
def test_a_journal_spoilt_anywhere_is_refused_or_read(
    tmp_path: Path, entries: Callable[[], list[dict[str, Any]]], resume: Callable[[Path], None]
) -> None:
    path = tmp_path / "j"
    for change, lines in mutations([HEADER, *entries()]):
        lines = lines if isinstance(lines, list) else [lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if refused := refusal(change, lambda: resume(path)):
            assert "overwrite" in refused and len(refused) < 1000


@pytest.mark.parametrize("line", ["[" * 3000, "9" * 5000, '{"kind": "\\ud800", "key": "a", "value": 1}', "\x00"])
def test_a_line_that_no_reader_should_take_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "j").write_text(f"{json.dumps(HEADER)}\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        open_journal(tmp_path / "j", {}, resume=True)


def test_counts_survive_a_stop(tmp_path: Path) -> None:
    def counted(stop_after: int | None, path: Path) -> int:
        asked = 0

        def score(ones: Any, _: Any) -> list[float]:
            nonlocal asked
            asked += 1
            if asked == stop_after:
                raise KeyboardInterrupt
            return [1.0 + sum(one.attention[:1]) for one in ones]

        journal = open_journal(path, {}, resume=path.exists())
        evolve(PARENT, RUNGS, Rules(3, 3, 2, 0), 0, score, journal, lambda _: None)
        return evaluations(journal, 0, 3)

    whole = counted(None, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        counted(3, tmp_path / "stopped")
    assert counted(None, tmp_path / "stopped") == whole > 1
    assert (tmp_path / "stopped").read_bytes() == (tmp_path / "whole").read_bytes()
