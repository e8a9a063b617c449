"""`plan` of a model on the hub: its configuration and the headers of its weight files, and not the weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from crepe_deploy.api.plan import plan
from crepe_deploy.cli import run
from crepe_deploy.errors import CheckpointError
from tests.hub import hub
from tests.pico import make_pico_llama


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A hub with models, whole and in shards, and what it sent."""
    wide = {"hidden_size": 256, "intermediate_size": 1024}
    make_pico_llama(tmp_path / "models" / "someone" / "pico", torch.bfloat16, **wide)
    shards = make_pico_llama(tmp_path / "models" / "someone" / "shards", torch.bfloat16, **wide)
    cut(shards)
    with hub(tmp_path / "models") as (address, counted):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace("https://huggingface.co", address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)
        yield counted


def cut(folder: Path) -> None:
    """Save a model again, in shards."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", ["pico", "shards"])
def test_no_weight_is_fetched(sent: Counter[str], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "models" / "someone" / name
    here = plan(folder)
    there = plan(f"someone/{name}")
    assert there.pop("model") == f"someone/{name}" and here.pop("model") == str(folder)  # type: ignore[misc]
    assert there == here
    read = {path.name: sent[path.name] for path in folder.glob("*.safetensors")}
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert all(0 < read[file] <= 100_001 for file in read)  # what huggingface_hub asks for at once
    assert sum(read.values()) < sum(sizes.values()) / 2
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_weights_that_are_here_are_not_asked_for(
    sent: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["prune", "someone/shards", "--method", "magnitude", "--out", str(tmp_path / "out")]) == 0
    sent.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert plan("someone/shards")["prunable_tensors"] > 0
    assert not sent


DEEP = "[" * 100_000 + "]" * 100_000
ENTRIES = [
    '{"dtype": "BF16", "shape": [4], "data_offsets": ["a", "b"]}',
    '{"dtype": "BF16", "shape": [4], "data_offsets": [0, -8]}',
    '{"dtype": "BF16", "shape": [4], "data_offsets": [0, 1e30]}',
    f'{{"dtype": "BF16", "shape": [4], "data_offsets": [0, {10**30}]}}',
    f'{{"dtype": "BF16", "shape": [4], "data_offsets": [0, {10**17}]}}',
    '{"dtype": "BF16", "shape": [4], "data_offsets": []}',
    '{"dtype": "BF16", "shape": [4], "data_offsets": null}',
    '{"dtype": "BF16", "shape": "four", "data_offsets": [0, 8]}',
    '{"dtype": "BF16", "shape": ["a", "b"], "data_offsets": [0, 8]}',
    '{"dtype": 7, "shape": [4], "data_offsets": [0, 8]}',
    '{"dtype": "BF16"}',
    "7",
    "null",
    DEEP,
    "9" * 6000,
]


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry[:60] for entry in ENTRIES])
def test_a_header_on_the_hub_is_read_as_one_on_the_disk(sent: Counter[str], tmp_path: Path, entry: str) -> None:
    header = f'{{"model.embed_tokens.weight": {entry}}}'.encode()
    weights = tmp_path / "models" / "someone" / "pico" / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match="someone/pico"):
        plan("someone/pico")
    assert sent


def test_what_is_refused_names_the_model(
    sent: Counter[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "someone" / "pico"
    weights = (folder / "model.safetensors").read_bytes()
    for spoilt in (b"\xff" * 100, weights[:8] + b"[" + weights[9:], b"short"):
        (folder / "model.safetensors").write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="someone/pico"):
            plan("someone/pico")
    (folder / "model.safetensors").unlink()
    assert run(["plan", "someone/pico", "--json"]) == 2
    assert "the hub did not give it" in json.loads(capsys.readouterr().out)["error"]
    (folder / "config.json").unlink()
    assert run(["plan", "someone/pico", "--revision", "0" * 40]) == 2
    assert sent
