"""GGUF as it comes: whole, in parts, with parts or tensors missing, misnamed or changed."""

from __future__ import annotations

import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_deploy.errors import CheckpointError, UnsupportedModel
from crepe_deploy.store import sources
from crepe_deploy.store.checkpoint import CheckpointReader, read_config, same_bits
from crepe_deploy.store.gguf import check_gguf, convert_gguf
from crepe_deploy.store.gguf_rope import llama3_factor
from crepe_deploy.store.sources import resolve_model
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("pico") / "pico")


def split(pico: Path, folder: Path, parts: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    write_gguf(folder / "pico.gguf", pico, parts)
    return sorted(folder.glob("*.gguf"))


def test_all_parts_of_a_split_file_are_read_whichever_is_given(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = resolve_model(str(write_gguf(tmp_path / "whole.gguf", pico)))
    parts = split(pico, tmp_path / "parts")
    assert [part.name for part in parts] == [f"pico-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    models = [resolve_model(str(part)) for part in parts]
    assert len({model.folder for model in models}) == 1 and models[0].folder != whole.folder
    assert sorted(path.name for path in models[0].folder.iterdir()) == sorted(
        path.name for path in whole.folder.iterdir()
    )
    reader, other = CheckpointReader(models[0].folder), CheckpointReader(whole.folder)
    assert reader.tensors.keys() == other.tensors.keys()
    assert all(same_bits(reader.load(name), other.load(name)) for name in reader.tensors)
    config = [(model.folder / "config.json").read_text() for model in (models[0], whole)]
    assert config[0] == config[1]


def test_parts_that_are_not_there_are_named(pico: Path, tmp_path: Path) -> None:
    first, second, third = split(pico, tmp_path)
    second.unlink()
    for part in (first, third):
        with pytest.raises(CheckpointError, match=r"one of 3 parts.*pico-00002-of-00003.gguf is not beside it"):
            convert_gguf(part, tmp_path / "out")
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"part 1 of 3.*-00001-of-00003.gguf"):
        convert_gguf(renamed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_different_files_are_refused(pico: Path, tmp_path: Path) -> None:
    first, second, third = split(pico, tmp_path)
    shutil.copyfile(first, second)
    with pytest.raises(CheckpointError, match="does not say of itself that it is part 2 of 3"):
        check_gguf(first)
    split(pico, tmp_path / "again", parts=2)
    assert third.is_file()


@pytest.mark.parametrize("missing", ["blk.1.ffn_down.weight", "token_embd.weight", "output_norm.weight"])
def test_a_missing_tensor_is_refused_rather_than_made_up(pico: Path, tmp_path: Path, missing: str) -> None:
    path = write_gguf(tmp_path / "cut.gguf", pico, rename=lambda name: None if name == missing else name)
    with pytest.raises(CheckpointError, match="lacks weights that the model needs"):
        convert_gguf(path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output.weight"])
def test_a_misnamed_tensor_is_named(pico: Path, tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "odd.gguf", pico, rename=lambda each: "oddly.named" if each == name else each)
    with pytest.raises(CheckpointError, match=r"'oddly.named' is none that a 'llama' model of 2 blocks has"):
        convert_gguf(path, tmp_path / "out")


def test_what_older_versions_kept_is_not_used(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "pico.gguf", pico)
    old = sources.cache_dir() / "gguf" / sources.sha256_file(path)
    old.mkdir(parents=True)
    assert resolve_model(str(path)).folder != old


def _header(fields: bytes, count: int = 1, tensors: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields


def _field(kind: int, rest: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"x" + struct.pack("<I", kind) + rest


@pytest.mark.parametrize(
    "data",
    [
        _header(_field(9, struct.pack("<IQ", 8, 2**40))),
        _header(_field(9, struct.pack("<IQ", 0, 2**62))),
        _header(_field(9, struct.pack("<IQ", 9, 2**21) * 5)),
        _header(_field(9, struct.pack("<IQ", 9, 1) * 50)),
        _header(_field(8, struct.pack("<Q", 2**63))),
        _header(_field(13, b"")),
        _header(b"", 2**64 - 1),
        _header(b"", 0, 2**64 - 1),
        _header(struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**32 - 1), 0),
    ],
)
def test_counts_that_a_file_does_not_hold_are_refused_before_anything_is_made_of_them(
    tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged or truncated"):
        check_gguf(tmp_path / "m.gguf")


def test_conversions_that_were_killed_go_with_the_next_one(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "pico.gguf", pico)
    place = resolve_model(str(path)).folder.parent
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"{'a' * 64}.partial-{ended.pid}", f"{'b' * 64}.partial-{os.getpid()}", f"mine.partial-{ended.pid}"):
        (place / name).mkdir()
    resolve_model(str(path))
    left = {one.name for one in place.iterdir()} - {sources.sha256_file(path)}
    assert left == {f"{'b' * 64}.partial-{os.getpid()}", f"mine.partial-{ended.pid}"}


def _freqs(factors: list[float]) -> Callable[[gguf.GGUFWriter], None]:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_freq_base(500000.0)
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))

    return write


def _stretched(kind: str, factor: float, original: int = 0) -> Callable[[gguf.GGUFWriter], None]:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(factor)
        if original:
            writer.add_rope_scaling_orig_ctx_len(original)

    return write


def _frequencies(folder: Path) -> torch.Tensor:
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    assert isinstance(rotary.inv_freq, torch.Tensor)
    return rotary.inv_freq


def test_stretched_rotary_embeddings_are_converted_too(pico: Path, tmp_path: Path) -> None:
    half = 8  # the pico model's head size is 16
    plain = 500000.0 ** (-torch.arange(half) / half)
    factors = [llama3_factor(2 * math.pi / float(frequency), 8.0) for frequency in plain]
    assert factors[0] == 1.0 and factors[-1] == 8.0 and any(1.0 < factor < 8.0 for factor in factors)
    convert_gguf(write_gguf(tmp_path / "llama3.gguf", pico, rope=_freqs(factors)), tmp_path / "llama3")
    torch.testing.assert_close(_frequencies(tmp_path / "llama3"), plain / torch.tensor(factors))

    base = _frequencies(pico)
    convert_gguf(write_gguf(tmp_path / "linear.gguf", pico, rope=_stretched("linear", 4.0)), tmp_path / "linear")
    torch.testing.assert_close(_frequencies(tmp_path / "linear"), base / 4)
    convert_gguf(write_gguf(tmp_path / "yarn.gguf", pico, rope=_stretched("yarn", 4.0, 64)), tmp_path / "yarn")
    assert read_config(tmp_path / "yarn")["rope_parameters"] | {"rope_theta": 0} == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 0,
    }  # fmt: skip
    convert_gguf(write_gguf(tmp_path / "ones.gguf", pico, rope=_freqs([1.0] * half)), tmp_path / "ones")
    torch.testing.assert_close(_frequencies(tmp_path / "ones"), plain)


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        (_freqs([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), "rope_freqs.weight is not Llama 3.1's"),
        (_stretched("longrope", 4.0), "rope.scaling.type longrope.*not converted"),
        (_stretched("yarn", 4.0), "YaRN does not say the context"),
    ],
)
def test_rotary_embeddings_that_cannot_be_converted_are_refused(
    pico: Path, tmp_path: Path, rope: Callable[[gguf.GGUFWriter], None], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        check_gguf(write_gguf(tmp_path / "x.gguf", pico, rope=rope))
