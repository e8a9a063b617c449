"""The figures of a run as Markdown, put between the marks of docs/reliability.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_MARKS = re.compile(r"(<!-- figures: begin[^>]*-->\n).*?(<!-- figures: end -->)", re.S)


def write_table(place: Path, summary: dict[str, Any]) -> None:
    """Replace what stands between the marks."""
    text = "\n".join(table(summary))
    place.write_text(_MARKS.sub(lambda marks: f"{marks[1]}{text}\n{marks[2]}", place.read_text()))


def table(summary: dict[str, Any]) -> list[str]:
    """What was thrown, what came back, what was found."""
    inputs, faults, storm = summary["inputs"], summary["faults"], summary["storm"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    found = summary["defects"]
    said = [
        f"`{summary['command']}`, {summary['machine']}; {versions}. {inputs['number']:,} inputs, {faults['number']:,} "
        f"faults, {summary['hours']} processor hours; **{sum(entry['times'] for entry in found.values()):,} defects**"
        + (f" of {len(found)} kinds, named in `bench/results/faults.json`." if found else "."),
        "",
        *_counts("inputs by kind", inputs["kinds"]),
        *_counts("inputs by command", inputs["commands"]),
        *_counts("exit codes", inputs["codes"]),
        *_counts("faults by kind", faults["kinds"]),
        *_counts("faults by command", faults["commands"]),
        *_counts("exit codes after a fault (-9: SIGKILL itself)", faults["codes"]),
    ]
    for name, part in (("inputs", inputs), ("faults", faults)):
        if part["number"]:
            seconds, slow = part["slowest_seconds"]
            memory, large = part["largest_bytes"]
            said += [
                f"- {name}: {part['distinct_messages']:,} distinct messages; slowest {seconds:.1f} s ({slow}); "
                f"largest {memory / 1e6:,.0f} MB above its start ({large})"
            ]
    if storm:
        kills = ", ".join(f"{name} {number}" for name, number in storm["kills"].items())
        requests = ", ".join(f"{name} {number:,}" for name, number in sorted(storm["requests"].items()))
        said += [f"- servers: {storm['seconds']:.0f} s, {storm['starts']} starts; kills: {kills}; requests: {requests}"]
    return said


def _counts(name: str, counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    names, numbers = (" | ".join(part) for part in zip(*((key, f"{counts[key]:,}") for key in counts), strict=True))
    return [f"| {name} | {names} |", "|---" * (len(counts) + 1) + "|", f"| number | {numbers} |", ""]
