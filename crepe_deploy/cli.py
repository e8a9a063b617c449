"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from . import __version__
from .commands.lines import quality_lines, report_lines, tensor_lines, width_lines
from .commands.options import json_option, options, overwrite_option, prepare, prune_options, say
from .commands.search import search_command
from .commands.tyr import tyr_options
from .errors import ConfigError, CrepeError

EXIT_INTERRUPTED = 130


_onnx_options = options(
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
@prune_options
@click.option("--format", "formats", default="dense", show_default=True, help="Any of dense,packed,int8,onnx.")
@_onnx_options
def prune_and_export_command(
    formats: str, out: Path, overwrite: bool, as_json: bool, flavor: str, precision: str, **given: Any
) -> None:
    """Prune MODEL and write OUT/FORMAT/ for each format, and OUT/report.json."""
    _prepare_libraries()
    from .exporting.onnx.support import OnnxOptions
    from .exporting.pipeline import check_formats, prune_and_export
    from .progress import progress

    names = check_formats([name.strip() for name in formats.split(",")])
    model, config, calibration = prepare(out=out, **given)
    with progress(f"pruning to {config.pattern} with {config.method}") as step:
        report = prune_and_export(
            model, out, config, calibration, formats=names, overwrite=overwrite, step=step,
            onnx=OnnxOptions(flavor, precision),
        )  # fmt: skip
    _print(report, as_json, report_lines(report))


@cli.command("prune")
@prune_options
def prune_command(out: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Prune MODEL into the Hugging Face folder OUT, with its manifest."""
    _prepare_libraries()
    from .progress import progress
    from .pruning.prune import prune

    model, config, calibration = prepare(out=out, **given)
    with progress(f"pruning to {config.pattern} with {config.method}") as step:
        manifest = prune(model, out, config, calibration, overwrite=overwrite, step=step)
    summary = {"out": str(out), "pattern": str(config.pattern), "method": config.method, **manifest.metrics}
    lines = [f"{out}: {manifest.metrics['sparsity_of_pruned_tensors']:.2%} zeros, verified"]
    _print(summary, as_json, lines + manifest.metrics.get("limits", []))


@cli.command("tyr")
@tyr_options
def tyr_command(layout: str, remote_code: bool, as_json: bool, **given: Any) -> None:
    """Remove whole KV groups and FFN neurons from MODEL: OUT/dense/ is a physically smaller checkpoint.

    The widths of the layers are searched, after Tyr-the-Pruner. Exit code 75 means stopped: the same command with
    --resume goes on.
    """
    _prepare_libraries()
    from .commands.tyr import lines, run
    from .exporting.tyr import FolderWriter

    report = run(FolderWriter(given["widths"], layout, remote_code), **given)
    _print(report, as_json, lines(report))


@cli.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Default: SOURCE/../FORMAT.")
@click.option("--format", "format_name", default="dense", show_default=True, help="dense, packed, int8, onnx or deci.")
@_onnx_options
@overwrite_option
@json_option
def export_command(
    source: Path, out: Path | None, format_name: str, flavor: str, precision: str, overwrite: bool, as_json: bool
) -> None:
    """Export the pruned checkpoint SOURCE into another format."""
    _prepare_libraries()
    from .exporting.onnx.support import OnnxOptions
    from .exporting.pipeline import export_checkpoint
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
@json_option
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
@json_option
def plan_command(
    model: str, sparsity: str, granularity: Any, calib_samples: int, calib_length: int, as_json: bool
) -> None:
    """Say what pruning MODEL will need and what each target will gain, without reading a weight."""
    from .commands.plan import lines, plan
    from .pattern import parse_pattern
    from .store.sources import resolve_model

    pattern = parse_pattern(sparsity, granularity)
    result = plan(resolve_model(model, say=say).folder, pattern, calib_samples, calib_length)
    _print(result, as_json, lines(result))


@cli.command("doctor")
@click.option("--retune", is_flag=True, help="Forget kernel speeds measured here, perhaps while it was busy.")
@json_option
def doctor_command(retune: bool, as_json: bool) -> None:
    """Say what this machine can run, which kernels will be used, and why."""
    from .commands.doctor import doctor, lines

    result = doctor(retune)
    _print(result, as_json, lines(result))


@cli.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def inspect_command(folder: Path, as_json: bool) -> None:
    """Count the zeros of every tensor in FOLDER, name the pattern that holds, and say the widths of uneven layers."""
    from .exporting.onnx.inspect import inspect_onnx, is_onnx
    from .store.audit import inspect_folder
    from .structural.check import describe

    onnx = is_onnx(folder)
    tensors = inspect_onnx(folder) if onnx else inspect_folder(folder)
    layers = None if onnx else describe(folder)
    document = {"folder": str(folder), "tensors": tensors, **({"layers": layers} if layers else {})}
    _print(document, as_json, [*tensor_lines(tensors), *width_lines(layers or [])])


@cli.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def verify_command(folder: Path, as_json: bool) -> None:
    """Compare every file of FOLDER with its manifest; exit 1 naming the file that differs.

    After structural pruning every tensor's shape is compared with config.json too.
    """
    from .store.manifest import verify
    from .structural.check import check_shapes, is_structural

    manifest = verify(folder)
    if is_structural(manifest):
        check_shapes(folder)
    summary = {"folder": str(folder), "files": len(manifest.files), "verified": True}
    _print(summary, as_json, [f"{folder}: {len(manifest.files)} files match the manifest"])


def _evaluate(
    *, model: Path, text: str | None, text_field: str, window: int, stride: int | None, max_tokens: int | None,
    bos: str, dtype: str, against: Path | None, tasks: str | None, task_dir: Path | None, limit: int | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    from .progress import progress
    from .quality.perplexity import evaluate
    from .quality.zeroshot import zero_shot

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


cli.add_command(search_command)


def interrupt_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does; workers that a library forks from it die of it without a word."""
    owner = os.getpid()

    def interrupt(number: int, _frame: Any) -> NoReturn:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def add_outer_commands() -> None:
    """Add the commands that live outside the core; their modules import nothing heavy."""
    from .bench.commands.bench import bench_command
    from .bench.commands.gate import gate_command
    from .bench.commands.report import report_command
    from .serve.command import serve_command

    cli.add_command(bench_command)
    cli.add_command(gate_command)
    cli.add_command(report_command)
    cli.add_command(serve_command)


def main() -> NoReturn:
    """Run the command line; every known failure is one line on stderr and its exit code."""
    add_outer_commands()
    interrupt_on_sigterm()
    try:
        cli(standalone_mode=False)
        code = 0
    except CrepeError as error:
        say(f"error: {error}")
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("stopped; nothing was left behind")
        code = EXIT_INTERRUPTED
    sys.exit(code)
