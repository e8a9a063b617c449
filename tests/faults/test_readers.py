"""Every reader of files of others over a few spoilt files, here and now; `make faults` gives each thousands."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .corpus import Corpus
from .readers import READERS, attempt, batch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("readers") / "corpus")


@pytest.mark.parametrize("name", [name for name in READERS if "journal" not in name])  # tests/store has those
def test_a_spoilt_file_is_read_or_refused(name: str, corpus: Corpus, tmp_path: Path) -> None:
    lines = [attempt(name, 7, index, corpus, tmp_path) for index in range(40 // READERS[name].share or 4)]
    assert [line for line in lines if line["outcome"] == "defect"] == []
    assert {line["outcome"] for line in lines} >= {"refused"}


def test_a_child_that_is_killed_is_a_defect_and_the_next_input_follows(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from . import readers

    whole = readers.attempt

    def killed(name: str, seed: int, index: int, corpus: Corpus, place: Path) -> dict[str, object]:
        return whole(name, seed, index, corpus, place) if index != 1 else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(readers, "attempt", killed)
    outcomes = [line["outcome"] for line in batch("recipe", 0, range(3), corpus, tmp_path / "place")]
    assert len(outcomes) == 3 and outcomes[1] == "defect" and "defect" not in (outcomes[0], outcomes[2])
