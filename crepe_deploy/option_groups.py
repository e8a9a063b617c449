"""Options in groups under `--help`: which group an option is in, the same in every command.

One table by the option's parameter name; a test holds it complete. What only one command has stands there too. And
what is refused of a file is refused by the name of the option or argument that it was given by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click

from .errors import InputError

GROUPS: Final = {
    "What to prune": "target sparsity granularity include exclude",
    "How to prune": (
        "method preset params recipe feed allocate permute reprune reconstruct repair rescale values remove scores"
    ),
    "How to search": (
        "widths search_samples iterations generations offspring ffn_multiple attention attention_share accumulation "
        "variant fitness refit finish optimizer proxy evaluations fit finalists kernels workers"
    ),
    "Calibration": "calib calib_field calib_samples calib_length",
    "Formats": "format onnx_flavor precision quantise layout remote_code",
    "Training": (
        "dense heal steps minutes learning_rate batch_tokens accumulate checkpointing top_k lora train holdout"
    ),
    "Text": "text text_field text_samples text_length window stride max_tokens bos",
    "Comparison": "against tasks task_dir limit update_card baseline aa",
    "Measurement": "engine points rounds threads",
    "Judgement": (
        "budgets max_rounds max_slowdown pruned names host_mismatch below_noise calibrate suggest_budgets "
        "max_perplexity_ratio context"
    ),
    "Server": "host port api_key start_timeout",
    "Running": "seed dtype device revision resume",
    "Output": "out overwrite junit markdown as_json base_model",
}
ARGUMENTS: Final = "Arguments"
MODEL: Final = "A model folder, a hub id (owner/name) or a GGUF file."  # what an argument of that name takes
OTHER: Final = "Options"
_NOUNS: Final = ("model ", "preset ", "recipe ", "task folder ")  # what a message may call what was given
_VERBS: Final = " is | has | holds | cannot | does not"
_GROUP_OF: Final = {name: group for group, names in GROUPS.items() for name in names.split()}


class Argument(click.Argument):
    """An argument that says what it is."""

    def __init__(self, *names: Any, help: str, **options: Any) -> None:
        super().__init__(*names, **options)
        self.text = help  # not `help`, which newer versions of click list a second time


class Summed(click.Command):
    """A command whose summary in a list of commands is its whole first sentence."""

    def get_short_help_str(self, limit: int = 0) -> str:
        """As click does, with no limit."""
        return super().get_short_help_str(max(limit, len(self.help or "")))


class SummedGroup(Summed, click.Group):
    """A group of commands with such a summary."""


class Grouped(Summed):
    """A command whose help has arguments and options in groups, in the table's order, and whose refusals name them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; of an option that is none the nearest alone is suggested."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            error.possibilities = (error.possibilities or [])[:1]  # type: ignore[misc]
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; a refusal that begins with what was given begins with the option or argument of that."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            error.args = (_with_names(str(error), self.params, ctx.params),)
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write every group that has an option."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in [ARGUMENTS, *GROUPS, OTHER]}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, Argument):
                rows[ARGUMENTS].append((parameter.make_metavar(ctx), parameter.text))
                continue
            record = parameter.get_help_record(ctx)
            if record is not None:
                rows[_GROUP_OF.get(str(parameter.name), OTHER)].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


def _with_names(reason: str, parameters: Iterable[click.Parameter], given: Mapping[str, object]) -> str:
    """A message about a file or folder that was given, with the option or argument that it was given by in front."""
    for noun in ("", *_NOUNS):
        names = [_typed(one) for one in parameters if _is_about(reason.removeprefix(noun), given.get(one.name or ""))]
        if reason.startswith(noun) and names and noun.strip().upper() not in names:
            return f"{' and '.join(names)} {reason.removeprefix(noun)}"
    return reason


def _typed(parameter: click.Parameter) -> str:
    """An option as it is typed, an argument as the usage line has it."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name.replace(" | ", " or ").strip("[].")


def _is_about(reason: str, given: object) -> bool:
    """Whether the subject of a message is a text or path that was given, or what lies in it."""
    subjects = "|".join(re.escape(one) for one in sorted(_texts(given), key=len, reverse=True))
    return bool(subjects) and re.match(rf"'?(?:{subjects})(?:/\S+)?'?(?:: |{_VERBS})", reason) is not None


def _texts(given: object) -> Iterator[str]:
    if isinstance(given, tuple):
        for one in given:
            yield from _texts(one)
    elif isinstance(given, str | Path) and str(given):
        yield from {str(given), str(Path(given))}
