"""Bands against whole matrices, and every proxy against a slow loop and its invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.methods.base import ScoreMethod
from crepe_deploy.pruning.methods.crepe import Crepe
from crepe_deploy.searching.proxies import PROXIES, Rows, check_proxy, gini_index, proxy_errors, proxy_values
from crepe_deploy.searching.sample import Band, LayerSample, band_starts, cut_band, score_band
from crepe_deploy.searching.space import Setting, Space, anchors
from crepe_deploy.searching.statistics import InputSums, SampleRule
from crepe_deploy.select import select

IN, OUT, TOKENS = 32, 24, 50
SKETCH = 8


def make_layer(rows: int = OUT, bands: int = 2, height: int = 4, seed: int = 0) -> tuple[LayerSample, Tensor]:
    """A layer with random weights (rows, IN) and inputs, and its sample."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, IN, generator=generator) * torch.rand(rows, 1, generator=generator)
    inputs = torch.randn(TOKENS, IN, generator=generator) * torch.rand(IN, generator=generator)
    sums = InputSums(IN, SampleRule(reach=7, sketch_rows=SKETCH), generator)
    sums.add(inputs)
    places = band_starts(rows, bands, height, generator)
    cut = tuple(cut_band(weight, start, size, reach=7) for start, size in places)
    layer = LayerSample("layer", rows, cut, weight.abs().sum(0), sums.squares.sqrt(), sums.sketch, sums.token_sketch)
    return layer, weight


def settings() -> list[Setting]:
    space = Space((3, 7, 15))
    points = [[0, -7, 0.5, 0, 0], [-3.5, -7, 1, 0, 0]]
    points += [[0.3, log_gamma, 0.75, size, form] for log_gamma in (-2, 1) for size in range(3) for form in (0, 1)]
    return [*anchors().values(), *(space.setting(point) for point in points)]


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.key)
def test_a_band_scores_as_the_whole_matrix_does(setting: Setting) -> None:
    method = setting.build()
    assert isinstance(method, ScoreMethod)
    layer, weight = make_layer()
    whole = method.score(weight, Stats(col_norm=layer.col_norm))
    for start in range(0, OUT, 3):
        band = cut_band(weight, start, 3, reach=7)
        torch.testing.assert_close(score_band(method, layer, band), whole[start : start + 3], rtol=5e-6, atol=1e-7)


def test_a_method_that_sees_other_rows_is_refused() -> None:
    layer, weight = make_layer()
    with pytest.raises(ConfigError, match="neighbourhood 'matrix' cannot be searched; known: ratio, smooth"):
        score_band(Crepe(gamma=0.3, neighbourhood="matrix"), layer, cut_band(weight, 0, 3, reach=0))
    with pytest.raises(ConfigError, match="RIA cannot be searched"):
        score_band(Setting("ria", {}).build(), layer, cut_band(weight, 0, 3, 7))


@pytest.mark.parametrize(("rows", "bands", "height"), [(24, 4, 4), (16, 4, 4), (7, 4, 4), (2, 4, 4), (1000, 3, 5)])
def test_bands_lie_apart_inside_the_matrix(rows: int, bands: int, height: int) -> None:
    starts = band_starts(rows, bands, height, torch.Generator().manual_seed(3))
    taken = [row for start, size in starts for row in range(start, start + size)]
    assert len(taken) == len(set(taken)) == min(rows, bands * height)
    assert min(taken) >= 0 and max(taken) < rows


def rows_of(seed: int) -> Rows:
    layer, weight = make_layer(seed=seed)
    score = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(seed + 100))
    return Rows(weight, score, select(score, NM(2, 4)), layer.col_norm, layer.sketch, layer.token_sketch)


def slow_gini(values: list[float]) -> float:
    """Half the relative mean absolute difference over all pairs."""
    total = sum(abs(left - right) for left in values for right in values)
    return total / (2 * len(values) * sum(values))


def slow_error(rows: Rows, sketch: Tensor) -> float:
    lost = size = 0.0
    for row in range(OUT):
        for direction in range(SKETCH):
            terms = [float(rows.weight[row, column] * sketch[direction, column]) for column in range(IN)]
            size += sum(terms) ** 2
            lost += sum(term for column, term in enumerate(terms) if not rows.mask[row, column]) ** 2
    return lost / size


