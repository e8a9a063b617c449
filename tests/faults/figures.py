"""What the workers wrote, counted: for `faults.json`, and as the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

_VERSIONS = ("crepe-deploy", "torch", "transformers", "safetensors", "tokenizers")
_FRAME = re.compile(r'File "[^"]*?((?:crepe_deploy|export|serve|bench)/[\w/]+\.py)", line (\d+), in (\w+)')


def gather(options: argparse.Namespace, seconds: float, storm: dict[str, Any] | None) -> dict[str, Any]:
    """Everything counted that lies in the folder so far."""
    inputs, faults = Counted(), Counted()
    for line in _lines(options.out, "inputs"):
        inputs.add(line)
    for line in _lines(options.out, "faults"):
        faults.add(line)
    alone = _readers(options.out)
    counts = {"inputs": options.inputs, "readers": options.readers, "faults": options.faults, "storm": options.storm}
    asked = " ".join(f"--{name} {count:.0f}" for name, count in {"seed": options.seed, **counts}.items())
    return {
        "command": f"python -m tests.faults {asked} --jobs {options.jobs}",
        "machine": f"{os.cpu_count()} cores, {platform.system()}, {platform.machine()}",
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        "seconds": round(seconds, 1),
        "hours": round((inputs.seconds + faults.seconds) / 3600, 2),
        "storm": storm,
        "inputs": inputs.summary(),
        "readers": alone.summary(),
        "faults": faults.summary(),
        "defects": {**inputs.defects, **alone.defects, **faults.defects},
    }


class Counted:
    """Counts over lines of one file."""

    def __init__(self) -> None:
        self.number, self.seconds = 0, 0.0
        self.table: dict[str, Counter[str]] = {name: Counter() for name in ("kinds", "commands", "codes")}
        self.messages: set[str] = set()
        self.slowest: tuple[float, str] = (0.0, "")
        self.largest: tuple[int, str] = (0, "")
        self.defects: dict[str, dict[str, Any]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Count one line."""
        self.number += 1
        self.seconds += line["seconds"]
        command, kind = line["command"], line["kind"]
        for name, value in (("kinds", kind), ("commands", command), ("codes", line["code"])):
            self.table[name][str(value)] += 1
        self.messages.add(f"{command}: {line['message']}")
        self.slowest = max(self.slowest, (line["seconds"], f"{kind} {command} {line['index']}"))
        self.largest = max(self.largest, (line["memory"], f"{kind} {command} {line['index']}"))
        for defect in line.get("defects", ()):
            key = f"{defect}: {signature(line['details'])}" if defect == "traceback" else f"{defect} ({command})"
            entry = self.defects.setdefault(key, {"times": 0, "first": line})
            entry["times"] += 1
            entry["examples"] = [*entry.get("examples", []), f"{kind} {line['index']}"][:20]

    def summary(self) -> dict[str, Any]:
        """What is written of them."""
        return {
            "number": self.number,
            **{name: dict(sorted(counts.items())) for name, counts in self.table.items() if counts},
            "distinct_messages": len(self.messages),
            "slowest_seconds": self.slowest,
            "largest_bytes": self.largest,
        }


class Alone:
    """Counts over readers that were called alone."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.messages: set[str] = set()
        self.defects: dict[str, dict[str, Any]] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Count what one worker gave one reader."""
        name = record["reader"]
        self.outcomes.setdefault(name, Counter()).update(record["outcomes"])
        self.messages.update(f"{name}: {message}" for message in record["messages"])
        for line in record["defects"]:
            key = f"reader {name}: {signature(line['details'])}"
            first = {**line, "kind": name, "argv": []}
            self.defects.setdefault(key, {"times": 0, "first": first})["times"] += 1

    def summary(self) -> dict[str, Any]:
        """What is written of them."""
        return {
            "number": sum(sum(counts.values()) for counts in self.outcomes.values()),
            "outcomes": {name: dict(sorted(counts.items())) for name, counts in sorted(self.outcomes.items())},
            "distinct_messages": len(self.messages),
        }


_PLACES = re.compile(r"(/[\w.+-]+)+/(site-packages|crepe-deploy-faults-\w+|python3\.\d+)/")


def _readers(folder: Path) -> Alone:
    alone = Alone()
    for place in sorted(folder.glob("reader-*.json")):
        alone.add(json.loads(place.read_text()))
    return alone


def signature(details: str) -> str:
    """What tells one traceback from another: the error's type and the last frame of ours."""
    frames = _FRAME.findall(details)
    errors = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Panic\w*|\w+))(?::|$)", details, re.M)
    where = "{}:{} {}".format(*frames[-1]) if frames else "?"
    return f"{errors[-1] if errors else '?'} at {where}"


def publishable(summary: dict[str, Any]) -> str:
    """As JSON without the paths of this machine: what lies in the checkout, a library or the scratch starts there."""
    text = json.dumps(summary, indent=1)
    return _PLACES.sub("", text.replace(f"{Path.cwd()}/", "")) + "\n"


def lines(summary: dict[str, Any]) -> list[str]:
    """For a person."""
    said = [
        f"{name}: {counts['number']}, exit codes {counts.get('codes')}, {counts['distinct_messages']} messages, "
        f"slowest {counts['slowest_seconds']}, largest {counts['largest_bytes']}"
        for name in ("inputs", "faults")
        if (counts := summary[name])["number"]
    ]
    for key, entry in sorted(summary["defects"].items(), key=lambda pair: -pair[1]["times"])[:40]:
        first = entry["first"]
        said.append(
            f"{entry['times']} x {key}; {first['kind']} {first['index']}: {first['what']} {' '.join(first['argv'][:6])}"
        )
    return [
        *said,
        f"readers: {summary['readers']['number']}",
        f"{summary['seconds']} s, {len(summary['defects'])} distinct defects",
    ]


def _lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    for place in sorted(folder.glob(f"{name}-*.jsonl")):
        for line in place.read_text().splitlines():
            yield json.loads(line)
