"""What several commands share: options, what is printed, how a stop is said. Imports nothing heavy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from crepe_deploy.errors import ConfigError, Stopped
from crepe_deploy.limits import MOST, MOST_SEED
from crepe_deploy.option_groups import MODEL, Argument
from crepe_deploy.store.files import to_json
from crepe_deploy.store.reading import parse_value

from . import completion

Command = TypeVar("Command", bound=Callable[..., Any])
SEED = click.IntRange(0, MOST_SEED)


class Count(click.IntRange):
    """A whole number that fits a C int, from `low` on."""

    def __init__(self, low: int, high: int = MOST) -> None:
        super().__init__(low, high)


class Finite(click.types.FloatParamType):
    """A fraction that is a number, neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, and refuse what has no place on a line."""
        return _finite(super().convert(value, param, ctx), value, param, ctx)


class Number(click.FloatRange):
    """Such a fraction within limits."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, and refuse what has no place on a line."""
        return _finite(super().convert(value, param, ctx), value, param, ctx)


def _finite(number: float, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
    if not math.isfinite(number):
        raise click.BadParameter(f"{value} is no finite number", ctx=ctx, param=param)
    return number


def say(message: str) -> None:
    """One line on stderr."""
    click.echo(message, err=True)


def print_result(result: Mapping[str, Any], as_json: bool, lines: list[str]) -> None:
    """On stdout: the result as one JSON document, or lines for a person."""
    click.echo(to_json(result) if as_json else "\n".join(lines))


def prepare_libraries() -> None:
    """Before torch is imported: threads that sleep at barriers, and no progress bars but ours.

    OpenMP threads that spin there make a machine with other work on it slower by orders of magnitude, and an idle one
    faster by a tenth. Servers and measurements keep the library's own setting.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from transformers.utils import logging

    logging.disable_progress_bar()


NOTHING_YET: Final = "stopped before the first piece (block, layer, file or round) was whole: nothing was left behind"


@contextmanager
def resumable(journal: Path) -> Iterator[None]:
    """A stop becomes `Stopped` where there is a journal to go on from, and elsewhere says why there is none."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not journal.is_file():
            raise KeyboardInterrupt(NOTHING_YET) from stop
        raise Stopped("stopped; the same command with --resume goes on") from stop


def resumable_folder(out: Path) -> AbstractContextManager[None]:
    """A stop becomes `Stopped` where OUT.work has a journal to go on from."""
    from crepe_deploy.store.work import JOURNAL, work_folder

    return resumable(work_folder(out) / JOURNAL)


def options(*several: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator."""

    def decorate(command: Command) -> Command:
        for option in reversed(several):
            command = option(command)
        return command

    return decorate


def calibration_options(
    *, samples: int | None, length: int | None, required: bool = False, left_out: str = ""
) -> Callable[[Command], Command]:
    """The calibration text and how much of it is read; samples, length: the defaults, or None and `left_out` says."""
    return options(
        click.option("--calib", multiple=True, required=required, metavar="FILE_OR_DATASET",
                     shell_complete=completion.one_of("self", or_file=True),
                     help="Calibration text: .txt, .jsonl, .parquet, a datasets name, or self: the model writes it. "
                          "Several give equal shares."),
        click.option("--calib-field", default="text", show_default=True,
                     help="Field of .jsonl, .parquet or dataset rows."),
        click.option("--calib-samples", type=Count(1), default=samples, show_default=True,
                     help=f"Windows that are drawn.{left_out}"),
        click.option("--calib-length", type=Count(2), default=length, show_default=True,
                     help="Tokens in each sample, clipped to the model's context."),
    )  # fmt: skip


model_argument = click.argument("model", cls=Argument, shell_complete=completion.files, help=MODEL)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
base_model_option = click.option(
    "--base-model", default=None, metavar="OWNER/NAME", help="Hub id of the parent, for the model card."
)
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N",
    help="To compute on; auto: the first GPU that torch sees, else the CPU.",
)  # fmt: skip
dtype_option = click.option(
    "--dtype", default="auto", show_default=True, shell_complete=completion.dtypes,
    help="To compute in: auto (the checkpoint's), bfloat16, float16, float32.",
)  # fmt: skip
seed_option = click.option("--seed", type=SEED, default=0, show_default=True, help="Of all that is drawn at random.")
text_field_option = click.option(
    "--text-field", default="text", show_default=True, help="Field of .jsonl, .parquet or dataset rows."
)
resume_option = click.option("--resume", is_flag=True, help="Go on with OUT.work of a stopped run.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")

revision_option = click.option("--revision", default=None, help="Branch, tag or commit of a hub model.")
_granularity_option = click.option(
    "--granularity", type=click.Choice(["row", "matrix"]), default="row", show_default=True,
    help="Where a fraction of zeros is counted.",
)  # fmt: skip
sparsity_options = options(
    click.option("--sparsity", default="2:4", show_default=True, help="N:M (N kept of M) or a fraction of zeros."),
    _granularity_option,
)  # fmt: skip
chosen_sparsity_options = options(
    click.option("--target", type=click.Choice(["auto", "cpu", "gpu"]), default=None,
                 help="Where it will be served: pattern, recipe, text and formats that are left out are chosen for it, "
                 "and said. Default: auto, this machine; of a named method, step or layers only text is chosen."),
    click.option("--sparsity", default=None,
                 help="N:M (N kept of M) or a fraction of zeros. Default: 16:32 for a CPU, 2:4 for a GPU, 2:4 beside a "
                 "named method."),
    _granularity_option,
)  # fmt: skip


heal_option = click.option(
    "--heal", type=Number(0, min_open=True), default=None, metavar="MINUTES",
    help="Train what was pruned on the calibration text for so long, zeros held, as the command heal does.",
)  # fmt: skip


def healed_line(healed: Mapping[str, Any]) -> str:
    """What healing did, from the manifest's entry."""
    kl = healed["held_out_kl"]
    return (
        f"held-out KL to the dense model (lower is better) {kl['before']:.4f} -> {kl['after']:.4f} after "
        f"{healed['steps']} steps, {healed['tokens']:,} tokens, {healed['seconds']:.0f} s"
    )


class _FormatOption(click.Option):
    """`--format`, whose help names the formats as the registry has them when it is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The names of the option and its help."""
        from crepe_deploy.exporting.registry import EXPORTERS

        help_text = self.help
        self.help = (
            f"{help_text} {', '.join(EXPORTERS)}. deci: DeciLM's layout of widths per layer (tyr), for stock vLLM."
        )
        try:
            return super().get_help_record(ctx)
        finally:
            self.help = help_text


def format_option(meaning: str, default: str | None = "dense") -> Callable[[Command], Command]:
    """`--format`; meaning: what comes before the names of the formats in its help."""
    return click.option(
        "--format",
        cls=_FormatOption,
        default=default,
        show_default=True,
        help=meaning,
        shell_complete=completion.formats,
    )


onnx_options = options(
    click.option("--onnx-flavor", default=None,
                 help="portable (default): one graph for any runtime; genai: onnxruntime-genai's, faster, no padding."),
    click.option("--precision", default=None, help="Of an ONNX graph: fp32 (default), fp16 or int4."),
)  # fmt: skip

quantise_option = click.option(
    "--quantise", default=None, help="Of a GGUF file: auto (default, as stored), f32, f16, bf16, q8_0, q5_0 or q4_0."
)

repair_option = click.option(
    "--repair", default=None, metavar="STEP", shell_complete=completion.steps["repair"],
    help="block: tune what is kept of each block to the dense model's output behind it.",
)  # fmt: skip

values_option = click.option(
    "--values", default=None, metavar="STEP", shell_complete=completion.steps["values"],
    help="int8, or int4[:group=128]: kept weights become codes times scales, each error made up for by the columns "
    "behind; rounding=nearest: by none. With --sparsity 0 nothing is pruned.",
)  # fmt: skip

prune_options = options(
    model_argument,
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Output folder; must not exist."),
    click.option("--method", default=None, shell_complete=completion.methods,
                 help="crepe, ria, wanda, sparsegpt or magnitude. Default: --recipe best, or crepe where --sparsity, "
                 "--calib and --format are all given."),
    chosen_sparsity_options,
    click.option("--preset", default=None, shell_complete=completion.shipped("presets"),
                 help="Named or JSON-file hyperparameters; crepe's default is 'default'."),
    click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="One hyperparameter of the method."),
    click.option("--feed", type=click.Choice(["auto", "dense", "pruned", "both"]), default=None,
                 help="Whose output calibrates the next block; auto, the default: the better one for the method."),
    click.option("--recipe", default=None, shell_complete=completion.shipped("recipes"),
                 help="Method and steps from a named recipe or a YAML file; options go before it."),
    click.option("--allocate", default=None, metavar="STEP", shell_complete=completion.steps["allocate"],
                 help="owl, alpha or error: layers keep different shares."),
    click.option("--permute", default=None, metavar="STEP", shell_complete=completion.steps["permute"],
                 help="fold: reorder channels where that costs nothing."),
    click.option("--reprune", default=None, metavar="STEP", shell_complete=completion.steps["reprune"],
                 help="dsnot, dsnot-ria or swaps, inside rows and groups."),
    click.option("--reconstruct", default=None, metavar="STEP", shell_complete=completion.steps["reconstruct"],
                 help="exact, obs or admm: fit kept weights to the output. STEP is NAME[:PARAMETER=VALUE,...]."),
    repair_option,
    click.option("--rescale", default=None, metavar="STEP", shell_complete=completion.steps["rescale"],
                 help="logits: fit their scale to the dense model on held-out calibration windows."),
    values_option,
    calibration_options(samples=None, length=None,
                        left_out=" Default, with the length: 128 x 2048; 64 x 512 where --calib is left out."),
    seed_option,
    click.option("--include", default=None, metavar="REGEX", help="Prune only tensors whose name matches."),
    click.option("--exclude", default=None, metavar="REGEX", help="Leave tensors whose name matches dense."),
    dtype_option,
    device_option,
    revision_option,
    resume_option,
    overwrite_option,
    json_option,
)  # fmt: skip


def values(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `prune` as its function takes them: texts as a `Mixture`, `--param NAME=VALUE` as a dictionary."""
    from crepe_deploy.api.inputs import Mixture

    calib = Mixture(options["calib"]) if options["calib"] else None
    return {**options, "calib": calib, "params": _parse_params(options["params"])}


def _parse_params(params: tuple[str, ...]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for param in params:
        name, equals, value = param.partition("=")
        if not equals:
            raise ConfigError(f"--param {param} is not NAME=VALUE")
        parsed[name] = parse_value(value)
    return parsed
