"""What healing gives for its steps, for masks and for narrowed models: a study in pieces, each run on its own.

    python -m crepe_deploy.bench.studies.heal --list
    python -m crepe_deploy.bench.studies.heal --cell 16:32@200 --seed 0 [--tasks DIR]
    python -m crepe_deploy.bench.studies.heal --render healing.md

A cell is a pruned model healed for so many steps (`heal_cells.py`), each budget a run of its own, for the learning rate
falls with it. Steps decide, not the clock: a busy machine measures the same quality, and processor time, taken in the
same run, says how long that is on an idle one. Each cell is added to the results file as it ends. A cell may be stopped
anywhere: the same command goes on with what `--folder` holds.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ...quality.perplexity import evaluate
from ...quality.zeroshot import find_task_file, zero_shot
from ...store.manifest import load_manifest
from ...store.reading import read_object
from ...store.work import JOURNAL, work_folder
from ..assets import MODEL_NAME, Assets, ensure_assets
from ..run.environment import load_average, record_environment
from ..run.processes import Finished, crepe_deploy
from . import heal_cells
from .frame import assets_option, folder_option, out_option, publish, say
from .grid import Cell, ResultsFile, text_record
from .heal_cells import NARROWED, ZERO_SHOT, Piece, figures, listed, parse
from .heal_table import TASKS, TEXTS, markdown


class Study:
    """Where models are made and measured. sizes: of what is scored. tasks: the folder of task files."""

    def __init__(self, assets: Assets, folder: Path, sizes: dict[str, int], tasks: Path | None) -> None:
        self.assets, self.folder, self.sizes, self.tasks = assets, folder, sizes, tasks
        self.runs: list[dict[str, Any]] = []  # of the cell that is measured

    def conditions(self) -> dict[str, Any]:
        """What cells have in common."""
        starts = {name: " ".join(start.command) for name, start in heal_cells.STARTS.items()}
        return {
            "model": MODEL_NAME,
            NARROWED: " ".join(heal_cells.NARROWING.command),
            "trained_on": [text_record(self.assets.text(name, "train")) for name in TEXTS],
            "scored_on": [text_record(self.assets.text(name)) for name in TEXTS],
            "starts": starts,
            **self.sizes,
        }

    def measure(self, piece: Piece, seed: int) -> Cell:
        """Make what is missing of a piece, score it, and say what that took and where it ran."""
        self.runs, load = [], load_average()
        began, spent = time.monotonic(), time.process_time()
        model = self.model(piece, seed)
        found = self.answers(model) if piece.kind == ZERO_SHOT else {"perplexity": self.scores(model)}
        healed = load_manifest(model).config["healed"] if piece.steps else None
        cpu = time.process_time() - spent + sum(run["cpu_seconds"] for run in self.runs)
        environment = record_environment(torch.get_num_threads(), load, {}).model_dump(mode="json")
        self._tidy(piece, seed)
        return {
            "seed": seed,
            "steps": piece.steps,
            **found,
            "held_out_kl": healed["held_out_kl"] if healed else None,
            "best_step": healed["steps"] if healed else None,
            "step_cpu_seconds": next((run["step_cpu_seconds"] for run in self.runs if run["what"] == "heal"), None),
            "cpu_seconds": round(cpu, 1),
            "seconds": round(time.monotonic() - began, 1),
            "runs": self.runs,
            "environment": environment,
        }

    def scores(self, model: Path) -> dict[str, Any]:
        """Perplexity on each text, by its name."""
        window, tokens = self.sizes["window"], self.sizes["max_tokens"]
        reports = {name: evaluate(model, self.assets.text(name), window=window, max_tokens=tokens) for name in TEXTS}
        return {name: vars(report.perplexity) for name, report in reports.items()}

    def answers(self, model: Path) -> dict[str, Any]:
        """Zero-shot figures by task, and the files that they are of. Raises ConfigError."""
        assert self.tasks is not None
        report = zero_shot(model, list(TASKS), task_dir=self.tasks, limit=self.sizes["documents"]).to_dict()
        files = [text_record(find_task_file(self.tasks, task), task) for task in TASKS]
        return {"tasks": {task: one["metrics"] for task, one in report["tasks"].items()}, "task_files": files}

    def model(self, piece: Piece, seed: int) -> Path:
        """The folder of a piece's model, made where it is missing; what was stopped goes on."""
        place = self.place(piece, seed)
        if not piece.steps:
            start = heal_cells.STARTS[piece.start]
            return self._pruned(place, self.dense(piece), start.command, ("--seed", str(seed)))
        if not place.is_dir():
            pruned = self.model(Piece(piece.model, piece.start, 0), seed)
            first = _step(place)
            done = self._run(
                place, "heal", str(pruned), "--dense", str(self.dense(piece)), *self._texts("--text"),
                "--steps", str(piece.steps), "--seed", str(seed),
            )  # fmt: skip
            here = piece.steps - first  # behind a stop, only this part's
            self.runs[-1]["step_cpu_seconds"] = round(done.cpu_seconds / here, 2) if here else None
        return place

    def dense(self, piece: Piece) -> Path:
        """What a piece's model comes from: SmolLM2, or what was narrowed of it."""
        if piece.model != NARROWED:
            return self.assets.model
        return self._pruned(self.folder / NARROWED, self.assets.model, heal_cells.NARROWING.command, ())

    def place(self, piece: Piece, seed: int) -> Path:
        """Where a piece's model lies."""
        name = f"{piece.model} {piece.start} {piece.steps} {seed}".strip()
        return self.folder / "".join(one if one.isalnum() else "-" for one in name)

    def made(self, piece: Piece, seed: int) -> bool:
        """Whether it lies there."""
        return self.place(piece, seed).is_dir()

    def begun(self, piece: Piece, seed: int) -> bool:
        """Whether what was stopped of it can go on."""
        return _begun(self.place(piece, seed))

    def _pruned(self, place: Path, dense: Path, command: tuple[str, ...], more: tuple[str, ...]) -> Path:
        if not place.is_dir():
            self._run(place, command[0], str(dense), *command[1:], *self._texts("--calib"), *more)
        return place / "dense" if command[0] == "tyr" else place

    def _run(self, out: Path, *command: str) -> Finished:
        going_on = _begun(out)
        done = crepe_deploy(*command, "--out", str(out), *(["--resume"] if going_on else []))
        self.runs.append({
            "what": command[0], "cpu_seconds": round(done.cpu_seconds, 1), "seconds": round(done.seconds, 1),
            "peak_bytes": done.peak_bytes, "went_on": going_on,
        })  # fmt: skip
        return done

    def _texts(self, option: str) -> list[str]:
        return [part for name in TEXTS for part in (option, str(self.assets.text(name, "train")))]

    def _tidy(self, piece: Piece, seed: int) -> None:
        """Remove what no other cell starts from."""
        if piece.steps not in (0, heal_cells.STEPS[-1]):
            shutil.rmtree(self.place(piece, seed))


