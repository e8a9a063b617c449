"""Whole searches on a tiny model: losses agree with prune and eval, anchors never lose, a stop changes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crepe_deploy import cli
from crepe_deploy.errors import ConfigError, CrepeError, OutputError
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.pruning.targets import choose_targets
from crepe_deploy.quality.perplexity import evaluate
from crepe_deploy.searching import evaluate as evaluation
from crepe_deploy.searching.losses import MaskedModel
from crepe_deploy.searching.run import SearchConfig, journal_path, search
from crepe_deploy.searching.sample import LayerSample
from crepe_deploy.searching.space import Setting, Space, anchors
from crepe_deploy.searching.statistics import SampleRule, collect
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import CalibrationSet, calibration_windows, load_tokenizer
from tests.pico import make_pico_llama, sample_text

CONFIG = SearchConfig(NM(2, 4), evaluations=24, fit=4, finalists=2, kernel_sizes=(3, 7), workers=1)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("pico") / "model")


@pytest.fixture(scope="module")
def texts(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("calib", 0), ("search", 1)):
        (folder / f"{name}.txt").write_text(sample_text(3000, seed), encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in ("calib", "search")}


@pytest.fixture(scope="module")
def tokens(pico: Path, texts: dict[str, Path]) -> dict[str, CalibrationSet]:
    tokenizer = load_tokenizer(pico)
    return {name: calibration_windows(path, tokenizer, 3, 32) for name, path in texts.items()}


def sampled(
    pico: Path, tokens: dict[str, CalibrationSet], folder: Path
) -> tuple[Decoder, list[Any], list[LayerSample]]:
    decoder = Decoder(pico)
    targets = choose_targets(decoder, NM(2, 4), None, None)
    return decoder, targets, collect(decoder, targets, tokens["calib"].tokens, SampleRule(reach=3), folder)


def run(pico: Path, out: Path, tokens: dict[str, CalibrationSet], config: SearchConfig = CONFIG, **more: Any) -> Any:
    return search(resolve_model(str(pico)), out, config, tokens["calib"], tokens["search"], **more)


def test_statistics_are_those_prune_uses_and_fit_what_was_promised(
    pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path
) -> None:
    decoder, targets, layers = sampled(pico, tokens, tmp_path)
    assert [layer.key for layer in layers] == [spec.key for block in targets for spec in block]
    promised = SampleRule(reach=3).size_bytes([spec for block in targets for spec in block])
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0.8 * promised < written < 1.2 * promised
    by_key = {layer.key: layer for layer in layers}
    query, key = (by_key[f"model.layers.1.self_attn.{name}_proj.weight"] for name in ("q", "k"))
    assert torch.equal(query.sketch, key.sketch)
    weight = decoder.reader.load(query.key)
    torch.testing.assert_close(query.column_sums, weight.abs().sum(0))
    for band in query.bands:
        assert torch.equal(band.rows, weight[band.start : band.start + band.height])


def test_a_masked_model_loses_what_prune_and_eval_say(
    pico: Path, tokens: dict[str, CalibrationSet], texts: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "sample"
    folder.mkdir()
    decoder, targets, layers = sampled(pico, tokens, folder)
    settings = [*anchors().values(), Space((3, 7)).setting([0.5, 0.5, 1.0, 0, 0])]
    norms = {layer.key: layer.col_norm for layer in layers}
    windows = load_windows(pico, texts["search"])
    losses = MaskedModel(decoder, targets, NM(2, 4), windows, norms)(settings)
    for number, setting in enumerate(settings):
        out = tmp_path / str(number)
        prune(
            resolve_model(str(pico)), out, prune_config(setting.method, "2:4", params=setting.params), tokens["calib"]
        )
        report = evaluate(out, texts["search"], window=32, max_tokens=96, against=pico)
        assert report.paired is not None
        assert losses[number].mean_kl == pytest.approx(report.paired.kl_mean.value, rel=1e-4)
        assert math.exp(losses[number].mean_nll) == pytest.approx(report.perplexity.value, rel=1e-4)
    again = MaskedModel(decoder, targets, NM(2, 4), windows, norms)(settings[-1:])
    assert again[0].kl == pytest.approx(losses[-1].kl)


def load_windows(pico: Path, text: Path) -> torch.Tensor:
    """The first three windows of 32 tokens, as `evaluate` cuts them."""
    ids = load_tokenizer(pico)(text.read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:96]).view(3, 32)


def test_the_result_is_a_preset_that_no_anchor_beats(
    pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    document = run(pico, out, tokens)
    assert json.loads(out.read_text()) == document
    facts = document["provenance"]
    assert facts["result"]["kl"] <= min(anchor["kl"] for anchor in facts["anchors"].values())
    assert set(facts["anchors"]) == set(anchors())
    assert [chosen["fitted_on"] for chosen in facts["filters"]] == [8, 9]
    assert set(facts["spearman_with_kl"]) == {*facts["proxies"], "fitted"}
    assert facts["calibration"]["sha256"] != facts["search_text"]["sha256"]
    pruned = prune(
        resolve_model(str(pico)), tmp_path / "pruned", prune_config(preset=out),
        tokens["calib"],
    )  # fmt: skip
    assert pruned.metrics["sparsity_of_pruned_tensors"] == 0.5


def test_hill_climbing_loses_to_no_anchor_either(pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="hill-climb", evaluations=6)
    facts = run(pico, tmp_path / "found.json", tokens, config)["provenance"]
    assert facts["result"]["perplexity"] <= min(anchor["perplexity"] for anchor in facts["anchors"].values())
    assert facts["filters"] == [] and facts["evaluations"] in (6, 7)


def comparable(document: dict[str, Any]) -> dict[str, Any]:
    facts = {name: value for name, value in document["provenance"].items() if name != "seconds"}
    return {**document, "provenance": facts}


@pytest.mark.parametrize("optimizer", ["pho", "hill-climb"])
def test_a_stopped_search_ends_where_it_would_have(
    pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    config = replace(CONFIG, optimizer=optimizer, evaluations=8)
    (tmp_path / "a").mkdir()
    whole = run(pico, tmp_path / "a" / "found.json", tokens, config)
    out = tmp_path / "found.json"
    calls = stop_after(monkeypatch, 12)
    with pytest.raises(KeyboardInterrupt):
        run(pico, out, tokens, config)
    assert not out.exists() and len(journal_path(out).read_text().splitlines()) == 13
    monkeypatch.undo()
    assert comparable(run(pico, out, tokens, config, resume=True)) == comparable(whole)
    lines = [journal_path(path).read_text() for path in (out, tmp_path / "a" / "found.json")]
    assert lines[0] == lines[1]
    assert calls == 13


def test_a_journal_from_before_another_sampler_is_refused(
    pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    run(pico, out, tokens, replace(CONFIG, evaluations=8, finalists=1))
    out.unlink()
    header, *lines = journal_path(out).read_text().splitlines(keepends=True)
    older = {name: value for name, value in json.loads(header).items() if name != "sampler"}
    journal_path(out).write_text("".join([json.dumps(older) + "\n", *lines]))
    with pytest.raises(ConfigError, match="its sampler is None, this one's 'scipy"):
        run(pico, out, tokens, replace(CONFIG, evaluations=8, finalists=1), resume=True)


def stop_after(monkeypatch: pytest.MonkeyPatch, results: int) -> Any:
    """Interrupt the search when it has recorded so many results."""
    original = evaluation.Journal.add
    state = Counter()

    def add(self: evaluation.Journal, kind: str, key: str, value: Any) -> None:
        state.count += 1
        if state.count > results:
            raise KeyboardInterrupt
        original(self, kind, key, value)

    monkeypatch.setattr(evaluation.Journal, "add", add)
    return state


class Counter:
    count = 0

    def __eq__(self, other: object) -> bool:
        return self.count == other

    __hash__ = None  # type: ignore[assignment]


def test_two_threads_find_what_one_finds(pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = replace(CONFIG, evaluations=12, finalists=1)
    presets = [
        run(pico, folder / "presets.json", tokens, replace(config, workers=workers))
        for folder, workers in ((tmp_path, 1), (tmp_path / "a", 2))
    ]
    assert comparable(presets[0]) == comparable(presets[1])


def test_time_up_still_decides(pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path) -> None:
    config = replace(CONFIG, evaluations=100_000, minutes=1e-6)
    facts = run(pico, tmp_path / "found.json", tokens, config)["provenance"]
    assert facts["evaluations"] <= 24
    assert facts["result"]["kl"] <= min(anchor["kl"] for anchor in facts["anchors"].values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_sizes": (3, 65)}, ConfigError, "kernel size 65 exceeds 32, the shortest side"),
        ({"proxy": "ginny"}, ConfigError, "proxy 'ginny' is unknown"),
        ({"optimizer": "annealing"}, ConfigError, "optimizer 'annealing' is unknown"),
        ({"include": "nothing"}, ConfigError, "leave nothing to prune"),
        ({"pattern": NM(2, 5)}, CrepeError, "2:5"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path, change: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(pico, tmp_path / "found.json", tokens, replace(CONFIG, **change))
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_not_taken_from_others(pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path) -> None:
    for name, message in (("found", "a .json file"), ("no/found.json", "folder does not exist")):
        with pytest.raises(OutputError, match=message):
            run(pico, tmp_path / name, tokens)
    (tmp_path / "found.json").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        run(pico, tmp_path / "found.json", tokens)
    assert (tmp_path / "found.json").read_text() == "mine"


def crepe(*arguments: Any) -> int:
    """The exit code of `crepe-deploy ARGUMENTS`."""
    return cli.run([str(argument) for argument in arguments])


SMALL = ["--calib-samples", 3, "--calib-length", 32, "--text-samples", 3, "--text-length", 32, "--evaluations", 12]
SMALL += ["--fit", 3, "--finalists", 1, "--kernels", "3,7"]


def test_the_command_searches_stops_and_resumes(
    pico: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "found.json"
    arguments = ["search", pico, "--out", out, "--calib", texts["calib"], "--text", texts["search"], *SMALL]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert crepe(*arguments) == 75
    assert "--resume goes on" in capsys.readouterr().err and not out.exists()
    assert crepe(*arguments) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    assert crepe(*arguments, "--seed", 5, "--resume") == 2
    assert "is of another run" in capsys.readouterr().err
    assert crepe(*arguments, "--resume") == 0
    output = capsys.readouterr()
    assert "evaluations, best proxy so far" in output.err
    assert "RIA, a = 0.5: KL" in output.out
    pruned = ["prune", pico, "--out", tmp_path / "p", "--preset", out, "--calib", texts["calib"], *SMALL[:4]]
    assert crepe(*pruned) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--text", "gone.txt"], "gone.txt"),
        (["--text", "wiki.test.txt"], "called a test split"),
        (["--text", "wikitext:wikitext-2:test"], "called a test split"),
        (["--kernels", "3,x"], "no list of whole numbers"),
        (["--text-samples", "100000"], "are missing"),
    ],
)
def test_the_command_refuses_what_cannot_work(
    pico: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, change: Any,
    message: str,
) -> None:  # fmt: skip
    (tmp_path / "wiki.test.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    arguments = ["search", pico, "--out", "found.json", "--calib", texts["calib"], "--text", texts["search"], *SMALL]
    assert crepe(*arguments, *change) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "found.json").exists() and not (tmp_path / "found.json.journal").exists()


def test_a_method_that_updates_weights_is_no_setting(
    pico: Path, tokens: dict[str, CalibrationSet], tmp_path: Path
) -> None:
    decoder, targets, layers = sampled(pico, tokens, tmp_path)
    masked = MaskedModel(
        decoder, targets, NM(2, 4), tokens["search"].tokens, {layer.key: layer.col_norm for layer in layers}
    )
    with pytest.raises(ConfigError, match="cannot be searched"):
        masked([Setting("sparsegpt", {})])
