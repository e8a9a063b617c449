"""A quarter of a minute of load and kills; `python -m tests.serve.storm 600` is ten minutes of it."""

from __future__ import annotations

from pathlib import Path

from tests.serve.storm import make_folder, storm


def test_every_answer_in_a_storm_is_right_and_nothing_stays(tmp_path: Path) -> None:
    report = storm(make_folder(tmp_path), tmp_path, seconds=15)
    assert report.starts >= 2 and report.requests["whole: as expected"] and report.requests["stream: as expected"]
