"""The frame around every format: a new one is a class and a line, and takes its own options only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from crepe_deploy.exporting import registry
from crepe_deploy.exporting.frame.exporter import Exporter, Source, Words, Written
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from crepe_deploy.exporting.registry import EXPORTERS, build, exporter_class

from crepe_deploy.errors import ConfigError, ParityError
from crepe_deploy.progress import Meter
from crepe_deploy.pruning.config import PruneConfig, prune_config
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.pieces import Pieces
from crepe_deploy.store.readback import prove_written
from crepe_deploy.store.sources import read_license, resolve_model
from crepe_deploy.store.writing import CheckpointWriter, Planned
from tests.pico import make_pico_llama


@dataclass(frozen=True)
class Negative(Exporter[CheckpointReader]):
    """A toy: every weight times `factor`."""

    factor: str = "-1"

    name: ClassVar[str] = "negative"
    words: ClassVar[Words] = Words("It is the wrong way round.", tags=("toy",), done="negated")

    def check(self) -> None:
        if not self.factor.lstrip("-").isdigit():
            raise ConfigError(f"option factor '{self.factor}' is no number")

    def check_pruning(self, model: Path, config: PruneConfig) -> None:
        if str(config.pattern) == "1:4":
            raise ConfigError("a toy is not for 1:4")

    def plan(self, source: Source, weights: Path) -> CheckpointReader:
        return CheckpointReader(weights)

    def room(self, plan: CheckpointReader) -> int:
        return sum(info.size_bytes for info in plan)

    def steps(self, plan: CheckpointReader) -> int:
        return 2 * len(plan.tensors)

    def write(self, plan: CheckpointReader, folder: Path, tick: Meter, pieces: Pieces) -> Written:
        files = {info.name: Planned(info.file.name, info.dtype, info.shape) for info in plan}
        with CheckpointWriter(folder, files, pieces=pieces) as writer:
            for name in writer.pending:
                writer.write(name, plan.load(name) * int(self.factor))
                tick()
        return Written(fingerprints=writer.fingerprints)

    def compare(self, plan: CheckpointReader, written: Written, folder: Path, tick: Meter) -> Written:
        return dataclasses.replace(written, hashes=prove_written(folder, written.fingerprints, tick))

    def size(self, plan: CheckpointReader, folder: Path) -> Mapping[str, Any]:
        return {"weight_bytes_over_dense": 1.0, "file_bytes_over_dense": 1.0, "what": "as many as before"}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPORTERS, "negative", f"{__name__}:Negative")


CONFIG = prune_config("magnitude", "2:4")


def test_a_toy_format_exports_cards_and_verifies(tmp_path: Path) -> None:
    model = resolve_model(str(make_pico_llama(tmp_path / "model")))
    out = tmp_path / "out"
    report = prune_and_export(model, out, CONFIG, None, formats=["dense", "negative"], options={"factor": "-2"})
    assert report["formats"]["negative"]["weight_file_bytes"] == (out / "negative/model.safetensors").stat().st_size
    dense, negative = CheckpointReader(out / "dense"), CheckpointReader(out / "negative")
    assert all(bool((negative.load(name) == -2 * dense.load(name)).all()) for name in dense.tensors)
    manifest = verify(out / "negative")
    assert (manifest.format, manifest.stage) == ("negative", "export") and "greedy" in manifest.metrics
    card = (out / "negative" / "README.md").read_text()
    assert "It is the wrong way round." in card and "pruned to 2:4 with magnitude, negated" in card
    assert "toy" in yaml.safe_load(card.split("---")[1])["tags"]
    ticks: list[tuple[int, int]] = []
    export_checkpoint(out / "dense", tmp_path / "again", "negative", step=lambda done, of: ticks.append((done, of)))
    assert ticks[-1] == (len(ticks), len(ticks)) == (2 * len(dense.tensors),) * 2
    with pytest.raises(ConfigError, match="is a negative checkpoint; --format packed reads dense"):
        export_checkpoint(tmp_path / "again", tmp_path / "x", "packed")
    with pytest.raises(ConfigError, match="not for 1:4"):
        other = prune_config("magnitude", "1:4")
        prune_and_export(model, tmp_path / "x", other, None, formats=["negative"])
    assert not (tmp_path / "x").exists()


def test_options_are_checked_once_and_belong_to_a_format() -> None:
    assert build(["dense", "negative"], {"factor": "3"})[1] == Negative("3")
    with pytest.raises(ConfigError, match="option 'factor' is not for --format dense,packed: dense takes none"):
        build(["dense", "packed"], {"factor": "3"})
    with pytest.raises(ConfigError, match="factor 'x' is no number"):
        build(["negative"], {"factor": "x"})
    with pytest.raises(ConfigError, match=r"option 'precision'.*dense takes none"):
        export_checkpoint(Path("none"), Path("out"), "dense", options={"precision": "fp16"})


def test_every_line_of_the_registry_is_a_format_of_that_name() -> None:
    for name in registry.EXPORTERS:
        kind = exporter_class(name)
        assert kind.name == name and kind.words.truth
        assert all(isinstance(option.default, str) for option in dataclasses.fields(kind))


def test_what_is_on_disk_is_compared_with_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve_model(str(make_pico_llama(tmp_path / "model")))
    prune_and_export(model, tmp_path / "out", CONFIG, None)
    compare = Negative.compare

    def damaged(self: Negative, plan: CheckpointReader, written: Written, folder: Path, tick: Meter) -> Written:
        info = CheckpointReader(folder).info("model.layers.1.mlp.up_proj.weight")
        with info.file.open("r+b") as file:
            file.seek(info.offset + 5)
            file.write(b"\x55")
        return compare(self, plan, written, folder, tick)

    monkeypatch.setattr(Negative, "compare", damaged)
    with pytest.raises(ParityError, match=r"1\.mlp\.up_proj\.weight' on disk holds other bits.*negative\.failed"):
        export_checkpoint(tmp_path / "out" / "dense", tmp_path / "negative", "negative")
    assert not (tmp_path / "negative").exists() and (tmp_path / "negative.failed").is_dir()


@pytest.mark.parametrize(
    ("front", "recorded", "written"),
    [
        ("license: mit", "mit", "mit"),
        ("license: 'apache-2.0'", "apache-2.0", "apache-2.0"),
        ("license:\n- mit\n- bsd-3-clause", "mit, bsd-3-clause", ["mit", "bsd-3-clause"]),
        ("license: [gemma]", "gemma", "gemma"),
        ("license:", None, None),
        ("license: []", None, None),
        ("license: [mit", None, None),
        ("just words", None, None),
    ],
)
def test_a_licence_of_any_form_gives_a_card_that_parses(
    tmp_path: Path, front: str, recorded: str | None, written: Any
) -> None:
    model = make_pico_llama(tmp_path / "model", num_hidden_layers=1)
    (model / "README.md").write_text(f"---\n{front}\nlanguage: en\n---\n# A model\n")
    assert read_license(model) == recorded
    manifest = export_checkpoint(model, tmp_path / "out", "int8")
    assert manifest.source.license == recorded
    content = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert content.get("license") == written and content["tags"] == ["int8", "crepe-deploy"]
    assert read_license(tmp_path / "out") == recorded


def test_manifests_from_before_there_was_a_lineage_still_load(tmp_path: Path) -> None:
    model = resolve_model(str(make_pico_llama(tmp_path / "model")))
    prune_and_export(model, tmp_path / "out", CONFIG, None)
    folder = tmp_path / "out" / "dense"
    for path in (folder / "lineage").iterdir():
        path.unlink()
    (folder / "lineage").rmdir()
    content = json.loads((folder / "manifest.json").read_text())
    content["files"] = {name: digest for name, digest in content["files"].items() if not name.startswith("lineage/")}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert verify(folder).parent is not None
    export_checkpoint(folder, tmp_path / "packed", "packed")
    verify(tmp_path / "packed")
