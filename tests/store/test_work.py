"""The working folder of a structural search: only what a search wrote is ever removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from crepe_deploy.errors import OutputError
from crepe_deploy.store.work import JOURNAL, LAYER_DONE, begin, make_work_folder, remove_work_folder


def stopped_search(work: Path) -> Path:
    (work / "iteration-0" / "layer-0000").mkdir(parents=True)
    (work / "iteration-0" / "layer-0000" / "ffn-1.safetensors").write_text("x")
    (work / JOURNAL).write_text("{}\n")
    return work


def test_what_a_stopped_search_left_goes_with_overwrite_alone(tmp_path: Path) -> None:
    work = stopped_search(tmp_path / "out.work")
    make_work_folder(work, overwrite=False)
    assert (work / JOURNAL).exists()
    make_work_folder(work, overwrite=True)
    assert work.is_dir() and not list(work.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "iteration-0", "model.safetensors"])
def test_somebody_elses_folder_is_refused_and_kept(tmp_path: Path, name: str, overwrite: bool) -> None:
    work = tmp_path / "out.work"
    work.mkdir()
    (work / name).write_text("years of work")
    with pytest.raises(OutputError, match=f"{name}.*not written by a run"):
        make_work_folder(work, overwrite=overwrite)
    assert (work / name).read_text() == "years of work"


def test_a_link_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "a.work").symlink_to(tmp_path / "model")
    (tmp_path / "b.work").write_text("x")
    for name in ("a.work", "b.work"):
        with pytest.raises(OutputError, match="move it away"):
            make_work_folder(tmp_path / name, overwrite=True)
    assert (tmp_path / "model").is_dir()


def test_a_run_without_a_finished_piece_is_begun_anew(tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    begin(work, {"seed": 0}, resume=False, overwrite=False)
    (work / "iteration-0" / "layer-0000").mkdir(parents=True)
    begin(work, {"seed": 1}, resume=False, overwrite=False)
    assert [path.name for path in work.iterdir()] == [JOURNAL]
    (work / "iteration-0" / "layer-0000").mkdir(parents=True)
    (work / "iteration-0" / "layer-0000" / LAYER_DONE).write_text("{}")  # in no journal, and hours of work
    with pytest.raises(OutputError, match="--resume, or start anew with --overwrite"):
        begin(work, {"seed": 1}, resume=False, overwrite=False)
    begin(work, {"seed": 1}, resume=True, overwrite=False)


def test_at_the_end_a_file_that_was_put_there_stays(tmp_path: Path) -> None:
    work = stopped_search(tmp_path / "out.work")
    remove_work_folder(work)
    assert not work.exists()
    (stopped_search(work) / "notes").write_text("mine")
    remove_work_folder(work)
    assert [path.name for path in work.iterdir()] == ["notes"]
