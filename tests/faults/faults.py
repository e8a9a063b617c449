"""Every file event of the commands that write, failed or met by a signal; then the same command once more.

Nothing partial may be published, nothing of others touched, nothing left but what the docs name; the second run ends
with the files of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from crepe_deploy.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE

from . import strikes
from .cases import use
from .corpus import CALIBRATION, STOPPED, Corpus
from .run import KEPT, clear, own
from .server import Outcome, fingerprint, run_in_child

STRANGERS: Final = ("out.notes/thesis.txt", "precious.txt", ".out.crepe", "preset.json.bak")


@dataclass(frozen=True)
class Scenario:
    """A command that writes: a use of `cases`, or arguments; `earlier`: a sample that lies at its output already."""

    arguments: tuple[str, ...]
    sample: str = "model"
    earlier: str = ""
    resumes: bool = False


SCENARIOS: Final = {
    "prune": Scenario(("calibrated",), resumes=True),
    "prune --overwrite": Scenario(("calibrated", "--overwrite"), earlier="pruned", resumes=True),
    "prune-and-export": Scenario(("formats",), resumes=True),
    "prune-and-export --overwrite": Scenario(("formats", "--overwrite"), earlier="formats", resumes=True),
    "export dense": Scenario(("dense",), "packed", resumes=True),
    "export packed": Scenario(("packed",), "pruned", resumes=True),
    "export int8": Scenario(("int8", "--overwrite"), "pruned", earlier="int8", resumes=True),
    "export deci": Scenario(("deci",), "per-layer", resumes=True),
    "prune gguf": Scenario(("prune",), "model.gguf", resumes=True),
    "search": Scenario(STOPPED["stopped-search"], resumes=True),
    "tyr": Scenario(STOPPED["stopped-tyr"], resumes=True),
    "report": Scenario(("report", "RUN", "--out", "out"), "charts.json"),
    "heal": Scenario(("heal", "IN", "--dense", "GOOD", "--text", "TEXT", "--steps", "2", "--window", "16",
                      "--batch-tokens", "32", "--dtype", "float32", "--out", "out"), "pruned", resumes=True),
    "experts": Scenario(("experts", "IN", "--calib", "TEXT", *CALIBRATION, "--remove", "2", "--out", "out"), "experts",
                        resumes=True),
    "bench": Scenario(("bench", "run", "SUITE", "--out", "out.json"), "bench.yaml", resumes=True),
    "gate": Scenario(("gate", "RUN", "RUN", "--max-slowdown", "1", "--markdown", "gate.md", "--junit", "gate.xml"),
                     "run.json"),
    "export onnx": Scenario(("export", "IN", "--out", "out", "--format", "onnx"), "pruned", resumes=True),
}  # fmt: skip
SLOW: Final = {"export onnx", "report", "bench"}  # a few of their events only


@dataclass
class Reference:
    """An undisturbed run: its events, what it left, and what is equal between two of them."""

    events: int
    names: set[str]
    stable: dict[str, str] = field(default_factory=dict)


class Bench:
    """The scenarios set up in scratch folders of `place`, struck and judged."""

    def __init__(self, corpus: Corpus, place: Path) -> None:
        self.corpus, self.place = corpus, place
        self._references: dict[str, Reference] = {}

    def reference(self, name: str) -> Reference:
        """The undisturbed run of a scenario, made when first asked for."""
        if name not in self._references:
            found = []
            for _ in range(2):
                scratch = self._set_up(name)
                counter = strikes.Counter()
                outcome = run_in_child(
                    self.argv(name), scratch, nobody=True, before=strikes.arm(scratch, 0, "EIO", counter)
                )
                assert outcome.code in (0, 3, 4) and not outcome.defects, (name, outcome)
                found.append((counter.value, _contents(scratch)))
            (events, one), (_, other) = found
            stable = {path: value for path, value in one.items() if other.get(path) == value}
            self._references[name] = Reference(events, set(one), stable)
        return self._references[name]

    def argv(self, name: str, resume: bool = False) -> list[str]:
        """The command of a scenario."""
        scenario = SCENARIOS[name]
        first, *more = scenario.arguments
        sample = self.corpus.path(scenario.sample)
        if name in ("search", "tyr"):
            argv = self.corpus.command(f"stopped-{name}")
        elif first in ("report", "gate", "export", "heal", "experts", "bench"):
            stands = {"GOOD": str(self.corpus.path("model")), "TEXT": str(self.corpus.path("text.txt"))}
            stands |= dict.fromkeys(("RUN", "IN", "SUITE"), str(sample))
            argv = [stands.get(part, part) for part in scenario.arguments]
        else:
            argv = [*use(first, sample, self.corpus), *more]
        return [*argv, "--resume"] if resume else argv

    def strike(self, name: str, kind: str, event: int) -> dict[str, Any]:
        """Strike one event of a scenario, judge what is left, run it again and judge that; the line that is kept."""
        reference = self.reference(name)
        scratch, counter = self._set_up(name), strikes.Counter()
        earlier = _contents(scratch)
        first = run_in_child(self.argv(name), scratch, nobody=True, before=strikes.arm(scratch, event, kind, counter))
        problems = [] if first.defects == ["exit -9"] and kind == "SIGKILL" else list(first.defects)
        problems += _after_first(first, kind, scratch, earlier, reference)
        again = None
        if first.code not in (0, 3, 4):
            journal = any(scratch.glob("cwd/*journal")) or any(scratch.glob("cwd/*.work/journal*"))
            again = run_in_child(self.argv(name, SCENARIOS[name].resumes and journal), scratch, nobody=True)
            problems += [f"again: {defect}" for defect in again.defects]
            if again.code not in (0, 3, 4) and not _published(scratch, again):
                problems.append(f"again: exit {again.code}")
        problems += _at_the_end(scratch, kind, reference)
        line: dict[str, Any] = {
            "index": event, "kind": kind, "command": name, "code": first.code, "message": first.message,
            "seconds": round(first.seconds, 3), "memory": first.memory,
        }  # fmt: skip
        if problems:
            details = f"{first.stderr}\n{first.details}\n--- again\n{again.stderr if again else ''}"
            line |= {"defects": problems, "what": f"event {event} of {reference.events}", "argv": first.argv,
                     "details": details[-6000:]}  # fmt: skip
        return line

    def _set_up(self, name: str) -> Path:
        scratch = self.place / "run"
        clear(scratch)
        for stranger in STRANGERS:
            path = scratch / "cwd" / stranger
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("years of work\n")
        if SCENARIOS[name].earlier:
            shutil.copytree(self.corpus.path(SCENARIOS[name].earlier), scratch / "cwd" / "out")
        (scratch / "tmp").mkdir()
        own(scratch)
        return scratch


def plan(bench: Bench, seed: int, number: int) -> list[tuple[str, str, int]]:
    """So many (scenario, kind, event), all different, in an order of chance; of slow scenarios every tenth event.

    A small number leaves the slow ones out.
    """
    every = [
        (name, kind, event)
        for name in SCENARIOS
        if name not in SLOW or number >= 500
        for kind in strikes.KINDS
        for event in range(1, bench.reference(name).events + 1)
        if name not in SLOW or event % 10 == 1
    ]
    Random(seed).shuffle(every)
    return every[:number]


def _after_first(
    outcome: Outcome, kind: str, scratch: Path, earlier: dict[str, str], reference: Reference
) -> Iterator[str]:
    """What is wrong after the struck run."""
    present = _contents(scratch)
    yield from (
        f"lost {name}"
        for name in earlier
        if name.startswith("cwd/") and not _is_output(name) and present.get(name) != earlier[name]
    )
    whole = {name: value for name, value in present.items() if name.startswith("cwd/out/")}
    before = {name: value for name, value in earlier.items() if name.startswith("cwd/out/")}
    if whole and whole != before and set(whole) != {name for name in reference.names if name.startswith("cwd/out/")}:
        yield "published in part"
    if not whole and before and kind != "SIGKILL":
        yield "lost the earlier output"
    expected = {"SIGKILL": {-9}}.get(kind, {0, 1, 2, 3, 4, EXIT_INTERRUPTED, EXIT_RESUMABLE})
    if outcome.code not in (expected | {0, 3, 4}):
        yield f"exit {outcome.code} of {kind}"
    if kind not in ("SIGKILL", "EIO", "EACCES"):
        left = set(present) - set(earlier) - reference.names
        yield from (f"left {name}" for name in sorted(left) if not KEPT.fullmatch(name.removeprefix("cwd/")))


def _at_the_end(scratch: Path, kind: str, reference: Reference) -> Iterator[str]:
    """What is wrong in the end."""
    present = _contents(scratch)
    if missing := reference.names - set(present):
        yield f"missing in the end: {min(missing)}"
    left = [name for name in sorted(set(present) - reference.names) if ".failed" not in name]
    written = {"cwd/out", "cwd/out.json", "cwd/preset.json"} & present.keys()
    if kind in ("EIO", "EACCES", "SIGKILL") and written:  # done, but for clearing up
        left = [
            name
            for name in left
            if not re.match(r"cwd/(\.[\w.]+\.crepe-deploy|out(\.json)?\.work|out\.old)(/|$)", name)
        ]
    if left:
        yield f"left in the end: {left[0]}"
    if changed := [name for name, value in reference.stable.items() if present.get(name, value) != value]:
        yield f"differs in the end: {changed[0]}"


def _published(scratch: Path, again: Outcome) -> bool:
    """Whether the second run was refused since the first had published its output."""
    return again.code == 2 and "exists" in again.stderr and any(scratch.glob("cwd/out*"))


def _is_output(name: str) -> bool:
    return name.split("/")[1] == "out"


_OF_TIME: Final = re.compile(
    r'"seconds": (?:[\d.]+|\{[^}]*\})|"peak_rss_bytes": \d+|"parent": "[0-9a-f]{64}"|'
    r'"lineage/[0-9a-f]{64}\.json": "[0-9a-f]{64}"'
)


def _timeless(path: Path) -> str:
    """A JSON file without the seconds and the memory that a run took, and the hashes of manifests, which hold them."""
    return _OF_TIME.sub("", path.read_text()) if path.suffix == ".json" and path.is_file() else ""


def _contents(scratch: Path) -> dict[str, str]:
    """What lies in the working and the temporary folder of a run."""
    return {
        re.sub(r"[0-9a-f]{64}", "SHA256", f"{part}/{name}"): _timeless(scratch / part / name) or value
        for part in ("cwd", "tmp")
        for name, value in fingerprint(scratch / part).items()
        if not name.startswith("crepe-deploy-") and not (part == "tmp" and _is_probe(name, value))
    }


def _is_probe(name: str, value: str) -> bool:
    """Whether a file is what the standard library's tempfile left when it tried whether it can write there."""
    written = [hashlib.blake2b(data, digest_size=12).hexdigest() for data in (b"blat", b"")]
    return bool(re.fullmatch(r"[a-z0-9_]{8}", name)) and value.split(" ")[-1] in written
