"""A stopped `bench` goes on: no whole round is measured again, and the rest is what an uninterrupted run would do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from crepe_deploy.bench import benchmark
from crepe_deploy.bench.benchmark import Gating
from crepe_deploy.bench.gate.budgets import slowdown_budgets
from crepe_deploy.bench.report.write import make_report
from crepe_deploy.bench.run import noted
from crepe_deploy.bench.run.measure import noted_by
from crepe_deploy.bench.run.noted import Noted
from crepe_deploy.bench.run.result import Interval, Quality, load_run
from crepe_deploy.bench.run.scenario import Scenario
from crepe_deploy.bench.run.summary import summary_lines

from crepe_deploy.cli import interrupt_on_signals, run
from crepe_deploy.errors import ConfigError, CrepeError, DiskFullError, OutputError
from crepe_deploy.store import journal as journals
from crepe_deploy.store.journal import Journal, open_journal
from crepe_deploy.store.work import JOURNAL
from tests.bench.run.stopping import POINTS, ROUNDS, VISITS, figures, measured, stopped
from tests.bench.scenes import scenario_of
from tests.mutations import mutations


@pytest.fixture
def scenario(pair: tuple[Path, Path]) -> Scenario:
    return scenario_of(pair, aa=True, points=POINTS, rounds=ROUNDS, warmup=1)


def test_it_goes_on_from_every_visit_to_the_same_figures(scenario: Scenario, tmp_path: Path) -> None:
    whole, _, undisturbed = measured(scenario, tmp_path / "whole.json")
    assert whole.resumed == [] and len(undisturbed.turns) == ROUNDS * VISITS
    for at in range(VISITS, ROUNDS * VISITS):
        out = tmp_path / f"{at}.json"
        stopped(scenario, out, at)
        resumed, _, machine = measured(scenario, out, resume=True)
        assert machine.turns == undisturbed.turns[at - at % VISITS :], "whole rounds stay, the stopped one is redone"
        assert figures(resumed) == figures(whole)
        assert [one.after_round for one in resumed.resumed] == [at // VISITS]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"whole.json", *(f"{at}.json" for at in range(VISITS, ROUNDS * VISITS))}


def test_before_a_round_is_whole_nothing_is_left(scenario: Scenario, tmp_path: Path) -> None:
    for at in (0, VISITS - 1):
        stopped(scenario, tmp_path / "run.json", at)
        assert not list(tmp_path.iterdir())


def test_the_run_says_every_start(scenario: Scenario, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    stopped(scenario, out, VISITS)
    stopped(scenario, out, 3, resume=True)  # a start without a whole round is none of the run
    stopped(scenario, out, VISITS, resume=True)
    resumed, _, _ = measured(scenario, out, resume=True)
    assert [one.after_round for one in resumed.resumed] == [1, 2]
    assert [candidate.load_s for candidate in resumed.candidates] == [[1.0] * 3] * 3
    assert resumed.candidates[0].memory.peak_bytes == 30 and resumed.seconds > 0
    assert "3 rounds, resumed after round 1, resumed after round 2, load" in summary_lines(resumed)[-1]
    make_report([out], tmp_path / "report")
    assert "after round 1 (" in (tmp_path / "report" / "report.md").read_text()


def test_a_stop_behind_the_last_round_measures_nothing_again(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.json"
    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(benchmark, "save_run", lambda *_: (_ for _ in ()).throw(DiskFullError("full")))
        measured(scenario, out)
    resumed, _, machine = measured(scenario, out, resume=True)
    assert machine.turns == [] and [one.after_round for one in resumed.resumed] == [ROUNDS]


def test_a_full_disk_and_a_dead_candidate_leave_what_is_gone_on_from(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add, left = tmp_path / "run.json", Journal.add, [2]

    def full(journal: Journal, *line: Any) -> None:
        left[0] -= 1
        if not left[0]:
            with journal.path.open("a") as file:
                file.write('{"kind": "round", "key": "1", "val')
            raise DiskFullError("full")
        add(journal, *line)

    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(Journal, "add", full)
        measured(scenario, out)
    stopped(scenario, out, VISITS + 1, CrepeError("candidate 'packed' ended by SIGKILL"), resume=True)
    resumed, _, machine = measured(scenario, out, resume=True)
    assert len(machine.turns) == VISITS and [one.after_round for one in resumed.resumed] == [1, 2]


def test_quality_is_not_measured_again(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, asked = tmp_path / "text.txt", list[Path]()
    text.write_text("words")

    def quality(folder: Path, *_: Any, **__: Any) -> Quality:
        asked.append(folder)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return Quality(convention={}, perplexity=Interval(value=float(len(asked))))

    monkeypatch.setattr(benchmark, "measure_quality", quality)
    scenario = scenario_of(pair, quality={"text": str(text)})
    with pytest.raises(KeyboardInterrupt):
        measured(scenario, tmp_path / "run.json")
    resumed, _, _ = measured(scenario, tmp_path / "run.json", resume=True)
    assert asked == [pair[0], pair[1], pair[1]]
    assert [one.quality and one.quality.perplexity.value for one in resumed.candidates] == [1.0, 3.0]
    stopped(scenario, tmp_path / "other.json", 5)
    text.write_text("other words")
    with pytest.raises(ConfigError, match="its text is"):
        measured(scenario, tmp_path / "other.json", resume=True)


def test_a_gate_looks_where_an_uninterrupted_run_would(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Packed is twice as fast, so one look is enough; a limit that it cannot keep is looked at to the end."""
    scenario = scenario_of(pair, rounds=5)
    for name, limit, rounds in (("passes", 0.05, 5), ("fails", -0.6, 5)):
        gating = Gating(slowdown_budgets(limit, ("tpot_s",)), 9)
        out = tmp_path / f"{name}.json"
        whole, verdict, _ = measured(scenario, tmp_path / f"{name}-whole.json", gating=gating)
        stopped(scenario, out, 4 * 3, gating=gating)
        with pytest.raises(ConfigError, match="its gate is"):
            measured(scenario, out, resume=True)
        resumed, again, _ = measured(scenario, out, gating=gating, resume=True)
        assert verdict is not None and again is not None and again.status == verdict.status
        assert figures(resumed) == figures(whole) and len(whole.candidates[0].series[0].visits) >= 2 * rounds


