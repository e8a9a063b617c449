"""The report's parts: numbers, comparisons, the rules of its answer, text and colours."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from crepe_deploy.bench.report.advice import advise
from crepe_deploy.bench.report.charts import Spot, Words, distribution, frontier
from crepe_deploy.bench.report.compare import compare, kind_of
from crepe_deploy.bench.report.markdown import escape
from crepe_deploy.bench.report.numbers import digits, interval, si
from crepe_deploy.bench.report.samples import LATENCIES, pool, summarise
from crepe_deploy.bench.report.style import DARK, LIGHT, inline, short
from crepe_deploy.bench.run.result import Candidate, Interval, Memory, Quality, Run

from tests.bench.report_runs import made_up_run, small

# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (1234.4, "1230"), (0.9996, "1.00"), (99.96, "100"), (0, "0"), (-2.345, "-2.35"),
     (1e9, "1.00e+09"), (1.5e-7, "1.50e-07"), (float("nan"), "nan")],
)  # fmt: skip
def test_three_significant_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0123, "s", "12.3 ms"), (2.1e-5, "s", "21.0 µs"), (0.99999, "s", "1.00 s"), (269e6, "B", "269 MB"),
     (512, "B", "512 B"), (999.9e6, "B", "1.00 GB"), (98.7, "tokens/s", "98.7 tokens/s"), (None, "s", "–")],
)  # fmt: skip
def test_quantities_get_si_prefixes(value: float | None, unit: str, text: str) -> None:
    assert si(value, unit) == text


def test_an_interval_shares_its_figures_unit() -> None:
    assert si(0.0132, "s", 0.00095, 0.0144) == "13.2 ms [0.950, 14.4]"


def test_an_interval_is_shown_only_where_there_is_one() -> None:
    assert interval(Interval(value=1.5, low=1.4, high=1.7), "×") == "1.50× [1.40, 1.70]"
    assert interval(Interval(value=1.5), "×") == "1.50×"
    assert interval(None) == "–"


# Samples and comparisons


def test_pooled_percentiles_are_the_samples_own_and_their_intervals_widen_with_noisy_rounds() -> None:
    run = made_up_run(rounds=6)
    series = run.candidate("dense").series[0]
    pooled = pool(series, LATENCIES["itl"])
    every = [gap for visit in series.visits for request in visit.requests for gap in request.itl_s]
    summary = summarise(pooled)
    assert summary["p90"].value == pytest.approx(np.quantile(every, 0.9))
    assert summary["mean"].value == pytest.approx(np.mean(every))
    low, high = summary["mean"].low, summary["mean"].high
    assert low is not None and high is not None and low < np.mean(every) < high
    # Rounds differ by 10 %, samples inside one by far less: an interval that ignored rounds would be far narrower.
    assert high - low > 3 * 2 * 1.96 * np.std(every) / np.sqrt(len(every))


def test_a_percentile_without_samples_beyond_it_is_left_out() -> None:
    run = made_up_run(rounds=6)
    prefill = run.candidate("dense").series[3]
    assert set(summarise(pool(prefill, LATENCIES["ttft"]))) == {"mean", "p50", "p90"}
    assert summarise(pool(prefill, LATENCIES["itl"])) == {}


def test_ratios_pair_the_rounds_that_both_have() -> None:
    run = made_up_run(rounds=6)
    dense, packed = run.candidates[0], run.candidates[3]
    cut = packed.series[0].model_copy(update={"visits": [v for v in packed.series[0].visits if v.round != 2]})
    run = run.model_copy(
        update={"candidates": [dense, packed.model_copy(update={"series": [cut, *packed.series[1:]]})]}
    )
    pair = compare(run).entries[1].pairs["b1", "tpot_s"]
    assert pair.rounds == 5
    assert pair.ratio is not None and pair.ratio.value == pytest.approx(0.64, rel=0.05)


def test_the_points_that_stand_for_the_run_are_chosen_from_it() -> None:
    comparison = compare(made_up_run(rounds=2))
    assert [p.name for p in (comparison.headline, comparison.loaded, comparison.prompt) if p] == [
        "b1",
        "b16",
        "prefill",
    ]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, "dense"), ({"method": "ria"}, "pruned"), ({"format": "int8"}, "quantised"), ({"format": "fp16"}, "dense"),
     ({"format": "onnx", "notes": {"precision": "int4"}}, "quantised"),
     ({"format": "int8", "pattern": "2:4"}, "pruned and quantised")],
)  # fmt: skip
def test_a_candidate_is_named_by_what_its_record_says(changes: dict[str, Any], kind: str) -> None:
    assert kind_of(made_up_run(rounds=1).candidates[0].model_copy(update=changes)) == kind


def test_the_frontier_holds_what_no_other_beats() -> None:
    entry = compare(made_up_run(rounds=1)).entries[0]
    places = [(1.0, 1.0), (0.6, 2.0), (0.7, 2.5), (0.6, 3.0), (0.5, 9.0)]
    spots = [Spot(entry, Interval(value=x), Interval(value=y)) for x, y in places]
    assert {(s.x.value, s.y.value) for s in frontier(spots, higher_x=False)} == {(1.0, 1.0), (0.6, 2.0), (0.5, 9.0)}
    assert {(s.x.value, s.y.value) for s in frontier(spots, higher_x=True)} == {(1.0, 1.0)}


# The answer


def with_quality(run: Run, ratios: dict[str, tuple[float, float]]) -> Run:
    """The run with perplexity ratios (value, upper end) by candidate; the others lose theirs."""

    def changed(candidate: Candidate) -> Candidate:
        if candidate.name not in ratios or candidate.quality is None:
            return candidate if candidate.name == run.baseline else candidate.model_copy(update={"quality": None})
        value, high = ratios[candidate.name]
        ratio = Interval(value=value, low=value - (high - value), high=high)
        quality = Quality(**{**candidate.quality.model_dump(), "perplexity_ratio": ratio.model_dump()})
        return candidate.model_copy(update={"quality": quality})

    return run.model_copy(update={"candidates": [changed(candidate) for candidate in run.candidates]})


@pytest.mark.parametrize(
    ("ratios", "answer", "chosen"),
    [
        ({"int8": (1.01, 1.02), "crepe-16:32-packed": (2.5, 2.6)}, "quantise", "int8"),
        # both pass: the packed one is larger by 7 %, and faster by more
        ({"int8": (1.01, 1.02), "crepe-16:32-packed": (1.05, 1.06)}, "prune", "crepe-16:32-packed"),
        ({"int8": (1.01, 1.02), "crepe-16:32-packed": (1.09, 1.11)}, "quantise", "int8"),
        ({"ria-2:4": (1.01, 1.02)}, "neither", None),
        ({"int8": (1.5, 1.6)}, "neither", None),
        ({}, "undecided", None),
    ],
)
def test_the_answer_follows_the_stated_rules(
    ratios: dict[str, tuple[float, float]], answer: str, chosen: str | None
) -> None:
    advice = advise(compare(with_quality(made_up_run(rounds=4), ratios)))
    assert (advice.answer, advice.chosen) == (answer, chosen)


def test_both_is_answered_where_both_is_cheapest() -> None:
    run = with_quality(made_up_run(rounds=4), {"int8": (1.01, 1.02), "crepe-16:32-packed": (1.05, 1.06)})
    packed = run.candidate("crepe-16:32-packed")
    both = packed.model_copy(update={"name": "both", "format": "int8", "memory": Memory(weights_bytes=100_000_000)})
    advice = advise(compare(run.model_copy(update={"candidates": [*run.candidates, both]})))
    assert (advice.answer, advice.chosen) == ("both", "both")
    assert not any("Not measured here" in reason for reason in advice.reasons)


def test_a_speed_gain_below_the_noise_floor_is_no_gain() -> None:
    run = with_quality(made_up_run(rounds=4), {"int8": (1.01, 1.02)})
    int8 = run.candidate("int8").model_copy(update={"memory": run.candidates[0].memory})
    run = run.model_copy(update={"candidates": [run.candidates[0], int8], "noise": {}})
    assert advise(compare(run)).answer == "quantise"
    noisy = run.model_copy(update={"noise": {"b1/decode_tokens_per_s": 0.5}})
    assert advise(compare(noisy)).answer == "neither"


def test_what_was_not_measured_is_said() -> None:
    reasons = " ".join(advise(compare(made_up_run(rounds=2))).reasons)
    assert "Not measured here, so not ruled out: a pruned and quantised candidate." in reasons
    assert "Over the perplexity limit of 1.10×: “ria-2:4” (pruned) at 6.40×" in reasons


def test_names_fit_beside_charts() -> None:
    assert short("a" * 99) == "a" * 25 + "…"
    assert short("_x") == " _x"
    assert "\u202e" not in short("a\u202eb")


def test_markdown_takes_text_literally() -> None:
    assert escape("a|b <i> *x*\n& [y](z)") == r"a\|b &lt;i&gt; \*x\* &amp; \[y\](z)"


def test_svg_colours_follow_the_page_and_ids_do_not_clash() -> None:
    svg = (
        '<?xml version="1.0"?><svg width="1pt" viewBox="0 0 1 1"><defs><g id="p"/></defs>'
        f'<use xlink:href="#p" style="fill: {LIGHT[0]}; stroke: #1f2328" clip-path="url(#p)"/></svg>'
    )
    element = inline(svg, "x")
    assert 'id="x-p"' in element and 'href="#x-p"' in element and "url(#x-p)" in element
    assert "fill: var(--c0); stroke: currentColor" in element
    assert element.startswith("<svg viewBox") and "width=" not in element


def test_the_palette_contrasts_with_the_page_in_both_modes() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for palette, paper in ((LIGHT, "#ffffff"), (DARK, "#14181d")):
        for colour in palette:
            high, low = sorted((light(colour), light(paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_a_wide_distribution_gets_a_logarithmic_axis_with_plain_numbers() -> None:
    run = small()
    for candidate in run.candidates:
        for visit in candidate.series[0].visits:
            visit.requests[0].itl_s[::3] = [1e-5] * len(visit.requests[0].itl_s[::3])
    comparison = compare(run)
    words = Words("x", "title", "ITL (ms)", "y", "conditions", "table")
    figure = distribution(comparison, run.workload.points[0], "itl", words)
    assert figure is not None
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg)
    assert "0.1" in texts and "1" in texts and "10" in texts
    assert not any("$" in text for text in texts)
