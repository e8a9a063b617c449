"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from . import __version__
from .errors import ConfigError, CrepeError
from .present import quality_lines, report_lines, tensor_lines

if TYPE_CHECKING:
    from .prune import PruneConfig
    from .sources import Model
    from .texts import CalibrationSet

EXIT_INTERRUPTED = 130
Command = TypeVar("Command", bound=Callable[..., Any])


def _say(message: str) -> None:
    click.echo(message, err=True)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
_overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")

_prune_options = _options(
    click.argument("model"),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Output folder; must not exist."),
    click.option("--method", default=None, help="crepe (default), ria, wanda, sparsegpt or magnitude."),
    click.option("--sparsity", default="2:4", show_default=True, help="N:M (N kept of M) or a fraction of zeros."),
    click.option("--granularity", type=click.Choice(["row", "matrix"]), default="row", show_default=True,
                 help="Where a fraction of zeros is counted."),
    click.option("--preset", default=None, help="Named or JSON-file hyperparameters; crepe's default is 'default'."),
    click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="One hyperparameter of the method."),
    click.option("--feed", type=click.Choice(["auto", "dense", "pruned"]), default="auto", show_default=True,
                 help="Whose output calibrates the next block; auto: the better one for the method."),
    click.option("--calib", default=None, metavar="FILE_OR_DATASET",
                 help="Calibration text: .txt, .jsonl, .parquet or a datasets name."),
    click.option("--calib-field", default="text", show_default=True, help="Field of .jsonl, .parquet or dataset rows."),
    click.option("--calib-samples", type=click.IntRange(1), default=128, show_default=True),
    click.option("--calib-length", type=click.IntRange(2), default=2048, show_default=True,
                 help="Tokens in each sample, clipped to the model's context."),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--include", default=None, metavar="REGEX", help="Prune only tensors whose name matches."),
    click.option("--exclude", default=None, metavar="REGEX", help="Leave tensors whose name matches dense."),
    click.option("--dtype", default="auto", show_default=True, help="To compute in: auto, bfloat16, float16, float32."),
    click.option("--revision", default=None, help="Branch, tag or commit of a hub model."),
    _overwrite_option,
    _json_option,
)  # fmt: skip

