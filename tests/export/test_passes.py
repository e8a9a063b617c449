"""How often the weights are read on the way from pruned to each format, counted by the operating system."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from crepe_deploy.exporting.frame import greedy
from crepe_deploy.exporting.frame.greedy import GREEDY_TOKENS, record_greedy
from crepe_deploy.exporting.frame.run import read_source, run
from crepe_deploy.exporting.pipeline import export_checkpoint
from crepe_deploy.exporting.registry import build

from crepe_deploy.model.decoder import Decoder
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.journal import open_journal
from crepe_deploy.store.manifest import load_manifest, save_manifest
from crepe_deploy.store.pieces import Pieces
from crepe_deploy.store.sources import resolve_model
from tests.pico import make_pico_llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of bytes read")


def bytes_read() -> int:
    """By this process through read calls, page cache included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def read_by(work: Callable[[], object]) -> int:
    before = bytes_read()
    work()
    return bytes_read() - before


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in CheckpointReader(folder).files)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 MB of weights, beside which configuration and tokenizer are small; its greedy prompt is recorded."""
    folder = tmp_path_factory.mktemp("passes")
    model = make_pico_llama(folder / "model", hidden_size=256, intermediate_size=1024, vocab_size=1024)
    prune(resolve_model(str(model)), folder / "pruned", prune_config("magnitude", "2:4"), None)
    manifest = load_manifest(folder / "pruned")
    save_manifest(folder / "pruned", greedy.with_greedy(folder / "pruned", manifest))
    export_checkpoint(folder / "pruned", folder / "warm", "int8")  # modules are imported once, and not counted
    return folder / "pruned"


@pytest.mark.parametrize(("name", "source", "own"), [("dense", 2, 1), ("packed", 2, 1), ("int8", 2, 1)])
def test_an_export_reads_its_source_twice_and_its_output_once(
    tmp_path: Path, pruned: Path, name: str, source: int, own: int
) -> None:
    """The source: for its hashes, and to be written from. The output: for bits, zeros and hashes at once."""
    read = read_by(lambda: export_checkpoint(pruned, tmp_path / "out", name))
    expected = source * weight_bytes(pruned) + own * weight_bytes(tmp_path / "out")
    assert expected <= read < 1.05 * expected


@pytest.mark.parametrize(("name", "source", "own"), [("dense", 0, 1), ("packed", 1, 1), ("int8", 1, 1)])
def test_after_pruning_the_hashes_are_fresh(tmp_path: Path, pruned: Path, name: str, source: int, own: int) -> None:
    """What `prune-and-export` does for each format; dense is linked, and read once for zeros and hashes at once."""
    (exporter,) = build([name])
    (tmp_path / "out").mkdir()
    pieces = Pieces(open_journal(tmp_path / "journal", {}, resume=False), name)
    read = read_by(lambda: run(exporter, read_source(exporter, pruned, fresh=True), tmp_path / "out", pieces))
    expected = source * weight_bytes(pruned) + own * weight_bytes(tmp_path / "out")
    assert expected <= read < 1.08 * expected


def test_the_greedy_prompt_reads_a_small_model_once(pruned: Path) -> None:
    record_greedy(pruned)
    read = read_by(lambda: record_greedy(pruned))
    assert weight_bytes(pruned) <= 1.0001 * read and read < 1.05 * weight_bytes(pruned)


def test_blocks_beyond_what_is_kept_are_read_for_every_token(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = record_greedy(pruned)
    decoder = Decoder(pruned)
    sizes = [
        sum(decoder.reader.info(key).size_bytes for key in decoder.block_keys(index))
        for index in range(len(decoder.blocks))
    ]
    monkeypatch.setattr(greedy, "KEPT_BYTES", sizes[0])
    again: list[object] = []
    read = read_by(lambda: again.append(record_greedy(pruned)))
    assert again == [whole]
    expected = weight_bytes(pruned) + (GREEDY_TOKENS - 1) * sum(sizes[1:])
    assert 0.999 * expected < read < 1.05 * expected
