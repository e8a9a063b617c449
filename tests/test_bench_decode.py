"""The decode bench without an engine: pairing and statistics on known numbers, the child's protocol with a fake."""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.bench import decode, decode_child
from crepe_deploy.export.pipeline import prune_and_export

from crepe_deploy.errors import CrepeError
from crepe_deploy.pattern import NM
from crepe_deploy.prune import PruneConfig
from crepe_deploy.sources import resolve_model

from .pico import make_pico_llama

FAKE = """
import sys, time
from crepe_deploy.bench.decode_child import answer

class Fake:
    def generate(self, prompts, tokens):
        if tokens == 99:
            sys.exit(3)
    def describe(self):
        return {"linear_bytes": int(sys.argv[1])}

answer(Fake(), sys.stdin, sys.stdout, time.perf_counter())
"""


class Clockwork:
    """A child whose times follow a law: fixed + per token of prompt and of output, times the batch."""

    def __init__(self, name: str, step_s: float, calls: list[str]) -> None:
        self.name, self.step_s, self.calls = name, step_s, calls
        self.asked: list[tuple[int, int, int]] = []

    def time(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        self.calls.append(self.name)
        self.asked.append((len(prompts), len(prompts[0]), tokens))
        seconds = 5.0 + 0.001 * len(prompts[0]) + self.step_s * len(prompts) * (tokens - 1)
        return {"s": seconds, "cpu_s": 2 * seconds}


def test_a_visit_takes_the_prompt_out_of_the_decode_step() -> None:
    child = Clockwork("dense", 0.25, [])
    work = decode.Work(vocabulary=320, steps=8)
    sample = decode.visit(child, work, random.Random(0))  # type: ignore[arg-type]
    wall = {"decode_b1": 0.25, "decode_b4": 1.0, "prefill": 5.512}
    both = {f"{name}_s": value for name, value in wall.items()} | {f"{k}_cpu_s": 2 * v for k, v in wall.items()}
    assert sample == pytest.approx(both)
    assert child.asked == [(1, 64, 1), (1, 64, 9), (4, 64, 1), (4, 64, 9), (1, 512, 1)]


def test_rounds_go_there_and_back_after_a_warm_up() -> None:
    calls: list[str] = []
    children: Any = {name: Clockwork(name, 0.1, calls) for name in ("dense", "2:4", "16:32")}
    samples = decode.interleave(children, decode.Work(320, 4, batches=(1,)), rounds=2)
    visits = calls[::3]
    there = ["dense", "2:4", "16:32"]
    assert visits == there + 2 * (there + there[::-1])
    assert {name: len(found) for name, found in samples.items()} == dict.fromkeys(there, 4)


def test_ratios_are_paired_by_round_so_a_common_disturbance_cancels() -> None:
    packed = [1.0, 1.0, 7.0, 9.0, 2.0, 2.0]
    found = decode.paired_ratio([1.5 * value for value in packed], packed)
    assert found["rounds"] == pytest.approx([1.5] * 3)
    assert [found[key] for key in ("ratio", "low", "high")] == pytest.approx([1.5] * 3)


def test_ratio_is_the_geometric_mean_within_its_interval() -> None:
    found = decode.paired_ratio([2.0, 2.0, 8.0, 8.0], [1.0, 1.0, 1.0, 1.0])
    assert found["ratio"] == pytest.approx(4.0)
    assert (found["low"], found["high"]) == pytest.approx((2.0, 8.0))
    assert decode.paired_ratio([3.0, 5.0], [2.0, 2.0]) == {
        "ratio": pytest.approx(2.0),
        "low": None,
        "high": None,
        "rounds": [pytest.approx(2.0)],
    }


@pytest.mark.parametrize(("dense", "packed"), [([], []), ([1.0], [1.0]), ([1.0, 1.0], [1.0] * 4)])
def test_samples_that_do_not_pair_are_refused(dense: list[float], packed: list[float]) -> None:
    with pytest.raises(ValueError, match="pair"):
        decode.paired_ratio(dense, packed)


def test_noise_larger_than_the_figure_is_refused() -> None:
    with pytest.raises(CrepeError, match="--steps"):
        decode.paired_ratio([1.0, 1.0], [1.0, -2.0])


def test_summary_has_medians_and_every_packed_candidate_against_dense() -> None:
    samples = {
        "dense": [{"decode_b1_s": value} for value in (3.0, 3.0, 3.0, 6.0)],
        "2:4": [{"decode_b1_s": value} for value in (2.0, 2.0, 2.0, 4.0)],
    }
    report = decode.summarise(samples)["decode_b1_s"]
    assert report["median"] == {"dense": 3.0, "2:4": 2.0}
    assert report["best"] == {"dense": 3.0, "2:4": 2.0}
    assert report["dense_over"]["2:4"]["ratio"] == pytest.approx(1.5)


def test_child_protocol(tmp_path: Path) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    child = decode.Child([sys.executable, str(script), "1234"])
    try:
        assert child.ready["linear_bytes"] == 1234
        assert child.ready["load_s"] >= 0 and child.ready["rss_bytes"] > 0
        assert child.time([[3, 4]], 2)["s"] >= 0
        with pytest.raises(CrepeError, match="exit code 3"):
            child.time([[3, 4]], 99)
    finally:
        child.close()


def test_child_that_never_starts_is_named() -> None:
    with pytest.raises(CrepeError, match="exit code 7"):
        decode.Child([sys.executable, "-c", "raise SystemExit(7)"])


def test_answer_times_the_engine_and_stops_at_the_end_of_input() -> None:
    asked: list[tuple[Any, int]] = []

    class Slow:
        def generate(self, prompts: decode_child.Prompts, tokens: int) -> None:
            asked.append((prompts, tokens))
            time.sleep(0.02)

        def describe(self) -> dict[str, Any]:
            return {"linears": 2}

    out = io.StringIO()
    decode_child.answer(Slow(), ['{"prompts": [[5]], "tokens": 3}\n'], out, time.perf_counter())
    ready, timed = (json.loads(line) for line in out.getvalue().splitlines())
    assert ready["linears"] == 2 and timed["s"] >= 0.02 > timed["cpu_s"] >= 0
    assert asked == [([[5]], 3)]


def test_an_engine_that_stops_early_is_an_error() -> None:
    decode_child.check_lengths([4, 4], 4)
    with pytest.raises(RuntimeError, match="asked for 4"):
        decode_child.check_lengths([4, 3], 4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Dense and packed exports of one 2:4 pruning."""
    root = tmp_path_factory.mktemp("decode")
    model = make_pico_llama(root / "model", torch.bfloat16, tie_word_embeddings=True)
    config = PruneConfig("magnitude", NM(2, 4))
    prune_and_export(resolve_model(str(model)), root / "out", config, None, formats=("dense", "packed"))
    return root / "out" / "dense", root / "out" / "packed"


def test_bytes_of_a_step(pair: tuple[Path, Path]) -> None:
    """A tied embedding is the head and is read whole; linear layers take 9/16 of their dense bytes."""
    linears = 2 * 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    others = 2 * (320 * 64 + 5 * 64)
    dense, packed = (decode.step_bytes(folder) for folder in pair)
    assert dense == linears + others
    assert packed == linears * 9 // 16 + others


def test_transformers_engine(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREPE_DEPLOY_TUNE", "0")
    found = []
    for folder in pair:
        engine = decode_child.TransformersEngine(folder, 64, False)
        engine.generate([[3, 4, 5], [6, 7, 8]], 4)
        found.append(engine.describe())
    assert [entry["linears"] for entry in found] == [14, 14]
    assert 9 / 16 <= found[1]["linear_bytes"] / found[0]["linear_bytes"] < 0.65  # padding weighs in so small a model
    assert set(found[1]["kernels"]) == {"64x64", "32x64", "128x64", "64x128"}


def test_folders_are_named_by_pattern_and_one_is_not_enough(pair: tuple[Path, Path]) -> None:
    options = argparse.Namespace(model=[str(folder) for folder in pair])
    with decode.candidates(options) as folders:
        assert folders == {"dense": pair[0], "2:4": pair[1]}
    with pytest.raises(CrepeError, match="--model"), decode.candidates(argparse.Namespace(model=["x"])):
        pass


def test_a_context_too_short_is_refused_before_anything_starts(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.main(["--model", *map(str, pair)]) == 1
    assert "context of 512" in capsys.readouterr().err


def test_table_shows_ratio_and_bound(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = {"rss_bytes": 10**9, "load_s": 2.0}
    decode.print_table(
        {
            "figures": decode.summarise({"dense": [{"prefill_s": 3.0}] * 2, "2:4": [{"prefill_s": 2.0}] * 2}),
            "bytes_bound": {"2:4": 1.526},
            "linear_bytes_over_dense": {"2:4": 0.5625},
            "loaded": {"dense": loaded, "2:4": loaded},
        }
    )
    printed = capsys.readouterr().out
    assert "1.500" in printed and "1.526" in printed and "0.5625" in printed
