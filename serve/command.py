"""The command `serve`, defined without heavy imports so that `--help` stays quick."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Final

import click

from ..errors import CrepeError
from ..option_groups import MODEL, Argument, Grouped

EXAMPLES: Final = """\b
Examples:
  crepe-deploy serve out/packed
  crepe-deploy serve out/packed --port 0 --json --max-model-len 4096 --enforce-eager
  crepe-deploy serve out/onnx --threads 4 --served-model-name llama
"""


@click.command("serve", cls=Grouped, context_settings={"ignore_unknown_options": True}, epilog=EXAMPLES)
@click.argument("model", cls=Argument, help=MODEL)
@click.argument(
    "vllm_options", cls=Argument, nargs=-1, type=click.UNPROCESSED, help="Options of vLLM, passed on to it."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Anything but this machine needs --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", default=None, envvar="VLLM_API_KEY", help="What clients must send; also VLLM_API_KEY.")
@click.option("--start-timeout", type=click.FloatRange(min=1), default=600, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout when ready.")
def serve_command(
    model: str, vllm_options: tuple[str, ...], host: str, port: int, api_key: str | None, start_timeout: float,
    as_json: bool,
) -> None:  # fmt: skip
    """Serve MODEL, a folder, a hub id or a GGUF file, with vLLM, once its first answer agrees with the manifest.

    Options of vLLM that tune it are passed on, e.g. --max-model-len 4096 --enforce-eager; what opens it to others or
    loads code is not (docs/serving.md). An ONNX folder is served by ONNX Runtime instead, with --max-model-len,
    --threads and --served-model-name. Ctrl-C stops; the server ends with this command, whatever ends that.
    """
    from ..store.sources import gguf_file, is_model_name, resolve_model
    from .launcher import ServeOptions, check_address, require_vllm, serve
    from .passed_on import VLLM, check_passed_on

    check_address(host, port, api_key)
    if gguf_file(model) is not None or is_model_name(model):  # which vLLM serves, once it is fetched or converted
        check_passed_on(vllm_options, VLLM)
        require_vllm()
    found = resolve_model(model, say=say)
    name = None if found.kind == "folder" else Path(model).name.removesuffix(".gguf")
    answered: list[dict[str, Any]] = []
    options = ServeOptions(found.folder, host, port, api_key, start_timeout, vllm_options, name)

    def ready(server: dict[str, Any]) -> None:
        click.echo(json.dumps(server) if as_json else usage(server, has_key=api_key is not None))
        answered.append(server)

    try:
        serve(options, say, ready)
    except CrepeError as error:
        error.printed = as_json and bool(answered)
        raise
    say("stopped")


def say(message: str) -> None:
    """A line on stderr; whose terminal has hung up is told nothing."""
    with contextlib.suppress(OSError):
        click.echo(message, err=True)


def usage(server: dict[str, Any], *, has_key: bool) -> str:
    """How to call a ready server, with curl and with the OpenAI client."""
    url, model = server["url"], server["model"]
    header = " -H 'Authorization: Bearer '\"$VLLM_API_KEY\"" if has_key else ""
    key = "os.environ['VLLM_API_KEY']" if has_key else "'none'"
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
    arguments = ", ".join(f"{name}={value!r}" for name, value in body.items())
    return "\n".join(
        [
            f"ready: {url}/v1 (Ctrl-C stops)",
            "",
            f"  curl {url}/v1/completions -H 'Content-Type: application/json'{header} -d '{json.dumps(body)}'",
            "",
            f"  {'import os; ' if has_key else ''}from openai import OpenAI",
            f"  client = OpenAI(base_url='{url}/v1', api_key={key})",
            f"  client.completions.create({arguments})",
        ]
    )
