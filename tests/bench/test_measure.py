"""Measuring: order, pairing and prompts with workers that only count; failures with real processes and a fake engine;
the real transformers and vLLM engines on tiny models."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from crepe_deploy.bench.benchmark import Gating, bench
from crepe_deploy.bench.budgets import slowdown_budgets
from crepe_deploy.bench.candidate import kv_token_bytes, step_bytes
from crepe_deploy.bench.command import bench_command
from crepe_deploy.bench.measure import check, child_variables, settings
from crepe_deploy.bench.metrics import METRICS, rounds_of
from crepe_deploy.bench.result import Candidate, Point, Request, Run, Visit, load_run, save_run
from crepe_deploy.bench.scenario import CandidateSpec, Scenario, parse
from crepe_deploy.bench.summary import failures, gain, summary_lines
from crepe_deploy.bench.worker import Turn
from crepe_deploy.export.pipeline import prune_and_export

from crepe_deploy.errors import CheckpointError, ConfigError, CrepeError, VerifyError
from crepe_deploy.pattern import NM
from crepe_deploy.prune import PruneConfig
from crepe_deploy.sources import resolve_model

from ..pico import make_pico_llama

NAMES = ("dense", "packed")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Dense and packed exports of one 2:4 pruning, of a size that vLLM's CPU attention takes."""
    root = tmp_path_factory.mktemp("bench")
    model = make_pico_llama(root / "model", torch.bfloat16, tie_word_embeddings=True, head_dim=32)
    config = PruneConfig("magnitude", NM(2, 4))
    prune_and_export(resolve_model(str(model)), root / "out", config, None, formats=("dense", "packed"))
    return root / "out" / "dense", root / "out" / "packed"


def scenario_of(pair: Sequence[Path], **changes: Any) -> Scenario:
    content: dict[str, Any] = {
        "name": "test",
        "engine": "fake",
        "threads": 1,
        "candidates": [
            {"name": name, "folder": str(path)} for name, path in zip(("dense", "packed"), pair, strict=True)
        ],
        "points": [{"prompt_tokens": 8, "output_tokens": 4}],
        "rounds": 2,
        "warmup": 0,
    }
    return parse(content | changes, "test")


class Clockwork:
    """A worker that takes exactly as long as it is told to, and notes its turns."""

    def __init__(self, arm: CandidateSpec, log: list[tuple[str, Turn]], step_s: float) -> None:
        self.name, self.log, self.step_s = arm.name, log, step_s
        self.ready: dict[str, Any] = {"load_s": 1.0, "dtype": "bfloat16", "linear_bytes": 10, "loaded_bytes": 20}
        self.closed = False

    def visit(self, turn: Turn) -> Visit:
        self.log.append((self.name, turn))
        gaps = [self.step_s * (1 + turn.round)] * (turn.point.output_tokens - 1)
        request = Request(
            sequences=turn.point.batch, prompt_tokens=turn.point.prompt_tokens, output_tokens=turn.point.output_tokens,
            ttft_s=0.5, itl_s=gaps, latency_s=0.5 + sum(gaps),
        )  # fmt: skip
        return Visit(round=turn.round, duration_s=1.0, requests=[request])

    def peak_bytes(self) -> int | None:
        return 30

    def close(self) -> None:
        self.closed = True


def run_clockwork(scenario: Scenario, steps: dict[str, float], gating: Gating | None = None) -> Any:
    log: list[tuple[str, Turn]] = []
    workers: list[Clockwork] = []

    def start(arm: CandidateSpec, _scenario: Scenario) -> Clockwork:
        workers.append(Clockwork(arm, log, steps.get(arm.name, 0.1)))
        return workers[-1]

    run, verdict = bench(scenario, "the command", gating=gating, start=start, quiet=True)
    assert all(worker.closed for worker in workers)
    return run, verdict, log


def test_rounds_go_there_and_back_at_every_point_after_the_warm_up(pair: tuple[Path, Path]) -> None:
    points = [{"prompt_tokens": 8, "output_tokens": 4}, {"batch": 2, "prompt_tokens": 8, "output_tokens": 4}]
    scenario = scenario_of(pair, aa=True, points=points, warmup=1)
    run, _, log = run_clockwork(scenario, {})
    there = ["dense", "dense again", "packed"]
    assert [name for name, _ in log] == 3 * 2 * (there + there[::-1])
    assert [turn.round for _, turn in log] == [index for index in (-1, 0, 1) for _ in range(12)]
    assert [turn.point.batch for _, turn in log[:12]] == [1] * 6 + [2] * 6
    for candidate in run.candidates:
        assert [[visit.round for visit in series.visits] for series in candidate.series] == 2 * [[0, 0, 1, 1]]


