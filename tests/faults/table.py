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
    inputs, faults, storm, readers = (summary[name] for name in ("inputs", "faults", "storm", "readers"))
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    found = summary["defects"]
    defects = f"**{sum(entry['times'] for entry in found.values()):,} defects**"
    said = [
        f"`{summary['command']}`, {summary['machine']}; {versions}. {inputs['number']:,} inputs of "
        f"commands, {readers['number']:,} of readers called alone, {faults['number']:,} faults, "
        f"{summary['hours']} processor hours; {defects}"
        + (f" of {len(found)} kinds, named in `bench/results/faults.json`." if found else "."),
        "",
        *_counts("inputs by kind", inputs.get("kinds", {})),
        *_counts("inputs by command", inputs.get("commands", {})),
        *_counts("exit codes", inputs.get("codes", {})),
        *_readers(readers),
        *_counts("faults by kind", faults.get("kinds", {})),
        *_counts("faults by command", faults.get("commands", {})),
        *_counts("exit codes after a fault (-9: SIGKILL itself)", faults.get("codes", {})),
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


def _readers(summary: dict[str, Any]) -> list[str]:
    if not summary["number"]:
        return []
    rows = [
        f"| {name} | {sum(counts.values()):,} | {counts.get('refused', 0):,} | {counts.get('read', 0):,} | "
        f"{counts.get('defect', 0):,} |"
        for name, counts in summary["outcomes"].items()
    ]
    return ["| reader called alone | inputs | refused | read | defects |", "|---|---:|---:|---:|---:|", *rows, ""]


def _counts(name: str, counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    names, numbers = (" | ".join(part) for part in zip(*((key, f"{counts[key]:,}") for key in counts), strict=True))
    return [f"| {name} | {names} |", "|---" * (len(counts) + 1) + "|", f"| number | {numbers} |", ""]