def test_what_a_stop_left_is_said_and_nothing_else_goes_on_from_it(
    scenario: Scenario, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.json"
    with pytest.raises(ConfigError, match="nothing to resume"):
        measured(scenario, out, resume=True)
    stopped(scenario, out, VISITS)
    with pytest.raises(OutputError, match="go on with --resume, or start anew with --overwrite"):
        measured(scenario, out)
    for changes in ({"rounds": 4}, {"seed": 1}, {"points": POINTS[:1]}, {"aa": False}, {"dtype": "bfloat16"}):
        other = scenario_of(pair, **{"aa": True, "points": POINTS, "rounds": ROUNDS, "warmup": 1} | changes)
        with pytest.raises(ConfigError, match=r"of another run: its (scenario|models) is"):
            measured(other, out, resume=True)
    with pytest.raises(ConfigError, match=r"its (scenario|threads) is"):
        measured(scenario.model_copy(update={"threads": 2}), out, resume=True)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="its host is"):
        host = noted.record_host()
        patch.setattr(noted, "record_host", lambda: host.model_copy(update={"cpu": "another"}))
        measured(scenario, out, resume=True)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="its libraries is"):
        patch.setattr(noted, "library_versions", lambda: {"vllm": "0"})
        measured(scenario, out, resume=True)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="its versions is"):
        patch.setattr(journals, "versions", lambda: {"torch": "0"})
        measured(scenario, out, resume=True)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="its variables is"):
        patch.setenv("OMP_WAIT_POLICY", "spinning")
        measured(scenario, out, resume=True)
    measured(scenario, out, resume=True)


