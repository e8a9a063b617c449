"""`crepe-deploy tyr` from end to end on a tiny model: what it writes, refuses, and leaves behind when stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from crepe_deploy.cli import cli, run
from crepe_deploy.errors import EXIT_RESUMABLE
from crepe_deploy.store import files
from crepe_deploy.store.checkpoint import CheckpointReader, read_config
from crepe_deploy.store.manifest import verify
from crepe_deploy.structural import build, evolve, stages
from crepe_deploy.structural.plan import Geometry
from tests.pico import make_pico_llama, sample_text
from tests.structural.random_plans import make_model
from tests.structural.stop import Stop

GEOMETRY = Geometry(hidden=64, heads=8, kv_heads=4, head_dim=8, intermediate=128, layers=3)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico") / "model"
    return make_pico_llama(folder, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(sample_text(4000), encoding="utf-8")
    return path


def command(capsys: pytest.CaptureFixture[str], pico: Path, text: Path, out: Path, *more: str) -> tuple[int, Any, str]:
    """Exit code, the JSON document (None without one) and stderr of the command with these options."""
    options = [
        "tyr", str(pico), "--out", str(out), "--sparsity", "0.25", "--calib", str(text), "--calib-samples", "4",
        "--calib-length", "32", "--iterations", "2", "--generations", "2", "--offspring", "6", "--ffn-multiple", "16",
        "--seed", "0", "--json", *more,
    ]  # fmt: skip
    capsys.readouterr()
    code = run(options)
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else None, printed.err


def parameters_on_disk(folder: Path) -> int:
    """Elements of the layers' matrices in the written files."""
    return sum(
        info.shape[0] * info.shape[1]
        for info in CheckpointReader(folder)
        if ".layers." in info.name and len(info.shape) == 2
    )