def test_every_candidate_of_a_round_gets_the_same_prompts_and_no_other_round_does(pair: tuple[Path, Path]) -> None:
    _, _, log = run_clockwork(scenario_of(pair, points=[{"prompt_tokens": 8, "output_tokens": 4, "requests": 2}]), {})
    seen = {index: {json.dumps(turn.prompts()) for _, turn in log if turn.round == index} for index in (0, 1)}
    assert [len(prompts) for prompts in seen.values()] == [1, 1] and seen[0] != seen[1]
    first, second = log[0][1].prompts()
    assert first != second and [len(prompt) for prompt in first] == [8]
    assert all(3 <= token < 320 for prompt in (*first, *second) for token in prompt)


def test_another_seed_sends_other_prompts() -> None:
    turn = Turn(Point(name="p", prompt_tokens=8, output_tokens=1), 0, 0, 320)
    assert turn.prompts() == dataclasses.replace(turn).prompts()
    assert turn.prompts() != dataclasses.replace(turn, seed=1).prompts()


def test_ratios_are_paired_by_round_so_that_a_common_disturbance_cancels(pair: tuple[Path, Path]) -> None:
    """Each round is slower than the one before, for both candidates alike."""
    run, _, _ = run_clockwork(scenario_of(pair, rounds=5), {"dense": 0.3, "packed": 0.2})
    found = gain(run, run.candidate("packed"), "b1-p8-o4", "tpot_s")
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    rates = gain(run, run.candidate("packed"), "b1-p8-o4", "decode_tokens_per_s")
    assert rates is not None and rates.value == pytest.approx(1.5), "better is above 1, whichever way a metric goes"
    text = "\n".join(summary_lines(run))
    assert "1.500x [1.500, 1.500]" in text and "5 rounds" in text


def test_a_run_says_what_it_measured(pair: tuple[Path, Path], tmp_path: Path) -> None:
    run, verdict, _ = run_clockwork(scenario_of(pair, aa=True), {})
    assert verdict is None and run.command == "the command" and run.baseline == "dense"
    dense, again, packed = run.candidates
    assert (packed.method, packed.pattern, packed.format) == ("magnitude", "2:4", "packed")
    assert packed.kind == "magnitude 2:4 packed" and again.kind == "magnitude 2:4 dense, measured again"
    assert again.notes["aa_of"] == "dense" and again.model_sha256 == dense.model_sha256 != packed.model_sha256
    assert len(packed.layers) == 14 and {layer.sparsity for layer in packed.layers} == {0.5}
    assert packed.memory.weights_bytes < dense.memory.weights_bytes
    assert packed.memory.kv_token_bytes == 2 * 2 * 2 * 32 * 2
    assert packed.memory.peak_bytes == 30 and packed.load_s == [1.0]
    assert run.noise is not None and run.noise["b1-p8-o4/tpot_s"] == 0.0
    host = run.environment
    assert host.threads == 1 and host.host.memory_bytes > 0 and host.host.cores >= 1 and "torch" in host.versions
    assert host.variables["OMP_NUM_THREADS"] == "1"
    save_run(run, tmp_path / "run.json")
    assert load_run(tmp_path / "run.json") == run


def test_a_gate_asks_for_more_rounds_only_while_it_cannot_decide(pair: tuple[Path, Path]) -> None:
    budgets = slowdown_budgets(0.05, ("tpot_s",))
    scenario = scenario_of(pair, rounds=5)
    run, verdict, _ = run_clockwork(scenario, {"dense": 0.2, "packed": 0.1}, Gating(budgets, 20))
    assert verdict.status == "PASS" and len(rounds_of(run.candidates[0].series[0], METRICS["tpot_s"])) == 5

    noise = random.Random(0)

    class Noisy(Clockwork):
        def visit(self, turn: Turn) -> Visit:
            self.step_s = noise.uniform(0.5, 2.0)
            return super().visit(turn)

    run, verdict = bench(scenario, "c", gating=Gating(budgets, 9), start=lambda arm, _: Noisy(arm, [], 1.0), quiet=True)
    assert verdict is not None and verdict.status == "INCONCLUSIVE"
    assert len(rounds_of(run.candidates[0].series[0], METRICS["tpot_s"])) == 9


def test_a_gate_needs_something_to_judge(pair: tuple[Path, Path]) -> None:
    alone = scenario_of(pair, candidates=[{"name": "dense", "folder": str(pair[0])}])
    with pytest.raises(ConfigError, match="besides the baseline"):
        bench(alone, "c", gating=Gating(0.1, 9), quiet=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"engine": "vlm"}, ConfigError, "no engine 'vlm'; there are vllm, transformers, .*vllm-serve"),
        ({"options": {"colour": 1}}, ConfigError, "engine fake has no option 'colour': it has prefill_token_s"),
        ({"points": [{"prompt_tokens": 510, "output_tokens": 4}]}, ConfigError, "needs 514 tokens.*holds 512"),
        ({"points": [{"prompt_tokens": 8, "output_tokens": 4, "concurrency": 2}]}, ConfigError, "vllm-serve does"),
        ({"engine": "vllm-serve"}, ConfigError, "in lock step"),
        ({"quality": {"text": "none.txt"}, "made_by": "make it"}, ConfigError, "none.txt is no file; make it with"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    pair: tuple[Path, Path], change: dict[str, Any], error: type[CrepeError], message: str
) -> None:
    if change.get("engine") == "vllm-serve":
        pytest.importorskip("vllm")
    with pytest.raises(error, match=message):
        check(scenario_of(pair, **change))


