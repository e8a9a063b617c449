"""The demo: one model pruned weakly and well, healed, packed, served and compared, with the commands a user would type.

    python -m crepe_deploy.bench.demo [--heal MINUTES] [--all] [--out out/demo] [--json FILE]

Model: SmolLM2-135M-Instruct, dequantised Q4_1, calibrated on c4 train and scored on wiki test, or your own by --model,
--calib and --text. What is in OUT from an earlier run is replaced; nothing else is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import ServeError
from ..progress import Say
from ..store.files import require_disk, write_json, write_text
from ..store.manifest import load_manifest
from .assets import DEFAULT_DIR, MODEL_NAME, ensure_assets
from .demo_shown import draw, markdown, show
from .run.processes import crepe_deploy
from .run.result import load_run
from .run.summary import gain


@dataclass(frozen=True)
class Run:
    """One pruned model. how: its options. windows: of calibration text. minutes: on two idle cores, with scoring."""

    name: str
    how: tuple[str, ...]
    pattern: str
    formats: str = "dense"
    windows: int = 16
    minutes: float = 1

    @property
    def folder(self) -> str:
        """Of its exports, inside OUT."""
        return f"{self.name}-{self.pattern}".replace(" ", "-").replace(":", "of")


STORY = (
    Run("ria", ("--method", "ria"), "16:32"),
    Run("crepe", ("--method", "crepe"), "16:32"),
    Run("recipe best", ("--recipe", "best"), "16:32", "dense,packed", 64, 13),
)
OTHERS = (
    *(Run(method, ("--method", method), "2:4") for method in ("magnitude", "wanda", "ria", "sparsegpt")),
    Run("crepe", ("--method", "crepe"), "2:4", "dense,packed"),
)
BEST = STORY[-1]
HEALED = Run("recipe best, healed", (), BEST.pattern, "packed")


@dataclass(frozen=True)
class Settings:
    """What is pruned, on which text, scored on which; how much of it, and how decoding is measured."""

    name: str
    model: Path
    calib: Path
    text: Path
    length: int = 512
    windows: int | None = None  # of calibration text for every run, in place of its own number
    evaluation: tuple[str, ...] = ("--window", "512", "--max-tokens", "8192")
    decoding: tuple[str, ...] = ("--points", "1x64+33", "--rounds", "5")  # batch 1, prompts of 64 tokens, 32 steps
    healing: tuple[str, ...] = ()


PROMPTS = ("The capital of France is", "To make a cup of tea, first", "The moon is")
NEW_TOKENS = 24
SERVING_MINUTES = 6  # starting vLLM for the speed, and again to answer


def announce(settings: Settings, out: Path, runs: Sequence[Run], heal: float | None, serve: bool, say: Say) -> None:
    """Say what it will take before anything is done. Raises DiskFullError where there is no room."""
    size = sum(path.stat().st_size for path in settings.model.glob("*.safetensors"))
    checkpoints = sum(1 + 0.7 * ("packed" in run.formats) for run in runs) + 1.7 * (heal is not None)
    room = int(size * (checkpoints + 2))  # and while one is written
    minutes = sum(run.minutes for run in runs) + (0 if heal is None else heal + 2) + SERVING_MINUTES * serve
    say(
        f"{settings.name}: {len(runs)} pruned models{'' if heal is None else ', one of them healed'}, in {out}/: "
        f"at most {room / 1e9:.1f} GB, and for {MODEL_NAME} about {minutes:.0f} minutes on two idle cores"
    )
    out.mkdir(parents=True, exist_ok=True)
    require_disk(out, room)


def measure(
    settings: Settings, out: Path, runs: Sequence[Run], heal: float | None, serve: bool, say: Say
) -> dict[str, Any]:
    """Prune, score and serve every one of `runs`; returns rows and the conditions they were measured under."""
    dense = crepe_deploy("eval", str(settings.model), "--text", str(settings.text), *settings.evaluation)
    rows = [
        {"method": "dense", "pattern": "-", "sparsity": 0.0, **_quality(dense.output), **_size(settings.model)},
        *(_pruned(settings, out, run, f"[{place}/{len(runs)}]", say) for place, run in enumerate(runs, 1)),
    ]
    if heal is not None:
        rows.append(_healed(settings, out, heal, say))
    result = {
        "model": settings.name,
        "calibration": f"{settings.calib.name}, windows of {settings.length} tokens, seed 0",
        "evaluation": f"{settings.text.name}, {' '.join(settings.evaluation)}",
        "dtype": dense.output["convention"]["dtype"],
        "cores": os.cpu_count(),
        "rows": rows,
    }
    if serve:
        say("measuring the speed of the packed checkpoints in vLLM")
        _add_decode_speed(result, settings, out)
    result["sentences"] = _sentences(settings, out, heal)
    return result


def _pruned(settings: Settings, out: Path, run: Run, place: str, say: Say) -> dict[str, Any]:
    say(f"{place} {run.name} {run.pattern}")
    folder, windows = out / run.folder, settings.windows or run.windows
    pruned = crepe_deploy(
        "prune-and-export", str(settings.model), "--out", str(folder), "--overwrite", *run.how,
        "--sparsity", run.pattern, "--calib", str(settings.calib), "--calib-samples", str(windows),
        "--calib-length", str(settings.length), "--seed", "0", "--format", run.formats,
    )  # fmt: skip
    row = {"method": run.name, "pattern": run.pattern, "sparsity": pruned.output["sparsity_of_pruned_tensors"]}
    cost = {"windows": windows, "seconds": pruned.seconds, "peak_bytes": pruned.peak_bytes}
    served = folder / run.formats.split(",")[-1]
    return row | _against(settings, folder / "dense") | cost | _size(served) | {"folder": str(served)}


def _healed(settings: Settings, out: Path, minutes: float, say: Say) -> dict[str, Any]:
    """Train the recipe's model towards the dense one, zeros held, pack it, and return its row."""
    say(f"healing what the recipe left, for {minutes:g} minutes")
    source, folder = out / BEST.folder / "dense", out / HEALED.folder / "dense"
    folder.parent.mkdir(exist_ok=True)
    trained = crepe_deploy(
        "heal", str(source), "--dense", str(settings.model), "--text", str(settings.calib), "--minutes", str(minutes),
        *settings.healing, "--out", str(folder), "--overwrite",
    )  # fmt: skip
    packed = folder.with_name("packed")
    crepe_deploy("export", str(folder), "--format", "packed", "--out", str(packed), "--overwrite")
    sparsity = load_manifest(folder).metrics["sparsity_of_pruned_tensors"]
    row = {"method": HEALED.name, "pattern": HEALED.pattern, "sparsity": sparsity}
    cost = {"seconds": trained.seconds, "peak_bytes": trained.peak_bytes}
    return row | _against(settings, folder) | cost | _size(packed) | {"folder": str(packed)}


