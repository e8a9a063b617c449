"""Odd values for the options of every command, by what click says that they take."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Final

import click

from crepe_deploy import cli

from .corpus import CALIBRATION, Corpus
from .mutate import TEXTS

# What runs quickly and well when nothing is odd. GOOD, PRUNED, TEXT, RUN, ...: samples.
COMMANDS: Final[dict[str, tuple[str, ...]]] = {
    "prune": ("prune", "GOOD", "--out", "out", "--method", "wanda", "--calib", "TEXT", *CALIBRATION),
    "prune-and-export": ("prune-and-export", "GOOD", "--out", "out", "--method", "magnitude"),
    "tyr": ("tyr", "GOOD", "--out", "out", "--calib", "TEXT", *CALIBRATION, "--generations", "1", "--offspring", "2",
            "--iterations", "1", "--ffn-multiple", "8", "--search-samples", "1"),
    "export": ("export", "PRUNED", "--out", "out"),
    "eval": ("eval", "GOOD", "--text", "TEXT", "--window", "16", "--max-tokens", "64"),
    "plan": ("plan", "GOOD"),
    "doctor": ("doctor",),
    "inspect": ("inspect", "PRUNED"),
    "verify": ("verify", "PRUNED"),
    "search": ("search", "GOOD", "--out", "preset.json", "--calib", "TEXT", "--text", "TEXT", *CALIBRATION,
               "--text-samples", "1", "--text-length", "16", "--evaluations", "6", "--fit", "3", "--finalists", "1",
               "--workers", "1", "--kernels", "3,5"),
    "gate": ("gate", "RUN", "RUN", "--max-slowdown", "0.1"),
    "report": ("report", "RUN", "--out", "out"),
    "bench": ("bench", "run", "SUITE", "--out", "run.json"),
    "serve": ("serve", "NOWHERE"),
}  # fmt: skip
NUMBERS: Final = (
    "0", "-1", "1", "2", "3", "1e9", "999999999999", str(2**31), str(2**63), str(2**64), "9" * 400, "9" * 5000, "-0",
    "0.5", "nan", "inf", "-inf", "1e-320", "1e400", "", " 1", "1_0", "\u0661", "0x10", "one", "1,2", "++1",
)  # fmt: skip
STEPS: Final = (
    "owl", "alpha", "error", "fold", "dsnot", "dsnot-ria", "swaps", "exact", "obs", "admm", "logits", "ria", "wanda",
    "sparsegpt", "crepe", "magnitude", "default", "pho", "best", "owl:", ":", "owl:x=1", "admm:steps=3.0",
    "admm:steps=-1", "admm:steps=1e9", "owl:lambda=nan", "dsnot:steps=99999999999999", "exact:damping=0",
    "obs:damping=-1", "swaps:steps=0", "logits:steps=inf", "alpha:spread=[]", 'exponent={"a":1}', "exponent=NaN",
    "exponent=1e308", "exponent=" + "9" * 500, "exponent=" + "[" * 5000, "coefficients=[1,2]", "=", "x=", "kernels=[3]",
    "2:4", "0:4", "4:4", "5:4", "1:33", "16:32", "1:1", "2:4:8", "-1:4", "0.5", "0", "1", "1.0", "0.999999999", "NaN",
    "1e-9", "50%", "dense", "packed", "int8", "onnx,onnx", "deci", ",", "dense,,packed", "genai", "portable", "int4",
    "fp16", "float16", "bfloat16", "float32", "float64", "int8", "complex64", "none", "start", "window", "1x8+2",
    "1@8+2*1", "0x0+0", "1x99999999999+1", "a" * 300, "[a-z", "(", "(a+)+$", ".*", "^$", "*", "lm_head", "tpot_s",
)  # fmt: skip
_DANGEROUS: Final = {"--help", "-h", "--retune"}


def odd_arguments(name: str, rng: Random, corpus: Corpus, root: Path) -> list[str]:
    """The arguments of a command, one to three of its options odd."""
    argv = [_sample(part, corpus) for part in COMMANDS[name]]
    cli.add_outer_commands()
    command = _leaf(name)
    options = [one for one in command.params if isinstance(one, click.Option) and not set(one.opts) & _DANGEROUS]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.12 and name != "serve":
            positions = [place for place, part in enumerate(argv) if place and not part.startswith("-")]
            if positions:
                argv[rng.choice(positions)] = _odd_path(rng, corpus, root) if rng.random() < 0.7 else rng.choice(TEXTS)
            continue
        option = rng.choice(options)
        flag = rng.choice([*option.opts, *option.secondary_opts])
        argv.append(flag)
        if not option.is_flag:
            argv.append(_odd_value(option.type, rng, corpus, root))
    return [part.replace("\x00", "\\0").replace("\ud800", "?") for part in argv]  # as a shell can give it


def _leaf(name: str) -> click.Command:
    command = cli.cli.commands[name]
    return command.commands["run"] if isinstance(command, click.Group) else command


def _odd_value(kind: click.ParamType, rng: Random, corpus: Corpus, root: Path) -> str:
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        return rng.choice(NUMBERS)
    if isinstance(kind, click.Path):
        return _odd_path(rng, corpus, root)
    if isinstance(kind, click.Choice):
        return rng.choice((*map(str, kind.choices), *map(str, kind.choices), rng.choice(TEXTS)))
    draw = rng.random()
    if draw < 0.55:
        return rng.choice(STEPS)
    return rng.choice(NUMBERS) if draw < 0.65 else rng.choice(TEXTS) if draw < 0.85 else _odd_path(rng, corpus, root)


def _odd_path(rng: Random, corpus: Corpus, root: Path) -> str:
    """A path that is a file, a folder, a link, a FIFO, not ours to read or write, endless, too long, or nowhere."""
    root.mkdir(exist_ok=True)
    name = rng.choice(("file", "folder", "link", "fifo", "private", "loop", "dangling"))
    place = root / name
    if not place.exists() and not place.is_symlink():
        if name == "file":
            place.write_text("mine\n")
        elif name in ("folder", "private"):
            place.mkdir()
            (place / "thesis.txt").write_text("years of work\n")
            place.chmod(0o500 if name == "private" else 0o755)
        elif name == "fifo":
            os.mkfifo(place)
        else:
            place.symlink_to({"link": corpus.path("model"), "loop": place, "dangling": root / "nowhere"}[name])
    return rng.choice((
        str(place), str(place), str(place / "below"), ".", "..", "", "/", "/nowhere/x", "x" * 256, "a/" * 3000,
        "\u00fcber", "out", "out.old", "~", "/dev/null", "/dev/zero", "/proc/self/mem", str(corpus.path("model")),
        str(corpus.path("model") / "config.json"), str(corpus.path("model") / "inside"), str(corpus.path("run.json")),
        "a\nb", "x\\0y", "-", "--", "//", "owner/name", "\udcff",
    ))  # fmt: skip


def _sample(part: str, corpus: Corpus) -> str:
    names = {"GOOD": "model", "PRUNED": "pruned", "TEXT": "text.txt", "RUN": "run.json", "SUITE": "suite.yaml"}
    return str(corpus.path(names[part])) if part in names else "/nowhere/at/all" if part == "NOWHERE" else part