def test_folders_without_a_model_and_other_vocabularies_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"'packed': .*empty is no model folder; make it with: make bench"):
        check(scenario_of((pair[0], tmp_path / "empty"), made_by="make bench"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights"):
        check(scenario_of((pair[0], tmp_path / "empty")))
    other = make_pico_llama(tmp_path / "other", vocab_size=352)
    with pytest.raises(ConfigError, match="vocabularies differ: dense 320, packed 352"):
        check(scenario_of((pair[0], other)))


def test_weights_that_are_not_the_manifests_are_not_measured(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pair[1], tmp_path / "copy"))
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(VerifyError, match="differs from its sha256"):
        run_clockwork(scenario_of((pair[0], copy)), {})


def test_loading_leaves_room_for_what_is_asked_and_not_more(pair: tuple[Path, Path]) -> None:
    points = [{"prompt_tokens": 8, "output_tokens": 4, "batch": 6}, {"prompt_tokens": 100, "output_tokens": 4}]
    scenario = scenario_of(pair, points=points)
    found = settings(scenario.arms()[0], scenario)
    assert (found.max_tokens, found.max_batch) == (128, 6)
    assert child_variables(scenario)["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_bytes_of_a_step_and_of_a_cached_token(pair: tuple[Path, Path]) -> None:
    """A tied embedding is the head and is read whole; linear layers take 9/16 of their dense bytes."""
    linears = 2 * 2 * (64 * (128 + 64 + 64 + 128) + 3 * 64 * 128)
    others = 2 * (320 * 64 + 5 * 64)
    dense, packed = (step_bytes(folder) for folder in pair)
    assert dense == linears + others
    assert packed == linears * 9 // 16 + others
    assert kv_token_bytes(pair[0], "float32") == 2 * 2 * 2 * 32 * 4
    assert kv_token_bytes(pair[0], "none") is None


def candidate_of(scenario: Scenario, name: str) -> tuple[Run, Candidate]:
    run, _ = bench(scenario, "c", quiet=True)
    return run, run.candidate(name)


def with_options(pair: tuple[Path, Path], **options: Any) -> Scenario:
    """The dense candidate is well, the packed one has these options of the fake engine."""
    arms = zip(NAMES, pair, ({}, options), strict=True)
    candidates = [
        {"name": name, "folder": str(path), "engine": "fake", "options": {"step_s": 0.001} | given}
        for name, path, given in arms
    ]
    return scenario_of(pair, candidates=candidates, rounds=3)


def test_the_childs_times_are_the_engines(pair: tuple[Path, Path]) -> None:
    run, packed = candidate_of(with_options(pair, step_s=0.02, prefill_token_s=0.01), "packed")
    (request,) = packed.series[0].visits[0].requests
    assert request.ttft_s is not None and 0.08 <= request.ttft_s < 0.3
    assert len(request.itl_s) == 3 and all(0.02 <= gap < 0.2 for gap in request.itl_s)
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
    found = failures(run)
    assert len(found) == 3 and found[0].startswith("packed at b1-p8-o4: RuntimeError")
    assert re.search(message, found[0])
    assert sorted(rounds_of(packed.series[0], METRICS["tpot_s"])) == [0, 1, 2]


def test_a_candidate_that_dies_is_named_with_the_end_of_its_log(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CrepeError, match=r"candidate 'packed' ended with exit code 9\n.*\n.*was told to die"):
        bench(with_options(pair, die_after=2), "c", quiet=True)


def test_a_candidate_that_does_not_load_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(pair[0], tmp_path / "broken"))
    (broken / "manifest.json").unlink()
    (broken / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(CrepeError, match=r"(?s)candidate 'packed' ended with exit code 1.*Error"):
        bench(scenario_of((pair[0], broken), engine="transformers"), "c", quiet=True)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(bench_command, [str(argument) for argument in arguments])


def test_the_command_writes_a_run_and_fails_where_requests_failed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "scenario.yaml"
    config.write_text(json.dumps(with_options(pair).model_dump(mode="json")))
    out = tmp_path / "run.json"
    done = invoke(config, "--rounds", 2, "--out", out)
    assert done.exit_code == 0, done.output
    assert "time per output token, ms" in done.stdout and load_run(out).name == "test"
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
    assert "CONFIG | DIR..." in invoke("--help").output


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
