"""The model card as the hub reads it, and the quality that `eval --update-card` writes into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from crepe_deploy.exporting.frame.measured import BEGIN, END, update_card
from huggingface_hub import ModelCard

import crepe_deploy
from crepe_deploy.cli import run
from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.project import install_address, project_url
from crepe_deploy.store.manifest import verify
from tests.pico import make_pico_llama, sample_text


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense, packed and int8 of one pruned model, whose licence and parent are known."""
    root = tmp_path_factory.mktemp("cards")
    model = make_pico_llama(root / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    crepe_deploy.prune_and_export(
        model, root / "out", method="magnitude", format="dense,packed,int8", base_model="owner/Parent-1B"
    )
    return root / "out"


@pytest.mark.parametrize("format", ["dense", "packed", "int8"])
def test_the_hub_reads_the_front_matter(out: Path, format: str) -> None:
    card = ModelCard((out / format / "README.md").read_text())
    data = card.data.to_dict()
    assert data["base_model"] == "owner/Parent-1B" and data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert {"pruned", "sparse", "crepe-deploy"} <= set(data["tags"])
    assert card.text.lstrip().startswith("# Parent-1B, pruned to 2:4 with magnitude")


@pytest.mark.parametrize("format", ["dense", "packed", "int8"])
def test_a_stranger_is_told_how_to_load_and_serve_it(out: Path, format: str) -> None:
    text = (out / format / "README.md").read_text()
    assert "## How to load and serve" in text and "from_pretrained(" in text and "vllm serve" in text
    assert (f'pip install "crepe-deploy @ {install_address()}"' in text) is (format == "packed")
    assert "INSTALL" not in text and str(out.parent) not in text, "no path of this machine is published"
    for label in ("Repository", "Documentation", "Issues"):
        assert project_url(label) in text


def test_an_export_keeps_the_parent_or_is_given_another(out: Path, tmp_path: Path) -> None:
    crepe_deploy.export(out / "packed", tmp_path / "kept")
    crepe_deploy.export(out / "packed", tmp_path / "other", base_model="other/Name")
    parents = [ModelCard((tmp_path / name / "README.md").read_text()).data.base_model for name in ("kept", "other")]
    assert parents == ["owner/Parent-1B", "other/Name"]
    with pytest.raises(ConfigError, match="--base-model"):
        crepe_deploy.export(out / "packed", tmp_path / "wrong", base_model="/a/path")


def test_measured_quality_is_written_refreshed_and_the_folder_still_verifies(out: Path, tmp_path: Path) -> None:
    text = tmp_path / "my |text.txt"
    text.write_text(sample_text(600))
    folder = out / "packed"
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    for window in (32, 64):
        measured = crepe_deploy.evaluate(
            folder, text=text, window=window, against=out.parent / "model", max_tokens=512, update_card=True
        )
        assert measured.quality is not None
        written = card.read_text()
        assert written.count(BEGIN) == written.count(END) == 1 and "My own words." in written
        section = written.partition(BEGIN)[2].partition(END)[0]
        assert f"{measured.quality.perplexity.value:.4g}" in section and f"windows of {window}," in section
        assert "my text.txt" in section and str(tmp_path) not in section and "KL divergence" in section
        verify(folder)
        ModelCard(written)


def test_what_cannot_be_refreshed_is_refused_before_it_is_measured(out: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no text at all.txt"
    plain = make_pico_llama(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="manifest"):
        crepe_deploy.evaluate(plain, text=missing, update_card=True)
    with pytest.raises(ConfigError, match="--update-card"):
        crepe_deploy.evaluate("owner/name", text=missing, update_card=True)
    card = out / "dense" / "README.md"
    card.write_text(f"{card.read_text()}\n{BEGIN}\n")
    with pytest.raises(CheckpointError, match="marks"):
        crepe_deploy.evaluate(out / "dense", text=missing, update_card=True)


def test_tasks_have_their_rows(out: Path) -> None:
    metrics = {"acc": {"value": 0.5, "stderr": 0.1}, "perplexity": {"value": 9.0, "stderr": None}}
    tasks = {"arc|easy": {"documents": 20, "metrics": metrics}}
    report = {"tasks": tasks, "lm_eval": "0.4", "few_shot": 0, "dtype": "float32"}
    update_card(out / "int8", {"model": "m", "tasks": report})
    text = (out / "int8" / "README.md").read_text()
    assert (
        "| arc easy, acc, 20 documents (higher is better) | 0.5 (standard error 0.1) |" in text
        and "lm-eval 0.4" in text
    )
    verify(out / "int8")


def test_prune_names_the_parent_in_its_card(tmp_path: Path) -> None:
    model, out = make_pico_llama(tmp_path / "model"), tmp_path / "pruned"
    assert run(["prune", str(model), "--method", "magnitude", "--base-model", "someone/pico", "--out", str(out)]) == 0
    assert ModelCard((out / "README.md").read_text()).data.base_model == "someone/pico"
    assert crepe_deploy.verify(out).config["base_model"] == "someone/pico"
    again = ["prune", str(model), "--method", "magnitude", "--base-model", "no id", "--out", str(tmp_path / "again")]
    assert run(again) == 2 and not (tmp_path / "again").exists()


def test_the_folder_of_prune_has_a_card_that_can_be_refreshed(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    folder, text = tmp_path / "pruned", tmp_path / "text.txt"
    text.write_text(sample_text(2000), encoding="utf-8")
    manifest = crepe_deploy.prune(model, folder, method="magnitude")
    card = (folder / "README.md").read_text()
    assert ModelCard(card).data.pipeline_tag == "text-generation"
    assert "# model, pruned to 2:4 with magnitude" in card and str(tmp_path) not in card
    assert "README.md" in manifest.files and crepe_deploy.verify(folder) == manifest
    crepe_deploy.evaluate(folder, text=text, window=64, max_tokens=256, update_card=True)
    assert BEGIN in (folder / "README.md").read_text()
    crepe_deploy.verify(folder)
    crepe_deploy.export(folder, tmp_path / "packed", format="packed")
    assert BEGIN not in (tmp_path / "packed" / "README.md").read_text()


def test_a_gguf_card_says_how_llama_cpp_loads_and_serves_it(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = make_pico_llama(tmp_path / "model")
    crepe_deploy.export(model, tmp_path / "file", format="gguf")
    card = ModelCard((tmp_path / "file" / "README.md").read_text())
    assert card.data.library_name == "llama-cpp-python" and "gguf" in card.data.tags
    for words in (
        "llama-server -m MODEL/model.gguf",
        "llama-cli",
        "pip install llama-cpp-python",
        "Llama.from_pretrained",
    ):
        assert words in card.text
    assert (tmp_path / "file" / "model.gguf").is_file()
