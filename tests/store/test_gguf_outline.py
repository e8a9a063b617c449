"""`plan` and `inspect` of a GGUF file read its header: what they say is what the whole file says, without a weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from crepe_deploy.api.inspect import inspect
from crepe_deploy.api.plan import plan
from crepe_deploy.cli import run
from crepe_deploy.errors import CheckpointError
from crepe_deploy.machine import cache_dir
from crepe_deploy.model.gguf_outline import gguf_outline
from crepe_deploy.progress import unsaid
from crepe_deploy.store.checkpoint import CheckpointReader, read_config
from crepe_deploy.store.gguf import convert_gguf
from crepe_deploy.store.gguf_header import check_header
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("pico") / "pico")


@pytest.fixture
def file(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "pico.gguf", pico)


def cut(path: Path) -> Path:
    """The file up to the end of its table of tensors."""
    path.write_bytes(path.read_bytes()[: check_header(path).size])
    return path


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(2.0)
    writer.add_rope_scaling_orig_ctx_len(64)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [lambda _: None, yarn])
def test_the_outline_is_what_converting_makes(
    tmp_path: Path, parts: int, tied: bool, rope: Callable[[gguf.GGUFWriter], None]
) -> None:
    model = make_pico_llama(tmp_path / "model", tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", model, parts=parts, rope=rope)
    convert_gguf(path, tmp_path / "converted")
    with gguf_outline(path, unsaid) as folder:
        outlined, converted = (
            {name: (info.dtype, info.shape) for name, info in CheckpointReader(place).tensors.items()}
            for place in (folder, tmp_path / "converted")
        )
        assert outlined == converted
        configs = [read_config(place) for place in (folder, tmp_path / "converted")]
    for config in configs:
        config.pop("_name_or_path", None), config.pop("architectures", None)
    assert configs[0] == configs[1]
    assert plan(path) == {**plan(tmp_path / "converted"), "model": str(path)}


def test_a_file_cut_behind_its_header_is_planned_and_listed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = plan(file), inspect(file)
    cut(file)
    assert (plan(file), inspect(file)) == whole
    for command in (["plan", "--heal"], ["inspect"]):
        capsys.readouterr()
        assert run([command[0], str(file), *command[1:], "--json"]) == 0
        printed = capsys.readouterr()
        assert "is not whole yet" in printed.err and json.loads(printed.out)
    assert run(["inspect", str(file)]) == 0
    assert "Q8_0" in capsys.readouterr().out
    assert not cache_dir().exists()
    assert run(["prune", str(file), "--method", "magnitude", "--out", str(file.parent / "out")]) == 2
    assert "truncated" in capsys.readouterr().err


def test_a_file_cut_inside_its_header_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: check_header(file).size - 1])
    for command in (plan, inspect):
        with pytest.raises(CheckpointError, match="is damaged or truncated"):
            command(file)


def test_a_folder_that_holds_a_gguf_file_stands_for_it(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["prune", str(file), "--method", "magnitude", "--out", str(tmp_path / "pruned")]) == 0
    assert run(["export", str(tmp_path / "pruned"), "--format", "gguf", "--out", str(tmp_path / "exported")]) == 0
    for command, key in (("plan", "model"), ("inspect", "folder")):
        capsys.readouterr()
        assert run([command, str(tmp_path / "exported"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[key] == str(tmp_path / "exported" / "model.gguf")
    (tmp_path / "several").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "several" / name).write_bytes(file.read_bytes())
    assert run(["plan", str(tmp_path / "several")]) == 2
    assert "holds 2 GGUF files: name one of them" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [b"\xff" * 8, b"\x00" * 8])
def test_counts_in_the_table_that_no_model_has_are_refused(file: Path, entry: bytes) -> None:
    header = check_header(file)
    data = bytearray(file.read_bytes())
    data[header.size - 8 : header.size] = entry  # the last tensor's offset
    file.write_bytes(bytes(data))
    if entry[0]:
        with pytest.raises(CheckpointError, match="is damaged"):
            plan(file)
