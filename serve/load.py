"""Load on a server, by vLLM's own load generator: `vllm bench serve` is run on an address and its samples are read.

Every request asks for the same number of prompt and new tokens, end-of-text ignored, so an answer of another length is
a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError, ServeError
from ..store.reading import read_object
from .launcher import Running

# For a server that is to be measured: a visit's prompts are those of the visits before.
SERVER_OPTIONS: Final = ("--no-enable-prefix-caching",)
TAIL_LINES: Final = 15
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_COLUMNS: Final = ("input_lens", "output_lens", "ttfts", "itls", "errors")


@dataclass(frozen=True)
class Load:
    """Independent requests: `requests` in all, `concurrency` of them in flight. Lengths are tokens; `seed` decides the
    random prompts. timeout_s: of the whole visit, after which it is given up."""

    prompt_tokens: int
    output_tokens: int
    requests: int
    concurrency: int
    seed: int = 0
    timeout_s: float = 3600.0


@dataclass(frozen=True)
class Answer:
    """One request as the client saw it, times in seconds from its start. A failed one has an `error` and no times.

    itl_s: gaps between chunks; a server may send several tokens in one. Token counts are the server's own.
    """

    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    latency_s: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Served:
    """What one visit measured: seconds from the first request to the last answer, and every request in order."""

    duration_s: float
    answers: list[Answer]


def drive(server: Running, tokenizer: Path, load: Load, api_key: str | None = None) -> Served:
    """Put `load` on `server` and wait for the end. tokenizer: the folder to make prompts with.

    Raises ConfigError without a tokenizer; ServeError when the generator fails, takes longer than the load allows, or
    leaves no samples; requests that fail are answers with an error instead.
    """
    if not any((tokenizer / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{tokenizer} holds no tokenizer; prompts are made with one")
    with tempfile.TemporaryDirectory(prefix="crepe-deploy-load-") as folder:
        result = Path(folder) / "result.json"
        run_generator(command(server, tokenizer, load, result), load.timeout_s, api_key)
        content = read_object(result, ServeError, lenient=True)
    return read_result(content, load)


def command(server: Running, tokenizer: Path, load: Load, result: Path) -> list[str]:
    """The load generator's command line. No ready check: its trial request would be the first prompt, sent twice."""
    options: dict[str, Any] = {
        "--backend": "openai",
        "--base-url": server.url,
        "--model": server.model,
        "--tokenizer": tokenizer,
        "--dataset-name": "random",
        "--random-input-len": load.prompt_tokens,
        "--random-output-len": load.output_tokens,
        "--num-prompts": load.requests,
        "--max-concurrency": load.concurrency,
        "--seed": load.seed,
        "--temperature": 0,
        "--ready-check-timeout-sec": 0,
        "--result-dir": result.parent,
        "--result-filename": result.name,
    }
    flags = ["--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
    start = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    return [*start, *(str(part) for pair in options.items() for part in pair), *flags]


def read_result(content: dict[str, Any], load: Load) -> Served:
    """The samples in a result of `vllm bench serve`. Raises ServeError where they are missing or too few."""
    try:
        columns = [content[name] for name in _COLUMNS]
        rows = list(zip(*columns, strict=True))
        if len(rows) != load.requests:
            raise ServeError(f"vllm bench serve reports {len(rows)} of {load.requests} requests")
        return Served(float(content["duration"]), [_answer(load.output_tokens, *row) for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise ServeError(f"vllm bench serve's result is not understood (another version?): {error!r}") from error


def _answer(
    expected: int, prompt_tokens: int, output_tokens: int, ttft_s: float, itl_s: list[float], error: str
) -> Answer:
    """A failed request has 0 tokens there; its error may be empty, and a traceback otherwise."""
    failure: str | None = None
    if error or not output_tokens:
        failure = (error.strip().splitlines() or ["no answer"])[-1]
    elif output_tokens != expected:
        failure = f"answered {output_tokens} of {expected} tokens"
    if failure is not None:
        return Answer(prompt_tokens, output_tokens, error=failure)
    return Answer(prompt_tokens, output_tokens, ttft_s, list(itl_s), ttft_s + sum(itl_s))


def run_generator(command: list[str], limit_s: float, api_key: str | None) -> None:
    """Run the load generator to its end. Raises ServeError with the end of its output, or after `limit_s` seconds."""
    variables = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if api_key is not None:
        variables["OPENAI_API_KEY"] = api_key  # not on the command line, where everyone on the machine can read it
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=variables,
            timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ServeError(f"vllm bench serve had not finished after {limit_s:g} s: does the server answer?") from error
    if done.returncode:
        tail = "\n".join(f"  {line}" for line in done.stdout.splitlines()[-TAIL_LINES:])
        raise ServeError(f"vllm bench serve ended with code {done.returncode}:\n{tail}")
