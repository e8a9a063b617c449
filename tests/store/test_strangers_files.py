"""What a stranger's folder may hold, and what of it is read, passed on or refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crepe_deploy.cli import run
from crepe_deploy.errors import CheckpointError, UnsupportedModel, VerifyError
from crepe_deploy.store import manifest
from crepe_deploy.store.audit import inspect_folder
from crepe_deploy.store.checkpoint import DTYPES, INDEX_NAME, UNREAD, CheckpointReader
from crepe_deploy.store.companions import companions_of, copy_companions
from tests.pico import make_pico_llama

PRUNE = ("--method", "magnitude")


def one_tensor(path: Path, dtype: str, size: int) -> Path:
    """A safetensors file of eight values, `size` bytes, as another writer writes it."""
    header = json.dumps({"t": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(size)))
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_that_torch_has_is_read_and_counted(tmp_path: Path, dtype: str) -> None:
    one_tensor(tmp_path / "model.safetensors", dtype, 8 * DTYPES[dtype].itemsize)
    reader = CheckpointReader(tmp_path)
    assert reader.load("t").dtype == DTYPES[dtype] and reader.load("t").shape == (2, 4)
    (row,) = inspect_folder(tmp_path)
    assert row["zeros"] == int((reader.load("t").to(torch.complex128) == 0).sum())


@pytest.mark.parametrize("dtype", UNREAD)
def test_dtypes_that_torch_has_not_are_named_and_not_called_damage(tmp_path: Path, dtype: str) -> None:
    one_tensor(tmp_path / "model.safetensors", dtype, 4)
    with pytest.raises(UnsupportedModel, match=f"tensor 't' is {dtype}, a dtype that is not read"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("old_shards", [True, False])
def test_the_single_file_goes_before_a_stale_index(tmp_path: Path, old_shards: bool) -> None:
    model = make_pico_llama(tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    name = "model-00001-of-00001.safetensors"
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    if old_shards:
        save_file({key: torch.zeros_like(value) for key, value in weights.items()}, model / name)
    reader = CheckpointReader(model)
    assert [path.name for path in reader.files] == ["model.safetensors"]
    assert all(torch.equal(reader.load(key), value) for key, value in weights.items())
    assert run(["prune", str(model), *PRUNE, "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]


def test_folders_without_any_tensor_are_no_models(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="hold no tensors"):
        CheckpointReader(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="names no file"):
        CheckpointReader(tmp_path)


PASSED_ON = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "qwen.tiktoken", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENCE.md",
    "NOTICE", "USE_POLICY.md", "LICENSE-MIT", "COPYING", "additional_chat_templates/tool.jinja",
)  # fmt: skip
LEFT = (
    "evil.pkl", "evil.so", "evil.sh", "weights.npy", "tokenizer.py", "tokenizer.so", "vocab.pkl", "LICENSE.py",
    "modeling.py", "pytorch_model.bin", "optimizer.pt", "README.md", "manifest.json", ".hidden", "training_args.bin",
    "additional_chat_templates/run.py", "runs/events.json", "notes.txt",
)  # fmt: skip


def test_what_is_known_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, out = make_pico_llama(tmp_path / "m"), tmp_path / "out"
    for name in (*PASSED_ON, *LEFT):
        (source / name).parent.mkdir(exist_ok=True)
        if not (source / name).exists():
            (source / name).write_text("{}")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoTokenizer": ["x.X", None]}})
    )
    out.mkdir()
    copy_companions(source, out)
    copied = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert copied == {"config.json", *PASSED_ON}
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_links_out_of_the_folder_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_pico_llama(tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    assert run(["prune", str(source), *PRUNE, "--out", str(tmp_path / "out")]) == 2
    assert "outside the model folder; refused" in capsys.readouterr().err
    (source / "LICENSE").unlink()
    os.mkfifo(source / "NOTICE")
    with pytest.raises(CheckpointError, match="not a regular file"):
        companions_of(source)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    make_pico_llama(snapshot)
    blobs.mkdir()
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert run(["prune", str(snapshot), *PRUNE, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ours")
    assert run(["prune", str(make_pico_llama(root / "m")), *PRUNE, "--out", str(root / "pruned")]) == 0
    return root / "pruned"


def copied(folder: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(folder, target)
    return target


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (link, "outside the model folder"),
        (lambda folder: (folder / "x").symlink_to("/nonexistent"), "outside the model folder"),
        (lambda folder: os.mkfifo(folder / "x"), "neither a file nor a folder"),
        (lambda folder: (folder / "x").mkdir(), "an empty folder"),
        (lambda folder: (folder / "x").write_text(""), "not in the manifest"),
        (lambda folder: (folder / "a" / ".cache" / "huggingface").mkdir(parents=True), "an empty folder"),
    ],
)
def test_verify_notices_everything_that_no_manifest_names(tmp_path: Path, ours: Path, spoil, word: str) -> None:  # type: ignore[no-untyped-def]
    folder = copied(ours, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(VerifyError, match=word):
        manifest.verify(folder)


def test_names_outside_the_folder_are_refused(tmp_path: Path, ours: Path) -> None:
    folder = copied(ours, tmp_path / "copy")
    (tmp_path / "outside").write_text("")
    record = json.loads((folder / "manifest.json").read_text())
    record["files"]["../outside"] = manifest.sha256_file(tmp_path / "outside")
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(VerifyError, match="outside"):
        manifest.verify(folder)


def test_what_the_hubs_download_adds_is_left_alone(tmp_path: Path, ours: Path) -> None:
    folder = copied(ours, tmp_path / "copy")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "download" / "config.json.metadata").write_text("")
    assert run(["verify", str(folder)]) == 0
    for format in ("dense", "packed"):
        assert run(["export", str(folder), "--format", format, "--out", str(tmp_path / format)]) == 0
        assert not any(path.name.startswith(".") for path in (tmp_path / format).iterdir())


def test_pruning_a_folder_of_ours_names_it_as_parent(tmp_path: Path, ours: Path) -> None:
    out = tmp_path / "again"
    assert run(["prune", str(ours), *PRUNE, "--sparsity", "1:4", "--out", str(out)]) == 0
    record = manifest.verify(out)
    assert record.parent == manifest.sha256_file(ours / "manifest.json")
    assert (out / "lineage" / f"{record.parent}.json").is_file()


@pytest.mark.parametrize("content", ["{}", "no json", '{"schema_version": 9}'])
def test_a_foreign_manifest_is_no_parent(tmp_path: Path, content: str) -> None:
    source = make_pico_llama(tmp_path / "m")
    (source / "manifest.json").write_text(content)
    assert run(["prune", str(source), *PRUNE, "--out", str(tmp_path / "out")]) == 0
    assert manifest.verify(tmp_path / "out").parent is None
