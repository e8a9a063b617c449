"""The commands `cache` and `cache clean`, and the lines that they print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crepe_deploy.option_groups import Summed, SummedGroup

from .options import json_option, print_result

EXAMPLES = """\b
Examples:
  crepe-deploy cache
  crepe-deploy cache --json
  crepe-deploy cache clean
"""
CLEAN_EXAMPLES = """\b
Examples:
  crepe-deploy cache clean
  crepe-deploy cache clean --json
"""


@click.group("cache", cls=SummedGroup, invoke_without_command=True, epilog=EXAMPLES)
@json_option
@click.pass_context
def cache_command(context: click.Context, as_json: bool) -> None:
    """List what is kept between runs: where, how large, and what for.

    That is GGUF files dequantised, calibration text that models wrote, CPU kernels and their measured speeds. All of
    it is made again when it is missing. Models from the hub lie in Hugging Face's cache, which is listed and never
    touched.
    """
    if context.invoked_subcommand is None:
        from crepe_deploy.api.cache import cache

        result = cache()
        print_result(result, as_json, lines(result))


@cache_command.command("clean", cls=Summed, epilog=CLEAN_EXAMPLES)
@json_option
@click.pass_context
def clean_command(context: click.Context, as_json: bool) -> None:
    """Remove what crepe-deploy keeps between runs, and say what that was; asks nothing.

    Hugging Face's cache and files that crepe-deploy did not write are left alone. Do this while no other run reads a
    GGUF file.
    """
    from crepe_deploy.api.cache import clean_cache

    before = context.parent is not None and context.parent.params["as_json"]
    result = clean_cache()
    print_result(result, as_json or before, clean_lines(result))


def lines(result: dict[str, Any]) -> list[str]:
    """What lies where, for a reader at a terminal."""
    entries, others = result["entries"], result["hugging_face"]
    text = [f"{result['folder']}: {size(result['bytes'])}"]
    text += [f"  {size(one['bytes']):>9}  {one['what']}  {_inside(result, one)}" for one in entries] or ["  nothing"]
    if entries:
        text.append("  crepe-deploy cache clean removes these; they are made again when they are needed")
    text.append(f"Hugging Face's cache, listed only: {others['folder']}: {size(others['bytes'])}")
    text += [
        f"  {size(one['bytes']):>9}  {one['kind']} {one['id']}  {one['path']}" for one in others["repositories"]
    ] or ["  nothing"]
    return text + (["  hf cache rm removes from there"] if others["repositories"] else [])


def clean_lines(result: dict[str, Any]) -> list[str]:
    """What was removed and what was left."""
    text = [f"removed {size(one['bytes']):>9}  {one['what']}  {_inside(result, one)}" for one in result["removed"]]
    text += [f"left {one['path']}: {one['why']}" for one in result["left"]]
    return [*text, f"{result['folder']}: {len(result['removed'])} entries removed, {size(result['bytes'])} freed"]


def _inside(result: dict[str, Any], one: dict[str, Any]) -> Path:
    return Path(one["path"]).relative_to(result["folder"])


def size(count: int) -> str:
    """Bytes in the unit that a person reads."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count} B"