def _against(settings: Settings, folder: Path) -> dict[str, Any]:
    arguments = ("--text", str(settings.text), *settings.evaluation, "--against", str(settings.model))
    return _quality(crepe_deploy("eval", str(folder), *arguments).output)


def _add_decode_speed(result: dict[str, Any], settings: Settings, out: Path) -> None:
    """Measure the packed exports beside the dense model in vLLM; puts `decode_gain` into their rows."""
    rows, path, dense = (
        [row for row in result["rows"] if row["format"] == "packed"],
        out / "decode.json",
        settings.model,
    )
    path.unlink(missing_ok=True)
    folders = [row["folder"] for row in rows]
    crepe_deploy("bench", str(dense), *folders, "--baseline", str(dense), *settings.decoding, "--out", str(path))
    run = load_run(path)
    by_folder = {Path(candidate.folder).resolve(): candidate for candidate in run.candidates}
    for row in rows:
        speed = gain(run, by_folder[Path(row["folder"]).resolve()], run.workload.points[0].name, "tpot_s")
        row["decode_gain"] = speed and speed.model_dump()
    result["decoding"] = " ".join(settings.decoding) + f", {run.environment.threads} threads"


def _quality(report: dict[str, Any]) -> dict[str, Any]:
    paired = report["paired"]
    return {"perplexity": report["perplexity"]["value"], "kl": paired and paired["kl_mean"]["value"]}


def _size(folder: Path) -> dict[str, Any]:
    files = list(folder.glob("*.safetensors"))
    return {
        "format": folder.name if folder.name == "packed" else "dense",
        "file_bytes": sum(f.stat().st_size for f in files),
    }