def weights_of(folder: Path) -> dict[str, str]:
    """sha256 of every weight file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_uniform_widths_load_in_unmodified_transformers(
    capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, report, _ = command(capsys, pico, text, out, "--widths", "uniform")
    assert code == 0
    verify(out / "dense")
    kept = parameters_on_disk(out / "dense")
    assert kept == report["parameters"]["kept"] <= 0.75 * GEOMETRY.parameters
    assert 0.75 * GEOMETRY.parameters - kept < 3 * 16 * GEOMETRY.neuron_parameters
    config = json.loads((out / "dense" / "config.json").read_text())
    assert len({tuple(layer.values()) for layer in report["layers"]}) == 1
    assert config["intermediate_size"] == report["layers"][0]["intermediate_size"]
    assert "per_layer_config" not in config and "auto_map" not in config
    model = AutoModelForCausalLM.from_pretrained(str(out / "dense"), dtype=torch.float32)
    assert model.num_parameters() < AutoModelForCausalLM.from_pretrained(str(pico)).num_parameters()
    assert torch.isfinite(model(input_ids=torch.arange(20)[None]).logits).all()
    assert json.loads((out / "report.json").read_text())["layers"] == report["layers"]
    assert not out.with_name("out.work").exists()


def test_per_layer_widths_spend_the_budget_to_the_last_unit(
    capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, report, err = command(capsys, pico, text, out, "--widths", "per-layer")
    assert code == 0
    manifest = verify(out / "dense")
    kept = parameters_on_disk(out / "dense")
    assert kept == report["parameters"]["kept"] <= 0.75 * GEOMETRY.parameters
    assert 0.75 * GEOMETRY.parameters - kept < 16 * GEOMETRY.neuron_parameters
    assert [step["fitness"] for step in report["search"]["iterations"]]
    assert "a supernet takes at most" in err and "best fitness so far" in err
    assert manifest.calibration is not None and manifest.calibration["samples"] == 4
    assert manifest.config["seed"] == 0 and manifest.config["accumulation"] == "expectation"
    assert report["search"]["iterations"][-1]["attention"] == [layer["kv_heads"] for layer in report["layers"]]


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3"])
def test_other_families_are_searched_inspected_and_planned_for(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, family: str, widths: str
) -> None:
    model, out = make_model(tmp_path / family, family, intermediate_size=128), tmp_path / "out"
    more = ("--widths", widths, "--iterations", "1", "--finish", "paired")
    code, report, _ = command(capsys, model, text, out, *more)
    assert code == 0
    assert parameters_on_disk(out / "dense") == report["parameters"]["kept"] <= 0.75 * report["parameters"]["dense"]
    assert verify(out / "dense").metrics["parity"]["what"].endswith("in float64")
    assert read_config(out / "dense")["model_type"] == (family if widths == "uniform" else f"crepe_{family}")
    runner = CliRunner()
    shown = json.loads(runner.invoke(cli, ["inspect", str(out / "dense"), "--json"]).stdout)
    if widths == "per-layer":
        assert [layer["intermediate"] for layer in shown["layers"]] == [
            layer["intermediate_size"] for layer in report["layers"]
        ]
    assert runner.invoke(cli, ["verify", str(out / "dense")]).exit_code == 0
    assert runner.invoke(cli, ["plan", str(out / "dense"), "--sparsity", "2:4"]).exit_code == 0
    reloaded = AutoModelForCausalLM.from_pretrained(out / "dense", dtype=torch.float32)
    greedy = verify(out / "dense").metrics["greedy"]
    prompt = torch.tensor([greedy["prompt_token_ids"]])
    options = {"max_new_tokens": len(greedy["token_ids"]), "do_sample": False, "eos_token_id": None}
    assert reloaded.generate(prompt, **options)[0, prompt.shape[1] :].tolist() == greedy["token_ids"]


def test_the_best_even_split_is_where_the_search_and_its_baseline_start(
    capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path
) -> None:
    def run(name: str, *more: str) -> Any:
        code, report, _ = command(capsys, pico, text, tmp_path / name, *more)
        assert code == 0
        return report

    more = ("--sparsity", "0.5", "--iterations", "1")
    found, baseline = run("found", *more), run("baseline", "--method", "uniform", "--attention-share", "best", *more)
    judged, best = found["split"]["judged"], found["split"]["best"]
    assert best in judged and best["fitness"] == min(each["fitness"] for each in judged)
    assert {each["windows"] for each in judged} == {4} and len(judged) >= 3
    assert sum(found["search"]["iterations"][-1]["attention"]) == best["attention"]
    share = str(best["attention_share"])
    given = run("given", "--attention-share", share, *more)
    assert given["layers"] == found["layers"] and "split" not in given
    assert weights_of(tmp_path / "given" / "dense") == weights_of(tmp_path / "found" / "dense")
    assert baseline["split"] == found["split"]
    even = run("even", "--method", "uniform", "--attention-share", share, *more)
    assert even["layers"] == baseline["layers"] and "split" not in even
    target = run("target", "--method", "uniform", *more)["layers"]
    for name in ("target", "0.5"):
        assert run(f"as-{name}", "--method", "uniform", "--attention-share", name, *more)["layers"] == target


@pytest.mark.parametrize("groups", [2, 4])
def test_where_groups_are_few_query_heads_go_instead(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, groups: int
) -> None:
    model = make_pico_llama(tmp_path / "model", num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=groups)
    more = ("--method", "uniform", "--sparsity", "0.5")
    code, report, _ = command(capsys, model, text, tmp_path / "out", *more)
    assert code == 0
    assert [layer["kv_heads"] for layer in report["layers"]] == [2, 2, 2]  # all of two, half of four
    assert all(layer["heads"] < 8 for layer in report["layers"])


@pytest.mark.parametrize("method", ["uniform", "flap", "magnitude", "random"])
@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_baselines_have_as_many_parameters(
    capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path,
    method: str, widths: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    code, _, _ = command(capsys, pico, text, out, "--widths", widths, "--method", method)
    assert code == 0
    kept = parameters_on_disk(out / "dense")
    step = (3 if widths == "uniform" else 1) * 16 * GEOMETRY.neuron_parameters
    assert 0 <= 0.75 * GEOMETRY.parameters - kept < step
    if method in ("magnitude", "random", "flap"):
        dense, small = CheckpointReader(pico), CheckpointReader(out / "dense")
        name = "model.layers.0.mlp.down_proj.weight"
        columns = {column.numpy().tobytes() for column in dense.load(name).T.contiguous()}
        assert {column.numpy().tobytes() for column in small.load(name).T.contiguous()} <= columns


@pytest.mark.parametrize("finish", ["single", "supernet"])
@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_other_finishes_write_what_they_found(
    capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path,
    finish: str, widths: str,
) -> None:  # fmt: skip
    more = ("--finish", finish, "--widths", widths, "--fitness", "hidden", "--search-samples", "2", "--no-refit")
    code, report, _ = command(capsys, pico, text, tmp_path / "out", *more)
    assert code == 0 and report["config"]["refit"] is False
    verify(tmp_path / "out" / "dense")


@pytest.mark.parametrize("place", ["splits", "judging", "supernet", "search", "second supernet", "finish"])
def test_a_stopped_run_goes_on_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path,
    place: str,
) -> None:  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    code, expected, _ = command(capsys, pico, text, whole)
    assert code == 0
    with monkeypatch.context() as patch:
        if place == "search":
            patch.setattr(evolve, "staged", Stop(evolve.staged, 2))
        elif place == "judging":
            patch.setattr(stages, "staged", Stop(stages.staged, 1))
        else:
            at = {"splits": 2, "supernet": 5, "second supernet": 8, "finish": 11}[place]
            patch.setattr(build, "neuron_levels", Stop(build.neuron_levels, at))
        code, report, err = command(capsys, pico, text, out)
        assert code == report["code"] == EXIT_RESUMABLE and "--resume goes on" in err
    assert not out.exists() and out.with_name("out.work").is_dir()
    code, _, err = command(capsys, pico, text, out)
    assert code == 2 and "--resume" in err
    code, _, err = command(capsys, pico, text, out, "--resume", "--seed", "1")
    assert code == 2 and "another run" in err
    code, report, _ = command(capsys, pico, text, out, "--resume")
    assert code == 0
    assert report["layers"] == expected["layers"] and report["split"] == expected["split"]
    assert [step["fitness"] for step in report["search"]["iterations"]] == [
        step["fitness"] for step in expected["search"]["iterations"]
    ]
    assert weights_of(out / "dense") == weights_of(whole / "dense")
    assert not out.with_name("out.work").exists()


def damage_a_level(work: Path) -> str:
    victim = next(work.glob("iteration-0/layer-0002/ffn-*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 255
    victim.write_bytes(bytes(data))
    return f"{victim} differs"


def drop_a_line_of_the_journal(work: Path) -> str:
    journal = next(work.glob("*journal*"))
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"0.1"' not in line))
    assert len(journal.read_text().splitlines()) == len(lines) - 1
    return ""


@pytest.mark.parametrize(("at", "spoil"), [(1, damage_a_level), (4, drop_a_line_of_the_journal)])
def test_what_was_spoilt_between_stop_and_resume_is_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path,
    at: int, spoil: Callable[[Path], str],
) -> None:  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(capsys, pico, text, whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(evolve, "staged", Stop(evolve.staged, at))
        assert command(capsys, pico, text, out)[0] == EXIT_RESUMABLE
    said = spoil(out.with_name("out.work"))
    code, _, err = command(capsys, pico, text, out, "--resume")
    assert code == 0 and said in err
    assert weights_of(out / "dense") == weights_of(whole / "dense")


def test_the_seed_decides(capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path) -> None:
    results = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        command(capsys, pico, text, tmp_path / name, "--seed", seed)
        results.append(weights_of(tmp_path / name / "dense"))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sparsity", "0.99"), "at most 0."),
        (("--sparsity", "1.5"), "between 0 and 1"),
        (("--sparsity", "0"), "between 0 and 1"),
        (("--ffn-multiple", "48"), "does not divide"),
        (("--no-refit", "--finish", "paired"), "needs the refit"),
        (("--widths", "uniform", "--layout", "deci"), "plain checkpoint"),
        (("--widths", "uniform", "--attention-share", "0.5"), "for per-layer widths"),
        (("--attention-share", "most"), "best, target"),
        (("--attention-share", "0"), "lies in (0, 1]"),
        (("--calib-samples", "4000"), "are missing"),
        (("--resume",), "nothing to resume"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path,
    more: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    code, _, err = command(capsys, pico, text, tmp_path / "out", *more)
    assert code == 2 and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=files.DISK_MARGIN_BYTES + 1_000_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    code, _, err = command(capsys, pico, text, tmp_path / "out")
    assert code == 1 and "free: free some room" in err and "out.work" in err
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_family_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], pico: Path, text: Path, tmp_path: Path
) -> None:
    from transformers import GPTNeoXConfig

    from tests.pico import VOCAB, make_pico

    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    other = make_pico(tmp_path / "neox", config)
    code, _, err = command(capsys, other, text, tmp_path / "out")
    assert code == 2 and "gpt_neox" in err and "llama" in err


def test_a_layout_that_has_no_place_for_the_model_is_refused_before_the_search(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    from transformers import Qwen3Config

    from tests.pico import VOCAB, make_pico

    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = make_pico(tmp_path / "qwen3", config)
    code, _, err = command(capsys, model, text, tmp_path / "out", "--layout", "deci")
    assert code == 2 and "which qwen3 needs" in err
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3"]
