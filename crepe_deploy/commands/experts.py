"""The command `experts`, and the lines that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crepe_deploy.option_groups import Grouped

from .options import (
    Number,
    base_model_option,
    calibration_options,
    device_option,
    dtype_option,
    json_option,
    model_argument,
    options,
    overwrite_option,
    prepare_libraries,
    print_result,
    resumable_folder,
    resume_option,
    revision_option,
    say,
    seed_option,
)

EXAMPLES = """\b
Examples:
  crepe-deploy experts models/qwen3-moe --remove 0.25 --calib code.txt --calib traces.jsonl --out out
  crepe-deploy experts models/qwen3-moe --remove 0.5 --scores out/scores.safetensors --out half
  crepe-deploy experts models/qwen3-moe --remove 16 --method output-error --scores out/scores.safetensors --out less
"""

experts_options = options(
    model_argument,
    click.option("--out", type=click.Path(path_type=Path), required=True,
                 help="Folder for dense/, scores.safetensors and report.json."),
    click.option("--remove", type=Number(0, min_open=True), default=0.25, show_default=True,
                 help="Share of each layer's experts, below 1, or their number."),
    click.option("--method", type=click.Choice(["reap", "output-error", "frequency", "random"]), default="reap",
                 show_default=True, help="What says which experts go."),
    calibration_options(samples=128, length=2048),
    click.option("--scores", type=click.Path(path_type=Path), default=None, metavar="FILE",
                 help="OUT/scores.safetensors of an earlier run on MODEL, instead of --calib."),
    base_model_option,
    seed_option,
    dtype_option,
    device_option,
    revision_option,
    resume_option,
    overwrite_option,
    json_option,
)  # fmt: skip


@click.command("experts", cls=Grouped, epilog=EXAMPLES)
@experts_options
def experts_command(calib: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Remove whole experts from MODEL, a mixture of experts: OUT/dense/ loads wherever MODEL does.

    Every layer loses equally many. What was measured is kept, so that another share costs no second measurement.
    Exit code 75 means stopped: the same command with --resume goes on.
    """
    prepare_libraries()
    from crepe_deploy.api.experts import experts
    from crepe_deploy.api.inputs import Mixture
    from crepe_deploy.progress import progress

    with resumable_folder(options["out"]):
        report = experts(calib=Mixture(calib) if calib else None, show=progress, say=say, **options)
    print_result(report, as_json, lines(report))


def lines(report: dict[str, Any]) -> list[str]:
    """What `experts` did, for a reader at a terminal."""
    experts, sizes, used = report["experts"], report["parameters"], report["effective_experts"]
    unseen = report["unrouted"]
    text = [
        f"{experts['removed']} of {experts['before']} experts removed from each of {len(experts['layers'])} layers "
        f"with {report['method']}, {report['seconds']:.0f} s",
        f"parameters held {sizes['before']['held']:,} -> {sizes['after']['held']:,}, active for a token "
        f"{sizes['after']['active']:,}",
        f"experts used as if evenly, in a layer: {used['before']:.1f} -> {used['after']:.1f}",
    ]
    if unseen["experts"]:
        text.append(f"{unseen['experts']} experts saw no calibration token; {unseen['kept']} of them stay")
    if experts["left_whole"]:
        text.append(
            f"layer {', '.join(map(str, experts['left_whole']))} (multi-token prediction) is as it was, with all its "
            "experts: serve without it"
        )
    return [*text, f"{report['out']}/dense: written and verified"]