def _sentences(settings: Settings, out: Path, heal: float | None) -> dict[str, dict[str, str]]:
    """For each prompt what each model of the story goes on with, greedily, by unmodified transformers from the disk."""
    folders = {"dense": settings.model, **{f"{run.name} {run.pattern}": out / run.folder / "dense" for run in STORY}}
    if heal is not None:
        folders[HEALED.name] = out / HEALED.folder / "dense"
    said = {name: generate(folder) for name, folder in folders.items()}
    return {prompt: {name: said[name][place] for name in said} for place, prompt in enumerate(PROMPTS)}


def generate(folder: Path) -> list[str]:
    """What a model goes on with after each of PROMPTS, greedily; line breaks as spaces."""
    from ..model.architecture import whole_model
    from ..texts import load_tokenizer

    tokenizer, model, said = load_tokenizer(folder), whole_model(folder), []
    for prompt in PROMPTS:
        read = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**read, max_new_tokens=NEW_TOKENS, do_sample=False)
        said.append(
            " ".join(tokenizer.decode(tokens[0, read["input_ids"].shape[1] :], skip_special_tokens=True).split())
        )
    return said


def serve_once(folder: Path) -> str:
    """Start `crepe-deploy serve` on a packed folder, take one completion over HTTP, and stop it."""
    command = [sys.executable, "-m", "crepe_deploy", "serve", str(folder), "--port", "0", "--json", "--enforce-eager"]
    with subprocess.Popen([*command, "--max-model-len", "512"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise ServeError(f"'{' '.join(command)}' did not get ready; its messages are above")
        ready = json.loads(line)
        body = {"model": ready["model"], "prompt": PROMPTS[0], "max_tokens": NEW_TOKENS, "temperature": 0}
        request = urllib.request.Request(
            f"{ready['url']}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return PROMPTS[0] + str(json.load(answer)["choices"][0]["text"])
        finally:
            server.send_signal(signal.SIGINT)


FILE = click.Path(path_type=Path)


@click.command()
@click.option("--out", type=FILE, default=Path("out/demo"), show_default=True)
@click.option(
    "--heal", type=click.FloatRange(0, min_open=True), metavar="MINUTES", help="Train the recipe's model too."
)
@click.option("--all", "every", is_flag=True, help="Every method at 2:4 too.")
@click.option("--model", type=FILE, help="Your own folder, with --calib and --text.")
@click.option("--calib", type=FILE, help="Text to calibrate on.")
@click.option("--text", type=FILE, help="Text to score on.")
@click.option("--assets", "assets_dir", type=FILE, default=DEFAULT_DIR, show_default=True)
@click.option("--json", "json_path", type=FILE, help="Also write the rows here, and FILE.md.")
@click.option(
    "--serve/--no-serve", default=True, show_default=True, help="Serve and measure packed checkpoints in vLLM."
)
def main(
    out: Path, heal: float | None, every: bool, model: Path | None, calib: Path | None, text: Path | None,
    assets_dir: Path, json_path: Path | None, serve: bool,
) -> None:  # fmt: skip
    """Prune a model weakly and well, heal, pack and serve it, and say what each costs and keeps."""
    own = [path for path in (model, calib, text) if path is not None]
    if len(own) == 3:
        settings = Settings(own[0].name, own[0], own[1], own[2])
    elif own:
        raise click.UsageError("--model, --calib and --text go together")
    else:
        assets = ensure_assets(assets_dir)
        settings = Settings(MODEL_NAME, assets.model, assets.text("c4", "train"), assets.text("wiki", "test"))
    tell(settings, out, [*STORY, *(OTHERS if every else ())], heal, serve, json_path)


def tell(
    settings: Settings, out: Path, runs: Sequence[Run], heal: float | None, serve: bool, json_path: Path | None
) -> dict[str, Any]:  # fmt: skip
    """The whole story; returns its rows. Raises what the commands raise, DiskFullError, ServeError, MissingExtra."""
    start = time.perf_counter()

    def say(line: str) -> None:
        click.echo(line, err=True)

    announce(settings, out, runs, heal, serve, say)
    result = measure(settings, out, runs, heal, serve, say)
    show(result)
    if serve:
        packed = out / (BEST if heal is None else HEALED).folder / "packed"
        click.echo(f"\nserved by vLLM from {packed}:\n  {serve_once(packed)}")
    draw(result, out / "demo.png")
    if json_path is not None:
        write_json(json_path, result)
        write_text(json_path.with_suffix(".md"), markdown(result))
    say(
        f"done in {time.perf_counter() - start:.0f} s: the picture is {out / 'demo.png'}, the checkpoints are in {out}/"
    )
    return result


if __name__ == "__main__":
    main()
