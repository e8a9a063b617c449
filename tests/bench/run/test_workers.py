"""Candidates in processes of their own: times, failures and deaths with a fake engine and server, and real engines."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from crepe_deploy.bench.benchmark import bench
from crepe_deploy.bench.commands.bench import bench_command
from crepe_deploy.bench.run.measure import Session, start_worker
from crepe_deploy.bench.run.metrics import METRICS, rounds_of
from crepe_deploy.bench.run.result import Candidate, Point, Request, Run, Visit, load_run
from crepe_deploy.bench.run.scenario import Scenario
from crepe_deploy.bench.run.served_worker import Backend
from crepe_deploy.bench.run.summary import failures
from safetensors.torch import save_file

from crepe_deploy.errors import ConfigError, CrepeError
from tests.bench.scenes import NAMES, scenario_of
from tests.serve.processes import below


@pytest.fixture(autouse=True)
def _logs_with_the_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logs that failures leave behind go where pytest clears up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))


def candidate_of(scenario: Scenario, name: str) -> tuple[Run, Candidate]:
    run, _ = bench(scenario, "c", quiet=True)
    return run, run.candidate(name)


def with_options(pair: tuple[Path, Path], engine: str = "fake", **options: Any) -> Scenario:
    """The dense candidate is a fake that is well, the packed one has this engine and these options."""
    arms = zip(NAMES, pair, ({}, options), strict=True)
    candidates = [
        {"name": name, "folder": str(path), "engine": "fake" if name == "dense" else engine, "options": given}
        for name, path, given in arms
    ]
    return scenario_of(pair, candidates=candidates, rounds=3)


def test_the_childs_times_are_the_engines(pair: tuple[Path, Path]) -> None:
    run, packed = candidate_of(with_options(pair, step_s=0.02, prefill_token_s=0.01), "packed")
    (request,) = packed.series[0].visits[0].requests
    assert request.ttft_s is not None and 0.08 <= request.ttft_s < 8
    assert len(request.itl_s) == 3 and all(0.02 <= gap < 2 for gap in request.itl_s)
    assert request.latency_s == pytest.approx(request.ttft_s + sum(request.itl_s))
    assert failures(run) == []
    assert packed.load_s[0] > 0 and (packed.memory.peak_bytes or 0) >= (packed.memory.loaded_bytes or 1) > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [("fail_every", "the fake engine was told to fail"), ("short_every", r"asked for 4 new tokens, got \[3\]")],
)
def test_failed_requests_are_recorded_and_enter_no_statistic(
    pair: tuple[Path, Path], option: str, message: str
) -> None:
    run, packed = candidate_of(with_options(pair, **{option: 2}), "packed")
    requests = [request for visit in packed.series[0].visits for request in visit.requests]
    assert [request.error is None for request in requests] == [True, False] * 3
    assert all(request.ttft_s is None and request.itl_s == [] for request in requests if request.error)
    messages = failures(run)
    assert len(messages) == 3 and messages[0].startswith("packed at b1-p8-o4: RuntimeError")
    assert re.search(message, messages[0])
    assert sorted(rounds_of(packed.series[0], METRICS["tpot_s"])) == [0, 1, 2]


def test_a_candidate_that_dies_is_named_with_the_end_of_its_log(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CrepeError, match=r"candidate 'packed' ended with exit code 9\n.*\n.*was told to die"):
        bench(with_options(pair, die_after=2), "c", quiet=True)


def test_a_candidate_that_does_not_load_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(pair[0], tmp_path / "broken"))
    (broken / "manifest.json").unlink()
    save_file({"model.embed_tokens.weight": torch.zeros(3, 3)}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CrepeError, match=r"(?s)candidate 'packed' ended with exit code 1.*Error"):
        bench(with_options((pair[0], broken), engine="transformers"), "c", quiet=True)


def test_a_served_candidate_has_a_server_of_its_own_threads(pair: tuple[Path, Path]) -> None:
    """The server is a stand-in, and the load generator too: what is tried is starting, asking and stopping."""
    server = Path(__file__).parents[2] / "serve" / "fake_server.py"
    seen: list[tuple[int, Point, int, int]] = []
    commands: list[Any] = []

    def command(options: Any, port: int, _greedy: Any) -> list[str]:
        commands.append(options.extra)
        return [sys.executable, str(server), str(port), "good"]

    def visit(running: Any, folder: Path, point: Point, *, seed: int, round: int) -> Visit:
        (own,) = below(running.pid)  # its keeper's
        environ = Path(f"/proc/{own}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in environ and b"VLLM_CPU_OMP_THREADS_BIND=nobind" in environ
        seen.append((running.pid, point, seed, round))
        return Visit(round=round, duration_s=1.0, requests=[Request(prompt_tokens=8, output_tokens=0, error="none")])

    start = partial(start_worker, backend=Backend(command, lambda _folder: None, visit))
    points = [{"concurrency": 12, "prompt_tokens": 8, "output_tokens": 4, "requests": 24}]
    with Session(scenario_of(pair, engine="vllm-serve", points=points, dtype="bfloat16"), "c", start) as session:
        session.load()
        session.measure(2)
        run = session.run()
        assert all(Path(f"/proc/{pid}").exists() for pid, *_ in seen)
    assert not any(Path(f"/proc/{pid}").exists() for pid, *_ in seen)
    assert len({pid for pid, *_ in seen}) == 2
    seeds = {round: {seed for *_, seed, index in seen if index == round} for round in (0, 1)}
    assert [len(own) for own in seeds.values()] == [1, 1] and seeds[0] != seeds[1]
    extra = " ".join(commands[0])
    for part in ("--no-enable-prefix-caching", "--enforce-eager", "--max-num-seqs 12", "--dtype bfloat16"):
        assert part in extra
    packed = run.candidate("packed")
    assert packed.engine == "vllm-serve" and packed.memory.linears_bytes is None and packed.load_s[0] > 0
    assert (packed.memory.peak_bytes or 0) >= (packed.memory.loaded_bytes or 1) > 0
    assert len(failures(run)) == 8


def test_a_server_that_does_not_start_is_named(pair: tuple[Path, Path]) -> None:
    start = partial(start_worker, backend=Backend(lambda *_: [sys.executable, "-c", "raise SystemExit(7)"]))
    points = [{"concurrency": 1, "prompt_tokens": 8, "output_tokens": 4}]
    session = Session(scenario_of(pair, engine="vllm-serve", points=points), "c", start)
    with session, pytest.raises(CrepeError, match="candidate 'dense': the server ended with code 7"):
        session.load()


def invoke(*arguments: object) -> Any:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(bench_command, words, obj=shlex.join(["crepe-deploy", "bench", *words]))


def test_the_command_writes_a_run_and_fails_where_requests_failed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "scenario.yaml"
    config.write_text(json.dumps(with_options(pair).model_dump(mode="json")))
    out = tmp_path / "run.json"
    done = invoke(config, "--rounds", 2, "--out", out)
    assert done.exit_code == 0, done.output
    assert "time per output token, ms" in done.stdout and load_run(out).name == "test"
    assert load_run(out).command == f"crepe-deploy bench {config} --rounds 2 --out {out}"
    config.write_text(json.dumps(with_options(pair, fail_every=1).model_dump(mode="json")))
    again = invoke(config, "--rounds", 2, "--out", out, "--overwrite")
    assert isinstance(again.exception, CrepeError) and "4 requests failed" in str(again.exception)
    assert len(failures(load_run(out))) == 4


def test_a_run_that_fails_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config, out = tmp_path / "scenario.yaml", tmp_path / "run.json"
    config.write_text(json.dumps(with_options(pair, die_after=1).model_dump(mode="json")))
    done = invoke(config, "--out", out)
    assert isinstance(done.exception, CrepeError) and list(tmp_path.iterdir()) == [config]


def test_options_that_do_not_go_together_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(*pair, "--engine", "fake", "--max-rounds", 9, "--out", tmp_path / "x.json")
    assert isinstance(done.exception, ConfigError) and "--gate" in str(done.exception)
    assert "CONFIG | MODEL..." in invoke("--help").output


def test_transformers_is_measured_token_by_token(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREPE_DEPLOY_TUNE", "0")
    points = [{"batch": 2, "prompt_tokens": 16, "output_tokens": 5, "requests": 2}]
    run, packed = candidate_of(scenario_of(pair, engine="transformers", points=points, rounds=1), "packed")
    requests = [request for visit in packed.series[0].visits for request in visit.requests]
    assert len(requests) == 4 and failures(run) == []
    assert all(r.output_tokens == 5 and r.sequences == 2 and len(r.itl_s) == 4 for r in requests)
    assert packed.notes["linears"] == 14 and packed.notes["dtype"] == "bfloat16"
    held = [candidate.memory.linears_bytes or 0 for candidate in run.candidates]
    assert 9 / 16 <= held[1] / held[0] < 0.65  # padding weighs in so small a model
    assert set(packed.notes["kernels"]) == {"128x64", "64x64", "64x128"}


@pytest.mark.vllm
def test_vllm_is_measured_token_by_token(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("CREPE_DEPLOY_TUNE", "0")
    points = [{"batch": 2, "prompt_tokens": 16, "output_tokens": 5}, {"prompt_tokens": 40, "output_tokens": 1}]
    run, packed = candidate_of(scenario_of(pair, engine="vllm", points=points, rounds=1), "packed")
    assert failures(run) == []
    (both,), (first,) = (series.visits[0].requests for series in packed.series)
    assert both.sequences == 2 and len(both.itl_s) == 4 and all(gap > 0 for gap in both.itl_s)
    assert first.output_tokens == 1 and first.itl_s == [] and first.latency_s == first.ttft_s
    held = [candidate.memory.linears_bytes or 0 for candidate in run.candidates]
    assert 9 / 16 <= held[1] / held[0] < 0.7