def _begun(out: Path) -> bool:
    return (work_folder(out) / JOURNAL).is_file()


def _step(out: Path) -> int:
    """The step that a stopped healing goes on from."""
    return max((int(path.name.removeprefix("step-")) for path in work_folder(out).glob("step-[0-9]*")), default=0)


@click.command()
@click.option("--cell", "cells", multiple=True, metavar="NAME", help="Measure it, unless it was; give several.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--list", "as_list", is_flag=True, help="Say of every cell whether it is done, and what it costs.")
@click.option("--render", type=click.Path(path_type=Path), default=None, help="Write the tables of what is done.")
@click.option("--tasks", type=click.Path(path_type=Path), default=None, help="Task files, for zero-shot cells.")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True)
@click.option("--max-tokens", type=click.IntRange(2), default=6144, show_default=True)
@click.option("--documents", type=click.IntRange(1), default=500, show_default=True, help="Of each task.")
@folder_option("out/bench/heal")
@out_option("bench/results/heal.json")
@assets_option
def main(
    cells: tuple[str, ...], seed: int, as_list: bool, render: Path | None, tasks: Path | None, folder: Path, out: Path,
    assets_dir: Path, **sizes: int,
) -> None:  # fmt: skip
    """Measure cells, list them, or write the tables."""
    wanted = [parse(name) for name in cells]
    if any(piece.kind == ZERO_SHOT for piece in wanted) and tasks is None:
        raise click.UsageError("zero-shot cells need --tasks DIR, the folder of the task files")
    if not (wanted or as_list or render):
        raise click.UsageError("give --cell NAME, --list or --render FILE")
    study = Study(ensure_assets(assets_dir), folder, sizes, tasks)
    for piece in wanted:
        _measure(study, piece, seed, out)
    if as_list:
        known = read_object(out)["cells"] if out.is_file() else {}
        click.echo("\n".join(listed(known, study.made, study.begun)))
    if render is not None:
        publish(markdown(read_object(out)), render)


def _measure(study: Study, piece: Piece, seed: int, out: Path) -> None:
    command = f"python -m crepe_deploy.bench.studies.heal --cell {piece.name} --seed {seed}"
    file = ResultsFile(out, study.conditions(), command + (" --tasks TASKS" if piece.kind == ZERO_SHOT else ""))
    if piece.kind == ZERO_SHOT:
        file.once(f"dense {ZERO_SHOT}", lambda: study.answers(study.dense(piece)))
    else:
        file.once(f"dense {piece.model}".strip(), lambda: study.scores(study.dense(piece)))
    cell, state = file.cell(piece.label, piece.steps, seed, partial(study.measure, piece, seed))
    say(f"{piece.name}, seed {seed}: {figures(cell)}, {state}")


if __name__ == "__main__":
    main()
