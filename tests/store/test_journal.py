"""A search's journal gives back what it was given, and is refused where it is damaged or another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crepe_deploy.errors import ConfigError, OutputError
from crepe_deploy.store.journal import open_journal


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
    assert json.loads(path.read_text()) == {"version": 1, "seed": 0}