def test_other_weights_are_another_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(path, tmp_path / path.name)) for path in pair]
    scenario = scenario_of(folders)
    stopped(scenario, tmp_path / "run.json", 5)
    (folders[1] / "manifest.json").unlink()
    with (folders[1] / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(ConfigError, match="its models is"):
        measured(scenario, tmp_path / "run.json", resume=True)


def test_overwrite_starts_anew(scenario: Scenario, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    stopped(scenario, out, VISITS)
    again, _, machine = measured(scenario, out, overwrite=True)
    assert again.resumed == [] and len(machine.turns) == ROUNDS * VISITS


def test_a_journal_cut_off_anywhere_goes_on_or_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    stopped(scenario, out, 2 * VISITS)
    path = tmp_path / "run.json.work" / JOURNAL
    data = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    for size in sorted({0, 10, *range(ends[0] - 1, len(data), len(data) // 23), *ends}):
        path.write_bytes(data[:size])
        if size < ends[0]:
            with pytest.raises(ConfigError, match="no complete line"):
                open_journal(path, header(data), resume=True)
        else:
            known = noted_by(scenario, open_journal(path, header(data), resume=True), resumed=True)
            assert len(known.rounds) == sum(end <= size for end in ends) - 1


def header(data: bytes) -> dict[str, Any]:
    return {
        name: value
        for name, value in json.loads(data.splitlines()[0]).items()
        if name not in ("version", "versions")
    }  # fmt: skip


def test_a_round_spoilt_anywhere_is_refused_or_one_that_a_run_can_hold(pair: tuple[Path, Path], tmp_path: Path) -> None:
    scenario, out = scenario_of(pair), tmp_path / "run.json"
    stopped(scenario, out, 4)
    path = tmp_path / "run.json.work" / JOURNAL
    first, line = path.read_text().splitlines()
    entry, taken = json.loads(line), 0
    every = [spoilt for _, spoilt in mutations(entry["value"])]
    for spoilt in every:
        path.write_text(f"{first}\n{json.dumps(entry | {'value': spoilt})}\n")
        try:
            known = noted_by(scenario, open_journal(path, header(first.encode()), resume=True), resumed=True)
        except ConfigError as error:
            assert "line 2" in str(error)
        else:
            taken += 1
            (made,) = known.rounds
            assert noted.Round.model_validate_json(made.model_dump_json()) == made
    assert taken < len(every) / 2
    path.write_text(f"{first}\n{json.dumps(entry | {'value': {}})}\n")
    with pytest.raises(ConfigError, match="line 2 is no result of round"):
        measured(scenario, out, resume=True)
    assert path.is_file()


def command(pair: Sequence[Path], place: Path) -> list[str]:
    scenario = scenario_of(pair, rounds=2)
    content = scenario.model_dump(mode="json", exclude_none=True)
    (place / "suite.yaml").write_text(yaml.safe_dump(content))
    return ["bench", "run", str(place / "suite.yaml"), "--out", str(place / "run.json")]


def test_the_command_stops_at_a_signal_and_goes_on(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv, add = command(pair, tmp_path), Noted.add_round
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def struck(book: Noted, **measured: Any) -> None:
        assert run([*argv, "--resume"]) == 2
        add(book, **measured)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        interrupt_on_signals()
        with monkeypatch.context() as patch:
            patch.setattr(Noted, "add_round", struck)
            assert run(argv) == 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = capsys.readouterr().err
    assert "another run is writing" in said and "the same command with --resume goes on" in said
    assert run(argv) == 2
    assert "go on with --resume, or start anew with --overwrite" in capsys.readouterr().err
    assert run([*argv, "--resume"]) == 0
    resumed = load_run(tmp_path / "run.json")
    assert [one.after_round for one in resumed.resumed] == [1]
    assert [visit.round for visit in resumed.candidates[0].series[0].visits] == [0, 0, 1, 1]
    assert run(["gate", str(tmp_path / "run.json"), "--pruned", "packed", "--max-slowdown", "100"]) in (0, 3, 4, 1)
    assert not (tmp_path / "run.json.work").exists()


def test_a_killed_run_goes_on(pair: tuple[Path, Path], scenario: Scenario, tmp_path: Path) -> None:
    """By SIGKILL in the middle of a round, and in the middle of a line of the journal."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.bench.run.stopping import POINTS, ROUNDS, VISITS, Machine, bench\n"
        "from tests.bench.scenes import scenario_of\n"
        "out, *pair = map(Path, sys.argv[1:])\n"
        "scenario = scenario_of(pair, aa=True, points=POINTS, rounds=ROUNDS, warmup=1)\n"
        "class Killer(Machine):\n"
        "    @property\n"
        "    def error(self):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    @error.setter\n"
        "    def error(self, _):\n"
        "        pass\n"
        "bench(scenario, 'c', start=Killer(VISITS + 5), quiet=True, out=out)\n"
    )
    out = tmp_path / "run.json"
    done = subprocess.run([sys.executable, "-c", script, str(out), *map(str, pair)], check=False, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL and not out.exists()
    resumed, _, machine = measured(scenario, out, resume=True)
    assert [one.after_round for one in resumed.resumed] == [1] and len(machine.turns) == (ROUNDS - 1) * VISITS
