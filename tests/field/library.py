"""The library's frame: an input is a function that makes it, and what every command must answer to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.pico import QUICK_TYR, sample_text

Make = Callable[[Path], Path]
Command = Callable[[Path, Path], list[str]]
LIKE_PRUNE = ("prune_and_export", "tyr", "search")  # refused as `prune` is, where nothing else is said
WORKS = ""  # the answer of a command that must work though another that it is like must not
NO_EXPERTS = "has no experts that are known"
FORMATS = ("dense", "packed", "int8", "onnx", "deci", "gguf")


@dataclass(frozen=True)
class Case:
    """An input and what it meets. refused: as in `case`."""

    make: Make
    refused: Mapping[str, str]

    def answer(self, command: str) -> str | None:
        """A word of the refusal that `command` must give; None where it must work."""
        like = "prune" if command in LIKE_PRUNE else command
        found = self.refused.get(command, self.refused.get(like, self.refused.get("*")))
        return None if found == WORKS else found


CASES: dict[str, Case] = {}


def case(**refused: str) -> Callable[[Make], Make]:
    """Add a maker: it gets an empty folder to work in and returns the path that commands are given.

    refused: command, "export_FORMAT" or "export" for every format, or "every" -> a word of the one line that refuses
    it, exit code 2, or exit code 1 where it begins with "1: ". A command not named must work.
    """
    spelled = {"*" if name == "every" else name: word for name, word in refused.items()}
    spelled.setdefault("experts", spelled.get("*", spelled.get("prune", NO_EXPERTS)))
    for name in [f"export_{format}" for format in FORMATS if "export" in spelled]:
        spelled.setdefault(name, spelled["export"])

    def add(make: Make) -> Make:
        assert make.__name__ not in CASES
        CASES[make.__name__] = Case(make, spelled)
        return make

    return add


def _text(work: Path) -> str:
    path = work.parent / f"{work.name}.txt"
    path.write_text(sample_text(1500, seed=1))
    return str(path)


def _calibration(work: Path) -> list[str]:
    return ["--calib", _text(work), "--calib-samples", "2", "--calib-length", "16"]


def _tyr(model: Path, work: Path) -> list[str]:
    few = [*QUICK_TYR, "--search-samples", "1"]
    return ["tyr", str(model), *_calibration(work), *few, "--out", str(work / "out")]


def _search(model: Path, work: Path) -> list[str]:
    few = ["--evaluations", "6", "--fit", "3", "--finalists", "1", "--workers", "1", "--kernels", "3,5"]
    text = ["--text", _text(work), "--text-samples", "1", "--text-length", "16"]
    return ["search", str(model), *_calibration(work), *text, *few, "--out", str(work / "preset.json")]


def _bench(model: Path, work: Path) -> list[str]:
    few = ["--engine", "transformers", "--points", "1x8+2", "--rounds", "1"]
    return ["bench", str(model), *few, "--out", str(work / "run.json")]


def _export(format: str) -> Command:
    return lambda model, work: ["export", str(model), "--format", format, "--out", str(work / "out")]


COMMANDS: dict[str, Command] = {
    "inspect": lambda model, _: ["inspect", str(model), "--json"],
    "verify": lambda model, _: ["verify", str(model), "--json"],
    "plan": lambda model, _: ["plan", str(model), "--json"],
    "eval": lambda model, work: ["eval", str(model), "--text", _text(work), "--window", "32", "--max-tokens", "64"],
    "prune": lambda model, work: ["prune", str(model), "--method", "magnitude", "--out", str(work / "out")],
    "prune_and_export": lambda model, work: [
        "prune-and-export",
        str(model),
        "--method",
        "magnitude",
        "--format",
        "packed",
        "--out",
        str(work / "out"),
    ],
    "serve": lambda model, _: ["serve", str(model), "--port", "0"],  # up to the start of vLLM
    "bench": _bench,  # up to the first process that measures
    "tyr": _tyr,
    "experts": lambda model, work: ["experts", str(model), *_calibration(work), "--out", str(work / "out")],
    "search": _search,
    **{f"export_{format}": _export(format) for format in FORMATS},
}
