"""Served load as visits of a benchmark run."""

from __future__ import annotations

from pathlib import Path

from ...errors import ConfigError
from ...serve.launcher import Running
from ...serve.load import Answer, Load, Served, drive
from .result import Point, Request, Visit


def served_visit(
    server: Running, folder: Path, point: Point, *, seed: int, round: int = 0, api_key: str | None = None
) -> Visit:
    """One visit to a running server at a point with a concurrency; `folder` holds the tokenizer for the prompts.

    Raises ConfigError for a point in lock step, ServeError when the load generator itself fails; failed requests are
    recorded as such.
    """
    if point.concurrency is None or point.batch != 1:
        raise ConfigError(f"point '{point.name}' asks for sequences in lock step; a server takes a concurrency")
    load = Load(point.prompt_tokens, point.output_tokens, point.requests, point.concurrency, seed)
    return visit_of(drive(server, folder, load, api_key), round)


def visit_of(served: Served, round: int) -> Visit:
    """The samples of one load as a visit."""
    return Visit(round=round, duration_s=served.duration_s, requests=[_request(answer) for answer in served.answers])


def _request(answer: Answer) -> Request:
    return Request(**vars(answer))
