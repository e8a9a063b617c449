"""A new family is one entry of the table: without it a step is refused or said to be halved, with it all is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from crepe_deploy.exporting.pipeline import export_checkpoint
from torch import Tensor

from crepe_deploy.cli import cli
from crepe_deploy.errors import ConfigError, UnsupportedModel
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.families import FAMILIES
from crepe_deploy.model.proof import walk_logits
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import Manifest, load_manifest, verify
from crepe_deploy.store.sources import resolve_model
from tests.model import toy
from tests.pico import VOCAB, pico_tokenizer, sample_text
from tests.pruning.test_prune import windows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy.register()
    folder = tmp_path_factory.mktemp("toy") / "m"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = tf.AutoModelForCausalLM.from_config(toy.ToyConfig(initializer_range=0.1))
        toy.uneven(made)
    made.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, toy.NAME, toy.ENTRY)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text(sample_text(3000), encoding="utf-8")
    return path


def run(model: Path, out: Path, text: Path, **config: Any) -> Manifest:
    calibration = windows(model, text, samples=16, length=48)
    return prune(resolve_model(str(model)), out, prune_config("ria", NM(2, 4), **config), calibration)


def distance(folder: Path, dense: Path, tokens: Tensor) -> float:
    return float((walk_logits(Decoder(folder), tokens) - walk_logits(Decoder(dense), tokens)).square().mean())


def stock(folder: Path, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return tf.AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits


@pytest.mark.usefixtures("entry")
def test_one_entry_gives_every_step(tmp_path: Path, model: Path, text: Path) -> None:
    tokens = windows(model, text, samples=8, length=48).tokens
    manifest = run(model, tmp_path / "whole", text, permute="fold", reconstruct="exact", feed="both", rescale="logits")
    assert "limits" not in manifest.metrics
    assert manifest.metrics["rescale"]["factor"] != 1
    reordered = {name.split(".", 3)[3] for name, record in manifest.tensors.items() if record.notes.keys() >= {
        "score_retained_gain"}}  # fmt: skip
    assert reordered == {"digest.narrow.weight", "gather.merge.weight"}
    torch.testing.assert_close(
        walk_logits(Decoder(tmp_path / "whole"), tokens), stock(tmp_path / "whole", tokens), atol=1e-5, rtol=1e-5
    )
    run(model, tmp_path / "plain", text)
    assert distance(tmp_path / "whole", model, tokens) < distance(tmp_path / "plain", model, tokens) / 2


def test_the_entry_brings_the_correction_of_the_stream(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = windows(model, text, samples=8, length=48).tokens
    halved = run(model, tmp_path / "halved", text, reconstruct="exact", feed="both")
    (limit,) = halved.metrics["limits"]
    assert "the residual stream of 'toy_decoder'" in limit
    assert load_manifest(tmp_path / "halved").metrics["limits"] == [limit]
    monkeypatch.setitem(FAMILIES, toy.NAME, toy.ENTRY)
    assert "limits" not in run(model, tmp_path / "whole", text, reconstruct="exact", feed="both").metrics
    assert distance(tmp_path / "whole", model, tokens) < distance(tmp_path / "halved", model, tokens)


@pytest.mark.usefixtures("entry")
@pytest.mark.parametrize("name", ["dense", "packed"])
def test_it_exports(tmp_path: Path, model: Path, text: Path, name: str) -> None:
    run(model, tmp_path / "pruned", text, permute="fold")
    export_checkpoint(tmp_path / "pruned", tmp_path / "out", name)
    verify(tmp_path / "out")
    folder = tmp_path / "out"
    if name == "packed":
        folder = tmp_path / "unpacked"
        export_checkpoint(tmp_path / "out", folder, "dense")
    before, after = CheckpointReader(tmp_path / "pruned"), CheckpointReader(folder)
    assert all(torch.equal(before.load(key), after.load(key)) for key in before.tensors)
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        stock(tmp_path / "out", tokens), stock(tmp_path / "pruned", tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"permute": "fold"}, "--permute fold does not know which layers of 'toy_decoder' .* known: llama, mistral"),
        (
            {"reconstruct": "exact", "feed": "both", "rescale": "logits"},
            "--rescale does not know the last norm of 'toy_decoder'; known: llama",
        ),
    ],
)
def test_without_an_entry_what_would_do_nothing_is_refused(
    tmp_path: Path, model: Path, text: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        run(model, tmp_path / "out", text, **config)
    assert not (tmp_path / "out").exists()


def test_half_an_entry_is_said(tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, toy.NAME, toy.Family(folds=toy.ENTRY.folds[:1]))
    manifest = run(model, tmp_path / "out", text, permute="fold")
    assert manifest.metrics["limits"] == [
        "--permute fold: values are not reordered, for their order in 'toy_decoder' is not known"
    ]
    with pytest.raises(ConfigError, match=r"reorders the inputs of digest\.narrow, and none is to be pruned"):
        run(model, tmp_path / "other", text, permute="fold", include="gather")


def test_the_command_prints_what_was_halved(tmp_path: Path, model: Path, text: Path) -> None:
    arguments = ["prune", str(model), "--out", str(tmp_path / "out"), "--method", "ria", "--reconstruct", "exact"]
    arguments += ["--calib", str(text), "--calib-samples", "4", "--calib-length", "32"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "what the residual stream of 'toy_decoder' has lost is not made up for" in result.output
