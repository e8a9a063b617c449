"""The command `tyr`, and the lines that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crepe_deploy.option_groups import Grouped

from .options import (
    Count,
    Finite,
    base_model_option,
    calibration_options,
    device_option,
    dtype_option,
    heal_option,
    healed_line,
    json_option,
    model_argument,
    options,
    overwrite_option,
    prepare_libraries,
    print_result,
    repair_option,
    resumable_folder,
    resume_option,
    revision_option,
    say,
    seed_option,
)

EXAMPLES = """\b
Examples:
  crepe-deploy tyr models/llama --sparsity 0.25 --out out
  crepe-deploy tyr models/llama --sparsity 0.25 --calib wiki.txt --out out
  crepe-deploy tyr models/llama --widths uniform --calib wiki.txt --calib c4.txt --out out
  crepe-deploy tyr models/llama --sparsity 0.25 --calib wiki.txt --repair block --heal 30 --out out
  crepe-deploy tyr models/llama --layout deci --calib wiki.txt --search-samples 8 --out out
  crepe-deploy tyr models/llama --sparsity 0.25 --calib wiki.txt --out out --resume
"""


def _share(context: click.Context, parameter: click.Parameter, value: str | None) -> float | str | None:
    """A number where it is one; which names there are is the configuration's to say."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


tyr_options = options(
    model_argument,
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for dense/ and report.json."),
    click.option("--sparsity", type=Finite(), default=0.5, show_default=True,
                 help="Share of the decoder layers' linear parameters to remove, keys and values included; embeddings, "
                 "norms and lm_head stay whole and are not counted, as in the paper."),
    click.option("--method", type=click.Choice(["tyr", "flap", "uniform", "magnitude", "random"]), default="tyr",
                 show_default=True, help="tyr searches the widths; the others are baselines with as many parameters."),
    click.option("--widths", type=click.Choice(["per-layer", "uniform"]), default="per-layer", show_default=True,
                 help="uniform: one width for all layers, a plain checkpoint for any server."),
    calibration_options(samples=16, length=512, left_out=" Without --calib the model writes them (self)."),
    click.option("--search-samples", type=Count(0), default=0, show_default=True,
                 help="Further windows that only the search sees; 0: it sees the calibration samples."),
    click.option("--iterations", type=Count(1, 8), default=4, show_default=True,
                 help="Of building and searching; level steps are 12.5 %, halved by each."),
    click.option("--generations", type=Count(1), default=10, show_default=True, help="Of each iteration."),
    click.option("--offspring", type=Count(1), default=16, show_default=True, help="Of each generation."),
    click.option("--ffn-multiple", type=Count(1), default=128, show_default=True,
                 help="FFN neurons come and go in so many."),
    click.option("--attention", type=click.Choice(["auto", "groups", "queries"]), default="auto", show_default=True,
                 help="Unit of per-layer widths: whole KV groups, or a query head of every group; auto: groups where a "
                 "layer has at least four."),
    click.option("--attention-share", default=None, callback=_share, metavar="best|target|NUMBER",
                 help="Share of attention units that per-layer widths keep, the FFN taking the rest of the budget: a "
                 "number; target: as of everything, like the paper; best: of a few even splits that are judged first. "
                 "Default: best for tyr, target for the baselines."),
    click.option("--accumulation", type=click.Choice(["expectation", "uniform", "single", "none"]),
                 default="expectation", show_default=True, help="What the next block is fed in a supernet."),
    click.option("--variant", type=click.Choice(["paper", "code", "obs"]), default=None,
                 help="Saliency: the paper's, its public code's, or the Hessian term alone."),
    click.option("--fitness", type=click.Choice(["logits", "hidden"]), default="logits", show_default=True,
                 help="KL over the top-k logits, or the distance of hidden states."),
    click.option("--top-k", type=Count(1), default=1024, show_default=True, help="Logits that are compared."),
    click.option("--refit/--no-refit", default=None, help="Default: refit for tyr and uniform."),
    click.option("--finish", type=click.Choice(["paired", "single", "supernet"]), default="single", show_default=True,
                 help="How the found widths are pruned at the end: aiming at each layer's own output, at the dense "
                 "model's, or as the last supernet has them."),
    repair_option,
    click.option("--layout", type=click.Choice(["plugin", "deci"]), default="plugin", show_default=True,
                 help="Of per-layer widths: for readers with crepe-deploy installed, or DeciLM's for stock vLLM."),
    click.option("--remote-code", is_flag=True, help="Put modelling files beside per-layer weights."),
    heal_option,
    seed_option,
    dtype_option,
    device_option,
    revision_option,
    resume_option,
    base_model_option,
    overwrite_option,
    json_option,
)  # fmt: skip


@click.command("tyr", cls=Grouped, epilog=EXAMPLES)
@tyr_options
def tyr_command(out: Path, calib: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Remove whole KV groups and FFN neurons from MODEL: OUT/dense/ is a physically smaller checkpoint.

    The widths of the layers are searched, after Tyr-the-Pruner. Exit code 75 means stopped: the same command with
    --resume goes on.
    """
    prepare_libraries()
    from crepe_deploy.api.inputs import Mixture
    from crepe_deploy.api.tyr import tyr
    from crepe_deploy.progress import progress

    with resumable_folder(out):
        report = tyr(out=out, calib=Mixture(calib) if calib else None, show=progress, say=say, **options)
    print_result(report, as_json, lines(report))


def lines(report: dict[str, Any]) -> list[str]:
    """What `tyr` did, for a reader at a terminal."""
    parameters, reached = report["parameters"], report["sparsity"]["reached"]
    layers = report["layers"]
    text = [
        f"{reached:.2%} of {parameters['dense']:,} linear parameters removed with {report['method']}, "
        f"{parameters['kept']:,} left, {report['seconds']['all']:.0f} s",
    ]
    if report["widths"] == "uniform":
        text.append(f"every layer: {_layer(layers[0])}")
    else:
        text += [f"  layer {index}: {_layer(layer)}" for index, layer in enumerate(layers)]
    if repair := report.get("repair"):
        before, after = (sum(layer[name] for layer in repair) / len(repair) for name in ("before", "after"))
        text.append(
            f"mean relative error of a block on held-out windows (lower is better) {before:.4f}, "
            f"after repair {after:.4f}"
        )
    if healed := report.get("healed"):
        text.append(healed_line(healed))
    return [*text, f"{report['out']}/dense: written and verified"]


def _layer(layer: dict[str, int]) -> str:
    return f"{layer['heads']} query heads, {layer['kv_heads']} KV heads, {layer['intermediate_size']} FFN neurons"
