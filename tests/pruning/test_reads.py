"""How often a run reads the weights: each read has its reason in `prune.py`, and there is no other."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from torch import Tensor

from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import load_tokenizer
from tests.pico import make_pico, make_pico_llama
from tests.pruning.test_prune import CONFIGS, windows
from tests.pruning.test_prune import text as text

RUNS: dict[str, dict[str, Any]] = {
    "no text": {"method": "magnitude"},
    "scores": {"method": "ria"},
    "solves, fed pruned": {"method": "sparsegpt"},
    "every step but allocation": {"recipe": "best"},
    "computing in another dtype": {"method": "ria", "reconstruct": "exact", "rescale": "logits", "dtype": "bfloat16"},
    "allocation": {"method": "wanda", "pattern": "16:32", "allocate": "error"},
    "allocation and every other step": {"recipe": "best", "allocate": "alpha"},
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each tensor is loaded and each file hashed, by folder and name."""
    counts: Counter[tuple[str, str]] = Counter()
    load, digest = CheckpointReader.load, hashlib.file_digest

    def counting_load(reader: CheckpointReader, name: str) -> Tensor:
        counts[reader.root.name, name] += 1
        return load(reader, name)

    def counting_digest(file: Any, name: str) -> Any:
        path = Path(f"/proc/self/fd/{file.fileno()}").readlink()
        counts[path.parent.name, path.name] += 1
        return digest(file, name)

    monkeypatch.setattr(CheckpointReader, "load", counting_load)
    monkeypatch.setattr(hashlib, "file_digest", counting_digest)
    return counts


def expected(folder: Path, label: str, in_blocks: int) -> dict[tuple[str, str], int]:
    """Blocks so often, the head once, what the embedding walk loads once more, and every weight file hashed once."""
    names = CheckpointReader(folder).tensors
    tensors = {name: in_blocks if ".layers." in name else 1 if "lm_head" in name else 2 for name in names}
    return {(label, name): count for name, count in tensors.items()} | {
        (label, path.name): 1 for path in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize("label", RUNS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_read_of_the_weights_is_one_that_is_needed(
    tmp_path: Path, text: Path, reads: Counter[tuple[str, str]], label: str, tied: bool
) -> None:
    model = make_pico_llama(tmp_path / "m", tie_word_embeddings=tied)
    config = prune_config(**RUNS[label])
    calibration = windows(model, text) if config.needs_text else None
    reads.clear()
    prune(resolve_model(str(model)), tmp_path / "out", config, calibration)
    weights = Counter({key: count for key, count in reads.items() if not key[1].endswith((".json", ".jinja"))})
    source = expected(model, "m", in_blocks=2 if "allocate" in RUNS[label] else 1)
    assert weights == Counter(source | expected(tmp_path / "out", "output", in_blocks=1))


def test_an_output_layer_that_config_calls_tied_is_read_as_any_other(
    tmp_path: Path, text: Path, reads: Counter[tuple[str, str]]
) -> None:
    """One that is stored all the same, and differs from the embedding: it is the model's."""
    untied = make_pico_llama(tmp_path / "untied")
    config = tf.AutoConfig.from_pretrained(untied)
    (tmp_path / "m").mkdir()
    for path in untied.iterdir():
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "m")
    reads.clear()
    prune(resolve_model(str(tmp_path / "m")), tmp_path / "out", prune_config("ria"), windows(untied, text))
    assert reads["m", "lm_head.weight"] == 1
    assert reads["output", "lm_head.weight"] == 1
    before, after = CheckpointReader(tmp_path / "m"), CheckpointReader(tmp_path / "out")
    assert before.load("lm_head.weight").equal(after.load("lm_head.weight"))


def test_shards_are_read_no_more_often(tmp_path: Path, text: Path, reads: Counter[tuple[str, str]]) -> None:
    single, model = make_pico(tmp_path / "single", CONFIGS["llama"]), tmp_path / "m"
    tf.AutoModelForCausalLM.from_pretrained(single).save_pretrained(model, max_shard_size="20KB")
    load_tokenizer(single).save_pretrained(model)
    reads.clear()
    prune(resolve_model(str(model)), tmp_path / "out", prune_config("ria"), windows(model, text))
    assert len(list(model.glob("*.safetensors"))) > 1
    for label, folder in (("m", model), ("output", tmp_path / "out")):
        for key, count in expected(folder, label, in_blocks=1).items():
            assert reads[key] == count
