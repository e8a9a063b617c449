"""Measuring: checks, order, pairing and prompts, with workers that only count."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.bench import benchmark
from crepe_deploy.bench.benchmark import Gating, bench
from crepe_deploy.bench.gate.budgets import slowdown_budgets
from crepe_deploy.bench.run.candidate import kv_token_bytes, step_bytes
from crepe_deploy.bench.run.measure import check, child_variables, settings
from crepe_deploy.bench.run.metrics import METRICS, rounds_of
from crepe_deploy.bench.run.result import Interval, Point, Quality, Request, Visit, load_run, save_run
from crepe_deploy.bench.run.scenario import CandidateSpec, Scenario
from crepe_deploy.bench.run.summary import gain, summary_lines
from crepe_deploy.bench.run.worker import Turn

from crepe_deploy.errors import CheckpointError, ConfigError, CrepeError, VerifyError
from tests.bench.scenes import NAMES, scenario_of
from tests.pico import make_pico_llama


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
    a, b, c = "dense", "dense again", "packed"
    rounds = [[c, a, b, b, a, c], [a, b, c, c, b, a], [b, c, a, a, c, b]]
    assert [name for name, _ in log] == [name for names in rounds for name in 2 * names]
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
    speed = gain(run, run.candidate("packed"), "b1-p8-o4", "tpot_s")
    assert speed is not None
    assert (speed.value, speed.low, speed.high) == pytest.approx((1.5, 1.5, 1.5))
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
    asked = settings(scenario.specs()[0], scenario)
    assert (asked.max_tokens, asked.max_batch) == (128, 6)
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


def test_quality_is_measured_once_a_model_against_the_baseline(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, Path | None, int, int | None, str]] = []

    def measured(
        folder: Path, against: Path | None, text: Path, *, window: int, max_tokens: int, dtype: str
    ) -> Quality:
        asked.append((folder, against, window, max_tokens, dtype))
        return Quality(convention={"text": text.name}, perplexity=Interval(value=float(len(asked))))

    monkeypatch.setattr(benchmark, "measure_quality", measured)
    graph = Path(shutil.copytree(pair[0], tmp_path / "graph"))
    (graph / "model.safetensors").rename(graph / "model.onnx")
    (graph / "manifest.json").unlink()
    (tmp_path / "text.txt").write_text("words")
    names = zip((*NAMES, "graph"), (*pair, graph), strict=True)
    scenario = scenario_of(
        pair, aa=True, candidates=[{"name": name, "folder": str(folder)} for name, folder in names],
        quality={"text": str(tmp_path / "text.txt"), "window": 64, "max_tokens": 128},
    )  # fmt: skip
    run, _, _ = run_clockwork(scenario, {})
    assert asked == [(pair[0], None, 64, 128, "auto"), (pair[1], pair[0], 64, 128, "auto")]
    values = [candidate.quality and candidate.quality.perplexity.value for candidate in run.candidates]
    assert values == [1.0, 1.0, 2.0, None], "the second arm of the A/A run is the same model; a graph is not read"
    assert any(line == "packed: perplexity 2" for line in summary_lines(run))
