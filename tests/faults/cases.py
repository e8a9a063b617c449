"""What is thrown at the command line: one case for each number of a seed, spoilt from good samples."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from .corpus import CALIBRATION, FAMILIES, Corpus
from .formats import sign, spoil_file, spoil_folder
from .options import COMMANDS, odd_arguments

OUT: Final = "out"
# Commands over a folder IN, whose names stand for its use. TEXT is a good text.
USES: Final[dict[str, tuple[str, ...]]] = {
    "inspect": ("inspect", "IN", "--json"),
    "verify": ("verify", "IN"),
    "plan": ("plan", "IN", *CALIBRATION),
    "prune": ("prune", "IN", "--out", OUT, "--method", "magnitude"),
    "rows": ("prune", "IN", "--out", OUT, "--method", "magnitude", "--sparsity", "0.5", "--granularity", "matrix"),
    "calibrated": ("prune", "IN", "--out", OUT, "--method", "wanda", "--calib", "TEXT", *CALIBRATION),
    "solved": ("prune", "IN", "--out", OUT, "--method", "sparsegpt", "--calib", "TEXT", *CALIBRATION),
    "best": ("prune", "IN", "--out", OUT, "--recipe", "best", "--calib", "TEXT", *CALIBRATION),
    "formats": ("prune-and-export", "IN", "--out", OUT, "--method", "magnitude", "--format", "dense,packed,int8"),
    "dense": ("export", "IN", "--out", OUT, "--format", "dense"),
    "packed": ("export", "IN", "--out", OUT, "--format", "packed"),
    "int8": ("export", "IN", "--out", OUT, "--format", "int8"),
    "deci": ("export", "IN", "--out", OUT, "--format", "deci"),
    "eval": ("eval", "IN", "--text", "TEXT", "--window", "16", "--max-tokens", "64"),
    "against": ("eval", "GOOD", "--text", "TEXT", "--window", "16", "--max-tokens", "64", "--against", "IN"),
    "tyr": ("tyr", "IN", "--out", OUT, "--calib", "TEXT", *CALIBRATION, "--generations", "1", "--offspring", "2",
            "--iterations", "1", "--ffn-multiple", "8", "--search-samples", "1"),
}  # fmt: skip
_MODEL_USES = (
    "plan",
    "plan",
    "plan",
    "plan",
    "inspect",
    "inspect",
    "prune",
    "prune",
    "calibrated",
    "eval",
    "best",
    "tyr",
    "formats",
    "solved",
)
_FOLDER_USES = ("inspect", "verify", "verify", "dense", "packed", "int8", "deci", "eval", "prune", "against", "rows")
_CONFIGS = ("config.json", "config.json", "config.json", "generation_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json")
WRITTEN: Final = ["pruned", "packed", "int8", "onnx", "genai", "per-layer", "deci", "formats/packed", "formats/dense"]


@dataclass
class Case:
    """One command, and what was done to its input."""

    kind: str
    argv: list[str]
    what: str
    root: Path  # the folder of its inputs, which it may not change


def make_case(seed: int, index: int, corpus: Corpus, root: Path) -> Case:
    """The case of this number, its inputs written below `root`."""
    rng = Random(f"{seed}/{index}")
    kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    root.mkdir(parents=True)
    argv, what = KINDS[kind][1](rng, corpus, root)
    return Case(kind, argv, what, root)


def use(name: str, place: Path, corpus: Corpus, text: Path | None = None) -> list[str]:
    """The arguments of a use, its folder and its text filled in."""
    stands = {"IN": str(place), "GOOD": str(corpus.path("model")), "TEXT": str(text or corpus.path("text.txt"))}
    return [stands.get(part, part) for part in USES[name]]


def _config(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    place = corpus.copy(rng.choice(("model", "tied", "sharded", *FAMILIES)), root)
    name = rng.choice(_CONFIGS)
    path = place / name if (place / name).exists() else place / "config.json"
    return use(rng.choice(_MODEL_USES), place, corpus), f"{path.name} {spoil_file(path, rng)}"


def _tokenizer(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    place = corpus.copy(rng.choice(("model", "pruned", *FAMILIES)), root)
    path = place / rng.choice(_TOKENIZERS)
    return use(
        rng.choice(("calibrated", "calibrated", "eval", "packed", "packed", "tyr", "plan", "plan")), place, corpus
    ), (f"{path.name} {spoil_file(path, rng)}")


def _weights(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    place = corpus.copy(rng.choice(("model", "tied", "sharded", "sharded", *WRITTEN)), root)
    files = sorted([*place.glob("*.safetensors"), *place.glob("*.index.json")]) or [place / "config.json"]
    path = rng.choice(files)
    what = f"{path.name} {spoil_file(path, rng)}"
    if rng.random() < 0.7:
        sign(place)
    return use(rng.choice((*_FOLDER_USES, "inspect", "prune", "calibrated", "best")), place, corpus), what


def _written(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    """Any file of a folder that the product wrote, mostly signed anew."""
    place = corpus.copy(rng.choice(WRITTEN), root)
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size < 4 << 20]
    path = rng.choice([*files, place / "manifest.json", place / "config.json"])
    what = f"{path.name} {spoil_file(path, rng)}"
    if rng.random() < 0.7 and path.name != "manifest.json":
        sign(place)
    return use(rng.choice(_FOLDER_USES), place, corpus), what


def _folder(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    place = corpus.copy(rng.choice(("model", "sharded", "formats", *WRITTEN)), root)
    what = " and ".join(spoil_folder(place, rng) for _ in range(rng.choice((1, 1, 2))))
    return use(rng.choice((*_FOLDER_USES, *_MODEL_USES)), place, corpus), what


def _gguf(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    place = corpus.copy("model.gguf", root)
    what = spoil_file(place, rng)
    return use(rng.choice(("plan", "prune", "eval", "inspect", "verify", "calibrated")), place, corpus), what


def _text(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    text = corpus.copy(rng.choice(("text.txt", "text.jsonl", "text.parquet")), root)
    what = spoil_folder(root, rng) if rng.random() < 0.1 else spoil_file(text, rng)
    return use(rng.choice(("calibrated", "eval", "eval", "tyr")), corpus.path("model"), corpus, text), what


def _recipe(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    name = rng.choice(("recipe.yaml", "preset.json"))
    place = corpus.copy(name, root)
    what = spoil_file(place, rng)
    option = "--recipe" if name == "recipe.yaml" else "--preset"
    argv = ["prune", str(corpus.path("model")), "--out", OUT, option, str(place)]
    return [*argv, "--calib", str(corpus.path("text.txt")), *CALIBRATION], what


def _runs(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    """Files of measurements and budgets, for `gate` and `report`."""
    name = rng.choice(("run.json", "run.json", "benchmark.json"))
    good = corpus.path(name)
    if rng.random() < 0.2:
        place = corpus.copy("budgets.yaml", root)
        what = spoil_file(place, rng)
        return ["gate", str(good), str(good), "--budgets", str(place)], what
    place = corpus.copy(name, root)
    what = spoil_file(place, rng)
    pair = rng.choice(([place, good], [good, place], [place, place]))
    budgets = str(corpus.path("budgets.yaml"))
    gates = (
        ["gate", *map(str, pair), "--budgets", budgets, "--markdown", "gate.md", "--junit", "gate.xml"],
        ["gate", *map(str, pair), "--max-slowdown", "0.1", "--host-mismatch", "ratios", "--json"],
        ["gate", str(place), "--pruned", "packed", "--max-slowdown", "0.1"],
        ["report", str(place), "--out", OUT],
        ["report", *map(str, pair), "--out", OUT, "--json"],
    )
    pages = 0 if name == "benchmark.json" or rng.random() < 0.8 else 2  # a page of a report takes a second
    argv = rng.choice(gates[: 3 + pages])
    if argv[0] == "report":
        place.write_bytes(corpus.path("charts.json").read_bytes())  # of which every chart is drawn
        what = spoil_file(place, rng)
    return argv, what


def _suite(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    place = corpus.copy("suite.yaml", root / "configs")
    return ["bench", str(place), "--out", "run.json"], spoil_file(place, rng)


def _journal(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    """The journal of a stopped `search` or `tyr`, gone on with; it is no input but the command's own to change."""
    name = rng.choice(("stopped-search", "stopped-tyr"))
    cwd = root.parent / "cwd"
    shutil.copytree(corpus.path(name), cwd)
    files = [path for path in sorted(cwd.rglob("*")) if path.is_file()]
    path = rng.choice([*files, *[one for one in files if "journal" in one.name] * len(files)])
    what = f"{path.name} {spoil_file(path, rng)}"
    return [*corpus.command(name), "--resume"], what


def _options(rng: Random, corpus: Corpus, root: Path) -> tuple[list[str], str]:
    """A command with one to three odd values among its options."""
    name = rng.choice(list(COMMANDS))
    return odd_arguments(name, rng, corpus, root), "options"


Builder = Callable[[Random, Corpus, Path], tuple[list[str], str]]
KINDS: Final[dict[str, tuple[int, Builder]]] = {
    "config": (17, _config), "tokenizer": (8, _tokenizer), "weights": (20, _weights), "written": (16, _written),
    "folder": (8, _folder), "gguf": (5, _gguf), "text": (4, _text), "recipe": (4, _recipe), "runs": (18, _runs),
    "suite": (2, _suite), "journal": (2, _journal), "options": (9, _options),
}  # fmt: skip
