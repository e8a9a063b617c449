"""Lineage: the parent of every exported folder lies in it, as do its own, however long the way was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from crepe_deploy.exporting.structural.assemble import assemble

from crepe_deploy.errors import VerifyError
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.manifest import ancestors, hash_folder, load_manifest, save_manifest, sha256_file, verify
from crepe_deploy.store.sources import resolve_model
from tests.export.sliced import EVEN, assembled, plans_for
from tests.export.test_bitmask24 import orphan
from tests.pico import make_pico_llama
from tests.structural.random_plans import UNEVEN, Kept

CONFIG = prune_config("magnitude", "2:4")

SMALLER: tuple[Kept, ...] = ((1, 2, 16),) * 3


def chain(folder: Path, sources: int = 1) -> list[tuple[str, str]]:
    """Stage and format of a verified folder and of all before it, each found by the hash that the next one names."""
    manifest = verify(folder)
    line = [manifest, *ancestors(folder, manifest)]
    for child in line[:-1]:
        assert child.parent is not None
        path = folder / "lineage" / f"{child.parent}.json"
        assert sha256_file(path) == child.parent and manifest.files[f"lineage/{child.parent}.json"] == child.parent
    assert line[-1].parent is None and len({member.source.id for member in line}) == sources
    assert len(list((folder / "lineage").glob("*"))) == len(line) - 1
    return [(manifest.stage, manifest.format) for manifest in line]


def test_over_dense_packed_and_dense_again(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    prune(resolve_model(str(model)), tmp_path / "pruned", CONFIG, None)
    export_checkpoint(tmp_path / "pruned", tmp_path / "dense", "dense")
    export_checkpoint(tmp_path / "dense", tmp_path / "packed", "packed")
    shutil.rmtree(tmp_path / "pruned")
    shutil.rmtree(tmp_path / "dense")
    export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    line = [("export", "dense"), ("export", "packed"), ("export", "dense"), ("prune", "dense")]
    assert chain(tmp_path / "packed") == line[1:]
    assert chain(tmp_path / "back") == line
    export_checkpoint(tmp_path / "back", tmp_path / "int8", "int8")
    assert chain(tmp_path / "int8") == [("export", "int8"), *line]


def test_prune_and_export_keeps_the_manifest_that_its_formats_come_from(tmp_path: Path) -> None:
    model = resolve_model(str(make_pico_llama(tmp_path / "model")))
    formats = ["dense", "packed", "int8"]
    prune_and_export(model, tmp_path / "out", CONFIG, None, formats=formats)
    for name in formats:
        assert chain(tmp_path / "out" / name) == [("export", name), ("prune", "dense")]
    assert len({load_manifest(tmp_path / "out" / name).parent for name in formats}) == 1


def test_a_graph_too(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = make_pico_llama(tmp_path / "model")
    prune(resolve_model(str(model)), tmp_path / "pruned", CONFIG, None)
    export_checkpoint(tmp_path / "pruned", tmp_path / "packed", "packed")
    export_checkpoint(tmp_path / "packed", tmp_path / "onnx", "onnx")
    assert chain(tmp_path / "onnx") == [("export", "onnx"), ("export", "packed"), ("prune", "dense")]


def test_structural_pruning_and_the_decilm_layout(tmp_path: Path) -> None:
    out, _ = assembled(tmp_path, "llama", UNEVEN, "per-layer")
    assert verify(out).parent is None and not (out / "lineage").exists()  # of a model that was made elsewhere
    export_checkpoint(out, tmp_path / "deci", "deci")
    assert chain(tmp_path / "deci") == [("export", "deci"), ("structural", "dense")]


def test_structural_pruning_of_what_was_made_here(tmp_path: Path) -> None:
    first, _ = assembled(tmp_path, "llama", EVEN, "uniform")
    assemble(resolve_model(str(first)), plans_for(first, SMALLER), tmp_path / "second", widths="uniform")
    assert chain(tmp_path / "second", sources=2) == [("structural", "dense"), ("structural", "dense")]
    config = first / "config.json"
    config.write_text(config.read_text() + "\n")  # changed since: its manifest is no longer about what is there
    assemble(resolve_model(str(first)), plans_for(first, SMALLER), tmp_path / "third", widths="uniform")
    assert verify(tmp_path / "third").parent is None


def test_an_imported_bitmask_checkpoint(tmp_path: Path) -> None:
    source = orphan(tmp_path)
    export_checkpoint(source, tmp_path / "packed", "packed")
    assert chain(tmp_path / "packed") == [("export", "packed"), ("import", "dense")]
    assert (
        load_manifest(tmp_path / "packed").source.files
        == ancestors(tmp_path / "packed", load_manifest(tmp_path / "packed"))[0].source.files
    )


def test_a_lineage_that_does_not_match_is_refused(tmp_path: Path) -> None:
    model = resolve_model(str(make_pico_llama(tmp_path / "model")))
    prune_and_export(model, tmp_path / "out", CONFIG, None)
    folder = tmp_path / "out" / "dense"
    export_checkpoint(folder, tmp_path / "packed", "packed")
    first, second = load_manifest(tmp_path / "packed").parent, load_manifest(folder).parent
    path = tmp_path / "packed" / "lineage" / f"{second}.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"stage": "prune"', b'"stage": "other"'))
    with pytest.raises(VerifyError, match=rf"{second}\.json differs from its sha256"):
        verify(tmp_path / "packed")
    rehash(tmp_path / "packed")
    with pytest.raises(VerifyError, match=rf"{second}\.json is another manifest than its name says"):
        verify(tmp_path / "packed")
    path.unlink()
    rehash(tmp_path / "packed")
    with pytest.raises(VerifyError, match=rf"{second}\.json is missing: it is the parent"):
        verify(tmp_path / "packed")
    (tmp_path / "packed" / "lineage" / f"{first}.json").unlink()
    with pytest.raises(VerifyError, match=rf"{first}\.json is in the manifest and missing on disk"):
        verify(tmp_path / "packed")


def rehash(folder: Path) -> None:
    save_manifest(folder, load_manifest(folder).model_copy(update={"files": hash_folder(folder)}))
