"""The gate's statistics against distributions whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crepe_deploy.bench.run import statistics
from crepe_deploy.bench.run.result import Request, Series, Visit
from scipy import stats

from tests.bench.runs import series

TRIALS = 400


def coverage(draws: np.ndarray, truth: float, level: float) -> float:
    """The share of rows whose interval of the geometric mean holds the truth."""
    hits = 0
    for seed, row in enumerate(draws):
        interval = statistics.log_mean(row, seed).interval(level)
        hits += interval.low <= truth <= interval.high
    return hits / len(draws)


@pytest.mark.parametrize("rounds", [5, 8, 30])
def test_intervals_of_normal_log_ratios_cover_what_they_say(rounds: int) -> None:
    draws = np.exp(np.random.default_rng(rounds).normal(0.1, 0.05, (TRIALS, rounds)))
    assert 0.92 <= coverage(draws, math.exp(0.1), 0.95) <= 0.98


def test_intervals_at_the_levels_that_corrections_ask_for_cover_too() -> None:
    draws = np.exp(np.random.default_rng(0).normal(0, 0.05, (TRIALS, 6)))
    assert coverage(draws, 1.0, 0.995) >= 0.98
    assert coverage(draws, 1.0, 0.5) == pytest.approx(0.5, abs=0.08)


def test_intervals_of_skewed_noise_cover_nearly_what_they_say() -> None:
    # Other work on a machine only ever slows down: an exponential tail.
    draws = np.exp(np.random.default_rng(1).exponential(0.05, (TRIALS, 10)))
    assert coverage(draws, math.exp(0.05), 0.95) >= 0.87


def test_the_estimate_is_unbiased() -> None:
    generator = np.random.default_rng(2)
    pairs = generator.lognormal(0, 0.2, (2000, 2, 6))
    logs = [math.log(statistics.paired_ratio(1.15 * first, second).value) for first, second in pairs[:300]]
    error = 0.2 * math.sqrt(2 / 6 / 300)
    assert np.mean(logs) == pytest.approx(math.log(1.15), abs=4 * error)


def test_pairing_removes_what_both_arms_of_a_round_met() -> None:
    neighbours = np.random.default_rng(3).lognormal(0, 0.5, 8)
    paired = statistics.paired_ratio(1.1 * neighbours, neighbours)
    assert (paired.value, paired.low, paired.high) == pytest.approx((1.1, 1.1, 1.1))
    unpaired = statistics.log_mean(1.1 * neighbours).over(statistics.log_mean(neighbours)).interval()
    assert unpaired.low is not None and unpaired.low < 1 < 1.3 < (unpaired.high or 0)


def test_the_difference_of_two_independent_arms_agrees_with_welch() -> None:
    generator = np.random.default_rng(4)
    first, second = generator.normal(0.2, 0.1, 40), generator.normal(0.0, 0.3, 25)
    ours = statistics.log_mean(np.exp(first)).over(statistics.log_mean(np.exp(second))).interval()
    theirs = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert math.log(ours.low or 0) == pytest.approx(theirs.low, abs=0.02)
    assert math.log(ours.high or 0) == pytest.approx(theirs.high, abs=0.02)


def test_p_values_agree_with_the_t_test_and_with_the_interval() -> None:
    values = np.random.default_rng(5).normal(0.08, 0.05, 60)
    estimate = statistics.log_mean(np.exp(values))
    theirs = stats.ttest_1samp(values, math.log(1.06), alternative="greater").pvalue
    assert estimate.p_above(1.06) == pytest.approx(theirs, rel=0.35)
    low = estimate.interval(0.95).low
    assert low is not None and estimate.p_above(low) == pytest.approx(0.025, abs=1e-9)


def test_p_values_of_an_unchanged_candidate_are_uniform() -> None:
    draws = np.exp(np.random.default_rng(6).normal(0, 0.05, (TRIALS, 7)))
    values = [statistics.log_mean(row, seed).p_above(1.0) for seed, row in enumerate(draws)]
    # excess <= 0 gives 1, so only the lower half is uniform
    assert np.mean(np.asarray(values) <= 0.05) == pytest.approx(0.05, abs=0.035)


def test_constants_have_no_width_and_one_sample_no_interval() -> None:
    constant = statistics.paired_ratio([3.0] * 5, [2.0] * 5)
    assert (constant.low, constant.value, constant.high) == pytest.approx((1.5, 1.5, 1.5), rel=1e-12)
    estimate = statistics.paired_log_mean([3.0] * 5, [2.0] * 5)
    assert estimate.p_above(1.4) == 0 and estimate.p_above(1.6) == 1
    one = statistics.paired_log_mean([3.0], [2.0])
    assert one.interval().model_dump() == {"value": pytest.approx(1.5), "low": None, "high": None}
    assert one.p_above(1.0) == 1
    assert one.over(estimate).interval().low is None


def test_ties_among_samples_are_harmless() -> None:
    ratio = statistics.paired_ratio([1.0, 1.0, 1.0, 1.1, 1.1, 1.0], [1.0] * 6)
    assert ratio.low is not None and ratio.high is not None
    assert ratio.low < ratio.value < ratio.high


@pytest.mark.parametrize("values", [[], [0.0, 1.0], [-1.0], [math.nan], [math.inf]])
def test_samples_that_make_no_ratio_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="positive, finite"):
        statistics.log_mean(values)
    with pytest.raises(ValueError, match="do not pair"):
        statistics.paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive, finite"):
        statistics.paired_ratio([1.0], [0.0])


def test_more_rounds_narrow_the_interval_as_their_root() -> None:
    values = np.exp(np.random.default_rng(7).normal(0, 0.1, 400))
    few, many = (statistics.half_width(statistics.log_mean(values[:count])) for count in (25, 400))
    assert few / many == pytest.approx(4, rel=0.4)


def test_quantiles_pooled_over_rounds_resample_rounds_and_not_requests() -> None:
    # Each round has its own level: the requests of a round are not independent.
    levels = np.random.default_rng(8).normal(1, 0.2, 12)
    rounds = [[level] * 100 for level in levels]
    by_round = statistics.pooled_quantile(rounds, 0.5)
    naive = statistics.quantile([value for row in rounds for value in row], 0.5)
    assert by_round.value == pytest.approx(naive.value)
    assert (by_round.high or 0) - (by_round.low or 0) > 3 * ((naive.high or 0) - (naive.low or 0))
    assert statistics.pooled_quantile([[2.0, 4.0]], 0.5).low is None
    with pytest.raises(ValueError, match="no samples"):
        statistics.pooled_quantile([[]], 0.5)


def test_the_quantiles_interval_covers_the_true_quantile() -> None:
    generator = np.random.default_rng(9)
    truth = stats.expon.ppf(0.9)
    intervals = [statistics.quantile(generator.exponential(1, 60), 0.9, seed) for seed in range(200)]
    assert np.mean([one.low <= truth <= one.high for one in intervals]) >= 0.88


def test_the_noise_floor_of_two_equal_arms_is_their_intervals_half_width() -> None:
    generator = np.random.default_rng(10)
    floors = []
    for _ in range(60):
        arms = [series("p", generator.lognormal(math.log(0.02), 0.03, 8)) for _ in range(2)]
        floors.append(statistics.noise_floor(*arms)["p/tpot_s"])
    expected = stats.t.ppf(0.975, 7) * 0.03 * math.sqrt(2) / math.sqrt(8)
    assert np.mean(floors) == pytest.approx(expected, rel=0.15)


def test_the_noise_floor_pairs_by_round_and_leaves_out_what_was_not_measured() -> None:
    first, second = series("p", [0.02, 0.03, 0.04]), series("p", [0.02, 0.03, 0.04])
    assert statistics.noise_floor(first, second)["p/tpot_s"] == pytest.approx(0, abs=1e-12)
    failed = Visit(round=1, duration_s=1, requests=[Request(prompt_tokens=8, output_tokens=0, error="refused")])
    broken = Series(point="p", visits=[second.visits[0], failed, second.visits[2]])
    assert statistics.noise_floor(first, broken)["p/tpot_s"] == pytest.approx(0, abs=1e-12)
    assert statistics.noise_floor(first, Series(point="p", visits=[failed])) == {}
    with pytest.raises(ValueError, match="two points"):
        statistics.noise_floor(first, series("q", [0.02]))


def test_a_detectable_budget_is_passed_as_often_as_promised() -> None:
    rounds, spread = 12, 0.05
    noise = stats.t.ppf(0.975, rounds - 1) * spread / math.sqrt(rounds)
    budget = statistics.detectable(noise)
    draws = np.exp(np.random.default_rng(11).normal(0, spread, (TRIALS, rounds)))
    passed = [(statistics.log_mean(row, seed).interval().high or 9) <= 1 + budget for seed, row in enumerate(draws)]
    assert np.mean(passed) == pytest.approx(0.8, abs=0.08)
    assert statistics.detectable(0.0) == 0


def test_interruptions_leave_the_undisturbed_time_alone() -> None:
    values = np.random.default_rng(13).normal(1, 0.01, 200)
    busy = values.copy()
    busy[::2] *= 3  # half of the time something else ran
    assert statistics.undisturbed(list(busy)) == pytest.approx(statistics.undisturbed(list(values)), rel=0.01)
    assert statistics.undisturbed(list(1.15 * values)) == pytest.approx(1.15 * statistics.undisturbed(list(values)))


def test_holm_on_the_textbook_example_and_its_family_wise_error() -> None:
    adjusted = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    assert statistics.holm({}) == {} and statistics.holm({"a": 0.7}) == {"a": 0.7}
    uniform = np.random.default_rng(12).uniform(size=(2000, 6))
    false = [min(statistics.holm(dict(enumerate(map(float, row)))).values()) <= 0.05 for row in uniform]  # type: ignore[arg-type]
    assert np.mean(false) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("freedom", [1, 2.5, 4, 30, math.inf])
@pytest.mark.parametrize("p", [0.8, 0.975, 0.99975])
def test_intervals_and_p_values_are_students(p: float, freedom: float) -> None:
    estimate = statistics.LogMean(0.3, 0.1, 0.2, freedom)
    t = stats.t.ppf(p, freedom)
    interval = estimate.interval(2 * p - 1)
    assert interval.low == pytest.approx(math.exp(0.3 - 0.1 * t), rel=1e-9)
    assert interval.high == pytest.approx(math.exp(min(0.3 + 0.2 * t, 700)), rel=1e-9)
    assert estimate.p_above(math.exp(0.3 - 0.1 * t)) == pytest.approx(1 - p, rel=1e-9)
    assert statistics.half_width(estimate, 2 * p - 1) == pytest.approx(0.15 * t, rel=1e-9)
