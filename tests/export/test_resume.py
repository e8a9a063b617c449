"""A stopped `prune-and-export` goes on: what is pruned, healed and exported whole is not done again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.exporting import pipeline
from crepe_deploy.exporting.heal import Healing

from crepe_deploy.api.prune import prune_and_export
from crepe_deploy.device import CPU
from crepe_deploy.errors import ConfigError, OutputError
from crepe_deploy.healing.config import HealConfig
from crepe_deploy.healing.train import Trainer
from crepe_deploy.progress import hidden, unsaid
from crepe_deploy.pruning import prune as pruning
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import calibration_windows, load_tokenizer
from tests.pico import make_pico_llama

CALIBRATION: dict[str, Any] = {"calib_samples": 4, "calib_length": 32, "method": "wanda"}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }


def without_card(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if not name.endswith("README.md")}


class Stop:
    """Calls a function so many times, and is then a stop."""

    def __init__(self, function: Callable[..., Any], calls: int) -> None:
        self.function, self.left = function, calls

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.function(*arguments, **named)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("model") / "m")


def test_it_goes_on_from_every_stage(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, formats = tmp_path / "out", ["dense", "packed", "int8"]

    def export(out: Path, **more: Any) -> dict[str, Any]:
        return prune_and_export(model, out, format=formats, calib=text, **CALIBRATION, **more)

    whole = export(tmp_path / "whole")
    stages = [
        (pruning, "prune_block", 1),
        (pruning, "check_parity", 0),
        (pipeline, "with_greedy", 0),
        (pipeline, "run", 1),
        (pipeline, "run", 1),
        (pipeline, "_report", 0),
    ]
    for number, (place, name, calls) in enumerate(stages):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, Stop(getattr(place, name), calls))
            export(out, resume=number > 0)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.work", "whole"]
    with pytest.raises(OutputError, match="unfinished run"):
        export(out)
    for place, name in ((pruning, "prune_block"), (pipeline, "run")):
        monkeypatch.setattr(place, name, Stop(print, 0))
    report = export(out, resume=True)
    assert files(out) == files(tmp_path / "whole")
    assert report.keys() == whole.keys()
    assert report["formats"]["packed"]["size"] == whole["formats"]["packed"]["size"]
    assert sorted(path.name for path in out.iterdir()) == ["dense", "int8", "packed", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    for name in formats:
        verify(out / name)


def test_other_formats_may_be_asked_for_and_other_weights_may_not(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_report", Stop(print, 0))
        prune_and_export(model, out, format="packed,int8", calib=text, **CALIBRATION)
    with pytest.raises(ConfigError, match="its config is"):
        prune_and_export(model, out, format="packed", calib=text, **CALIBRATION | {"method": "ria"}, resume=True)
    with (tmp_path / "out.work" / "output" / "packed" / "config.json").open("a") as file:
        file.write(" ")  # damaged: to be written again
    monkeypatch.setattr(pruning, "prune_block", Stop(print, 0))
    prune_and_export(model, out, format="dense,packed", calib=text, **CALIBRATION, resume=True)
    assert sorted(path.name for path in out.iterdir()) == ["dense", "packed", "report.json"]
    verify(out / "packed")


def test_healing_goes_on_where_it_was_stopped(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = resolve_model(str(model)), prune_config("wanda")
    windows = calibration_windows(text, load_tokenizer(model), samples=4, length=32)
    budget = HealConfig(steps=6, learning_rate=1e-3, window=32, batch_tokens=128)
    healing = Healing(source, budget, [text], "text", hidden, unsaid, CPU)

    def export(out: Path, resume: bool = False) -> dict[str, Any]:
        return pipeline.prune_and_export(source, out, config, windows, healing=healing, resume=resume)

    whole = export(tmp_path / "whole")
    stops = [(Trainer, "_step", 3), (pipeline, "with_greedy", 0), (pipeline, "run", 0)]
    for number, (place, name, calls) in enumerate(stops):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stand_in, left = getattr(place, name), [calls]

            def stopping(*arguments: Any, stand_in: Any = stand_in, left: list[int] = left, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return stand_in(*arguments, **named)

            patch.setattr(place, name, stopping)
            export(tmp_path / "out", number > 0)
    assert (tmp_path / "out.work" / "pruned-healed").is_dir()
    report = export(tmp_path / "out", True)
    assert report["healed"]["steps"] == whole["healed"]["steps"] == budget.steps
    cards = [re.sub(rb", [0-9]+ s", b"", files(tmp_path / name).pop("dense/README.md")) for name in ("out", "whole")]
    assert cards[0] == cards[1]  # but for the seconds that it took
    assert without_card(tmp_path / "out") == without_card(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()