_onnx_options = _options(
    click.option("--onnx-flavor", "flavor", default="portable", show_default=True,
                 help="portable: one graph for any runtime; genai: onnxruntime-genai's, faster, no padding."),
    click.option("--precision", default="fp32", show_default=True, help="Of an ONNX graph: fp32, fp16 or int4."),
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Prune language models after training; export, prove and measure the result.

    Exit codes: 0 done, 1 tool error, 2 usage or invalid input, 3 gate failed, 4 gate inconclusive,
    75 stopped and resumable, 130 stopped with nothing left behind.
    """


@cli.command("prune-and-export")
@_prune_options
@click.option("--format", "formats", default="dense", show_default=True, help="Any of dense,packed,int8,onnx.")
@_onnx_options
def prune_and_export_command(
    formats: str, out: Path, overwrite: bool, as_json: bool, flavor: str, precision: str, **options: Any
) -> None:
    """Prune MODEL and write OUT/FORMAT/ for each format, and OUT/report.json."""
    _prepare_libraries()
    from .export.onnx.support import OnnxOptions
    from .export.pipeline import check_formats, prune_and_export
    from .progress import progress

    names = check_formats([name.strip() for name in formats.split(",")])
    model, config, calibration = _prepare(out=out, **options)
    with progress(f"pruning to {config.pattern} with {config.method}") as step:
        report = prune_and_export(
            model, out, config, calibration, formats=names, overwrite=overwrite, step=step,
            onnx=OnnxOptions(flavor, precision),
        )  # fmt: skip
    _print(report, as_json, report_lines(report))


@cli.command("prune")
@_prune_options
def prune_command(out: Path, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Prune MODEL into the Hugging Face folder OUT, with its manifest."""
    _prepare_libraries()
    from .progress import progress
    from .prune import prune

    model, config, calibration = _prepare(out=out, **options)
    with progress(f"pruning to {config.pattern} with {config.method}") as step:
        manifest = prune(model, out, config, calibration, overwrite=overwrite, step=step)
    summary = {"out": str(out), "pattern": str(config.pattern), "method": config.method, **manifest.metrics}
    _print(summary, as_json, [f"{out}: {manifest.metrics['sparsity_of_pruned_tensors']:.2%} zeros, verified"])


@cli.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Default: SOURCE/../FORMAT.")
@click.option("--format", "format_name", default="dense", show_default=True, help="dense, packed, int8 or onnx.")
@_onnx_options
@_overwrite_option
@_json_option
def export_command(
    source: Path, out: Path | None, format_name: str, flavor: str, precision: str, overwrite: bool, as_json: bool
) -> None:
    """Export the pruned checkpoint SOURCE into another format."""
    _prepare_libraries()
    from .export.onnx.support import OnnxOptions
    from .export.pipeline import export_checkpoint
    from .progress import progress

    target = out if out is not None else source.resolve().parent / format_name
    with progress(f"exporting as {format_name}") as step:
        onnx = OnnxOptions(flavor, precision)
        manifest = export_checkpoint(source, target, format_name, overwrite=overwrite, step=step, onnx=onnx)
    summary = {"out": str(target), "format": manifest.format, "size": manifest.metrics["size"]}
    _print(summary, as_json, [f"{target}: {manifest.format}, verified"])


@cli.command("eval")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", default=None, help="Evaluation text: .txt, .jsonl, .parquet or a datasets name.")
@click.option("--text-field", default="text", show_default=True)
@click.option("--window", type=click.IntRange(2), default=2048, show_default=True, help="Tokens in each window.")
@click.option("--stride", type=click.IntRange(1), default=None, help="Default: the window, without overlap.")
@click.option("--max-tokens", type=click.IntRange(2), default=None, help="Score only the first tokens.")
@click.option("--bos", default="auto", show_default=True, help="auto, none or window.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--against", type=click.Path(path_type=Path), default=None, help="The dense model, for paired KL.")
@click.option("--tasks", default=None, help="Comma-separated zero-shot tasks, through lm-eval.")
@click.option("--task-dir", type=click.Path(path_type=Path), default=None, help="Local task files, for offline use.")
@click.option("--limit", type=click.IntRange(1), default=None, help="Documents of each task.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@_json_option
def eval_command(as_json: bool, **options: Any) -> None:
    """Measure MODEL: perplexity, KL to a dense model, zero-shot accuracy; each with its convention."""
    _prepare_libraries()
    result = _evaluate(**options)
    _print(result, as_json, quality_lines(result))


@cli.command("plan")
@click.argument("model")
@click.option("--sparsity", default="2:4", show_default=True)
@click.option("--granularity", type=click.Choice(["row", "matrix"]), default="row", show_default=True)
@click.option("--calib-samples", type=click.IntRange(1), default=128, show_default=True)
@click.option("--calib-length", type=click.IntRange(2), default=2048, show_default=True)
@_json_option
def plan_command(
    model: str, sparsity: str, granularity: Any, calib_samples: int, calib_length: int, as_json: bool
) -> None:
    """Say what pruning MODEL will need and what each target will gain, without reading a weight."""
    from .pattern import parse_pattern
    from .plan import lines, plan
    from .sources import resolve_model

    pattern = parse_pattern(sparsity, granularity)
    result = plan(resolve_model(model, say=_say).folder, pattern, calib_samples, calib_length)
    _print(result, as_json, lines(result))


@cli.command("doctor")
@click.option("--retune", is_flag=True, help="Forget kernel speeds measured here, perhaps while it was busy.")
@_json_option
def doctor_command(retune: bool, as_json: bool) -> None:
    """Say what this machine can run, which kernels will be used, and why."""
    from .doctor import doctor, lines

    result = doctor(retune)
    _print(result, as_json, lines(result))


@cli.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
@_json_option
def inspect_command(folder: Path, as_json: bool) -> None:
    """Count the zeros of every tensor in FOLDER and name the pattern that holds."""
    from .audit import inspect_folder
    from .export.onnx.inspect import inspect_onnx, is_onnx

    tensors = inspect_onnx(folder) if is_onnx(folder) else inspect_folder(folder)
    _print({"folder": str(folder), "tensors": tensors}, as_json, tensor_lines(tensors))


@cli.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@_json_option
def verify_command(folder: Path, as_json: bool) -> None:
    """Compare every file of FOLDER with its manifest; exit 1 naming the file that differs."""
    from .manifest import verify

    manifest = verify(folder)
    summary = {"folder": str(folder), "files": len(manifest.files), "verified": True}
    _print(summary, as_json, [f"{folder}: {len(manifest.files)} files match the manifest"])


def _prepare(
    *, model: str, out: Path, method: str | None, sparsity: str, granularity: Any, preset: str | None,
    params: tuple[str, ...], feed: Any, include: str | None, exclude: str | None, dtype: str,
    revision: str | None, **calibration: Any,
) -> tuple[Model, PruneConfig, CalibrationSet | None]:  # fmt: skip
    """Resolve options into the pipeline's arguments; whatever can be refused early is."""
    from .methods import get_method
    from .methods.presets import resolve_method
    from .pattern import parse_pattern
    from .prune import PruneConfig
    from .sources import require_pinned, resolve_model

    pattern = parse_pattern(sparsity, granularity)
    name, resolved, preset_name = resolve_method(method, preset, _parse_params(params))
    needs = get_method(name, **resolved).needs
    found = resolve_model(model, revision, _say)
    require_pinned(revision, found)
    config = PruneConfig(name, pattern, resolved, preset_name, feed, include, exclude, dtype)
    return found, config, _calibration(found.folder, **calibration) if needs else None


def _calibration(
    folder: Path, *, calib: str | None, calib_field: str, calib_samples: int, calib_length: int, seed: int
) -> CalibrationSet:
    from .families import load_config
    from .texts import calibration_windows, load_tokenizer

    if calib is None:
        raise ConfigError("this method needs calibration text: give --calib FILE_OR_DATASET")
    context = int(getattr(load_config(folder), "max_position_embeddings", calib_length))
    length = min(calib_length, context)
    return calibration_windows(calib, load_tokenizer(folder), calib_samples, length, seed=seed, field=calib_field)


def _evaluate(
    *, model: Path, text: str | None, text_field: str, window: int, stride: int | None, max_tokens: int | None,
    bos: str, dtype: str, against: Path | None, tasks: str | None, task_dir: Path | None, limit: int | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    from .progress import progress
    from .quality import evaluate
    from .zeroshot import zero_shot

    if text is None and tasks is None:
        raise ConfigError("nothing to measure: give --text FILE_OR_DATASET, --tasks NAMES, or both")
    result: dict[str, Any] = {"model": str(model)}
    if text is not None:
        with progress("scoring windows") as step:
            result |= evaluate(
                model, text, field=text_field, window=window, stride=stride, max_tokens=max_tokens, dtype=dtype,
                bos=bos, against=against, seed=seed, progress=step,
            ).to_dict()  # fmt: skip
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",")]
        result["tasks"] = zero_shot(model, names, task_dir=task_dir, limit=limit, against=against).to_dict()
    return result


def _parse_params(params: tuple[str, ...]) -> dict[str, Any]:
    parsed = {}
    for param in params:
        name, equals, value = param.partition("=")
        if not equals:
            raise ConfigError(f"--param {param} is not NAME=VALUE")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


def _print(document: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(lines))


def _prepare_libraries() -> None:
    """Before torch is imported: threads that sleep at barriers, and no progress bars but ours.

    OpenMP threads that spin there make a machine with other work on it slower by orders of magnitude, and an idle one
    faster by a tenth. Servers and measurements keep the library's own setting.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def add_outer_commands() -> None:
    """Add the commands that live outside the core; their modules import nothing heavy."""
    from .bench.command import bench_command
    from .bench.gate_command import gate_command
    from .bench.report_command import report_command
    from .serve.command import serve_command

    cli.add_command(bench_command)
    cli.add_command(gate_command)
    cli.add_command(report_command)
    cli.add_command(serve_command)


def main() -> NoReturn:
    """Run the command line; every known failure is one line on stderr and its exit code."""
    add_outer_commands()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        cli(standalone_mode=False)
        code = 0
    except CrepeError as error:
        _say(f"error: {error}")
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("stopped; nothing was left behind")
        code = EXIT_INTERRUPTED
    sys.exit(code)
