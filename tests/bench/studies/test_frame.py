"""What the studies share: a pruned folder for a while, and results that are printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import click
from click.testing import CliRunner
from crepe_deploy.bench.studies import frame

from crepe_deploy.pruning.config import prune_config
from tests.pico import make_pico_llama


def test_a_pruned_folder_is_there_while_it_is_looked_at(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    with frame.pruned(model, prune_config("magnitude", "2:4"), None) as folder:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["metrics"]["sparsity_of_pruned_tensors"] == 0.5
    assert not folder.exists()


def test_results_are_shown_in_part_and_written_whole(tmp_path: Path) -> None:
    @click.command()
    @frame.folder_option("out/bench")
    @frame.out_option()
    @frame.assets_option
    def study(folder: Path, out: Path | None, assets_dir: Path) -> None:
        frame.say(f"{folder} {assets_dir}")
        frame.save({"a": 1, "b": 2}, out, {"a": 1})
        frame.publish("# page", out and out.with_suffix(".md"))

    out = tmp_path / "new" / "r.json"
    done = CliRunner().invoke(study, ["--out", str(out)])
    assert done.exit_code == 0 and done.stderr == "out/bench .cache/assets\n"
    assert done.stdout.startswith('{\n  "a": 1\n}\n') and json.loads(out.read_text()) == {"a": 1, "b": 2}
    assert out.with_suffix(".md").read_text() == "# page"
    assert CliRunner().invoke(study, []).exit_code == 0
