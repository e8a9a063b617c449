"""One case run and judged: what the command may leave, what it may not touch, and what counts as a defect."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepe_deploy.errors import EXIT_RESUMABLE

from .cases import make_case
from .corpus import Corpus
from .server import NOBODY, Outcome, fingerprint, run_in_child

# What a command that did not succeed may leave (docs/files.md).
KEPT = re.compile(r"[^/]*(\.failed(-\d+)?|\.work|journal)(/.*)?|gate\.(md|xml)")


@dataclass
class Verdict:
    """A case and what became of it."""

    index: int
    kind: str
    what: str
    outcome: Outcome

    def line(self) -> dict[str, Any]:
        """What is kept of it; of a defect everything."""
        outcome = self.outcome
        kept: dict[str, Any] = {
            "index": self.index, "kind": self.kind, "command": next(iter(outcome.argv), ""), "code": outcome.code,
            "message": outcome.message, "seconds": round(outcome.seconds, 3), "memory": outcome.memory,
        }  # fmt: skip
        if outcome.defects:
            details = outcome.details or outcome.stderr
            kept |= {"defects": outcome.defects, "what": self.what, "argv": outcome.argv, "details": details[-6000:]}
        return kept


def attempt(seed: int, index: int, corpus: Corpus, place: Path, keep: bool = False) -> Verdict:
    """Make the case of this number below `place`, run it and judge it; `place` is removed unless it is to be kept."""
    clear(place)
    place.mkdir(parents=True)
    case = make_case(seed, index, corpus, place / "in")
    own(place)
    before, cwd = fingerprint(case.root), set(fingerprint(place / "cwd"))
    outcome = run_in_child(case.argv, place, nobody=True)
    after = fingerprint(case.root)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    outs = [value for option, value in zip(case.argv, case.argv[1:], strict=False) if option == "--out"]
    for name in changed:
        path = case.root / name
        made = name not in before and any(path.is_relative_to(out) for out in outs)  # where it was told to make it
        if not made and not (case.argv[:1] == ["gate"] and str(path) in case.argv):  # as its comment
            outcome.defects.append("input changed")
            break
    judge_leftovers(outcome, place, cwd)
    if not keep:
        clear(place)
    return Verdict(index, case.kind, case.what, outcome)


def judge_leftovers(outcome: Outcome, place: Path, before: set[str]) -> None:
    """Nothing is left in temporary folders, and in the working folder of a failure only what the docs name."""
    left = [name for name in fingerprint(place / "tmp") if not name.startswith("crepe-deploy-")]
    made = sorted(set(fingerprint(place / "cwd")) - before)
    if outcome.code in (1, 2, 130, EXIT_RESUMABLE):
        asked = {str(place) for name in outcome.argv if outcome.argv[0] == "gate" for place in _and_above(name)}
        left += [name for name in made if not KEPT.fullmatch(name) and name not in asked]
    else:
        working = [name for name in made if re.search(r"\.(partial|old|work|unpacked|crepe-deploy)(/|$)", name)]
        left += [name for name in working if name.split("/")[0] not in outcome.argv]
    if left and not outcome.hung:
        outcome.defects.append(f"left {left[0]}" if len(left) == 1 else f"left {left[0]} and {len(left) - 1} more")


def _and_above(name: str) -> tuple[Path, ...]:
    """A file that `gate` was told to write, which stays whatever the verdict, and the folders made for it."""
    return (Path(name), *Path(name).parents)


def own(place: Path) -> None:
    """Give everything below a folder to nobody, who runs the commands."""
    if os.getuid() == 0:
        for folder, folders, files in os.walk(place):
            for name in (".", *folders, *files):
                os.chown(os.path.join(folder, name), NOBODY, NOBODY, follow_symlinks=False)  # noqa: PTH118


def clear(place: Path) -> None:
    """Remove a scratch folder, whatever lies in it."""
    if place.exists():
        shutil.rmtree(place)