def test_every_proxy_equals_its_slow_reference() -> None:
    rows = rows_of(0)
    entries = [(row, column) for row in range(OUT) for column in range(IN)]
    pruned = [entry for entry in entries if not rows.mask[entry]]
    kept = {entry: float(rows.score[entry]) if rows.mask[entry] else 0.0 for entry in entries}
    squares = {entry: float(rows.weight[entry] * rows.col_norm[entry[1]]) ** 2 for entry in entries}
    expected = {
        "gini": slow_gini(list(kept.values())),
        "diagonal-error": sum(squares[entry] for entry in pruned) / sum(squares.values()),
        "sketch-error": slow_error(rows, rows.sketch),
        "token-error": slow_error(rows, rows.token_sketch),
        "retained-mass": sum(kept.values()) / float(rows.score.sum()),
    }
    assert {name: proxy.function(rows) for name, proxy in PROXIES.items()} == pytest.approx(expected, rel=1e-4)


def test_gini_knows_equality_and_concentration() -> None:
    assert gini_index(torch.ones(10)) == pytest.approx(0)
    assert gini_index(torch.tensor([0.0] * 9 + [1.0])) == pytest.approx(0.9)
    assert gini_index(torch.zeros(4)) == 0.0


def test_the_gini_with_and_without_the_zeros_is_one_objective() -> None:
    values, share = torch.rand(400), 0.5
    padded = torch.cat([values, torch.zeros(400)])
    assert gini_index(padded) == pytest.approx(share + (1 - share) * gini_index(values), rel=1e-5)


def test_proxies_do_not_see_scale() -> None:
    rows = rows_of(1)
    scaled = Rows(3 * rows.weight, 5 * rows.score, rows.mask, 7 * rows.col_norm, 2 * rows.sketch, 4 * rows.token_sketch)
    for name, proxy in PROXIES.items():
        assert proxy.function(scaled) == pytest.approx(proxy.function(rows), rel=1e-5), name


def test_wanda_minimises_the_diagonal_error_and_nothing_retains_more_than_its_own_choice() -> None:
    layer, _ = make_layer(bands=1, height=OUT)
    values = [proxy_values(setting, [layer], NM(2, 4)) for setting in settings()]
    wanda = proxy_values(anchors()["Wanda"], [layer], NM(2, 4))
    assert min(proxies["diagonal-error"] for proxies in values) == pytest.approx(wanda["diagonal-error"], rel=1e-6)


def test_a_larger_sketch_nears_the_gram_matrix_within_its_bound() -> None:
    inputs, change = torch.randn(300, IN), torch.randn(5, IN)
    truth = float((change @ inputs.T).square().sum())
    errors = []
    for seed in range(40):
        sums = InputSums(IN, SampleRule(reach=1, sketch_rows=64), torch.Generator().manual_seed(seed))
        for part in torch.split(inputs, 70):
            sums.add(part)
        errors.append(float((change @ sums.sketch.T).square().sum()) / truth - 1)
    spread = torch.tensor(errors)
    assert float(spread.square().mean().sqrt()) < 1.3 * (2 / 64) ** 0.5
    assert abs(float(spread.mean())) < 0.1
    torch.testing.assert_close(sums.squares, inputs.square().sum(0))


def test_in_the_token_sketch_every_token_weighs_the_same() -> None:
    rule = SampleRule(reach=1, sketch_rows=16)
    inputs, lengths = torch.randn(20, IN), 10 ** torch.linspace(-3, 3, 20)
    plain, scaled = (InputSums(IN, rule, torch.Generator().manual_seed(1)) for _ in range(2))
    plain.add(inputs)
    scaled.add(inputs * lengths[:, None])
    torch.testing.assert_close(plain.token_sketch, scaled.token_sketch, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain.sketch, scaled.sketch)


def test_sampled_proxies_hit_the_whole_matrix_within_their_standard_errors() -> None:
    hits = dict.fromkeys(PROXIES, 0)
    setting = settings()[-1]
    for seed in range(20):
        sampled, weight = make_layer(rows=400, bands=4, height=8, seed=seed)
        whole = LayerSample(
            "layer", 400, (Band(weight, 0, 400, 0),), sampled.column_sums, sampled.col_norm, sampled.sketch,
            sampled.token_sketch,
        )  # fmt: skip
        truth = proxy_values(setting, [whole], NM(2, 4))
        measured, errors = proxy_values(setting, [sampled], NM(2, 4)), proxy_errors(setting, [sampled], NM(2, 4))
        for name in PROXIES:
            hits[name] += abs(measured[name] - truth[name]) <= 3.2 * errors[name]  # 95 % of Student's t with 3 dof
    assert min(hits.values()) >= 15, hits


def test_unknown_proxies_are_named() -> None:
    for name in ("auto", "fitted", *PROXIES):
        check_proxy(name)
    with pytest.raises(ConfigError, match="proxy 'ginny' is unknown; known: auto, gini"):
        check_proxy("ginny")
