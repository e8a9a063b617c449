"""`evaluate`, the command `eval`: perplexity, KL to a dense model and zero-shot accuracy, each with its convention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepe_deploy.device import chosen
from crepe_deploy.errors import ConfigError
from crepe_deploy.progress import Later, Progress, Say, part
from crepe_deploy.quality import perplexity
from crepe_deploy.quality.zeroshot import ZeroShotReport, find_tasks, zero_shot

from .inputs import check_calibration, find_model


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. quality: on the text, None without one. tasks: None without tasks."""

    model: str
    quality: perplexity.QualityReport | None
    tasks: ZeroShotReport | None

    def to_dict(self) -> dict[str, Any]:
        """What the command prints with --json."""
        quality = {} if self.quality is None else self.quality.to_dict()
        tasks = {} if self.tasks is None else {"tasks": self.tasks.to_dict()}
        return {"model": self.model, **quality, **tasks}


def evaluate(
    model: str | Path, *, text: str | Path | None = None, text_field: str = "text", window: int = 2048,
    stride: int | None = None, max_tokens: int | None = None, bos: str = "auto", dtype: str = "auto",
    device: str = "auto", against: str | Path | None = None, tasks: str | Sequence[str] | None = None,
    task_dir: str | Path | None = None, limit: int | None = None, seed: int = 0, update_card: bool = False,
    progress: Progress | None = None, say: Say | None = None,
) -> Evaluation:  # fmt: skip
    """Measure a model on a text, on tasks, or both; paired with the model `against` on the same tokens.

    model, against: a folder, dense or packed; a hub id; a GGUF file. text: .txt, .jsonl, .parquet (field `text_field`)
    or a `datasets` name. window, stride: in tokens; stride None is the window. max_tokens: only the text's first.
    bos: "auto", "none", "start" or "window". dtype: "auto", the checkpoint's, or bfloat16, float16, float32.
    device: to compute on, as of `prune`.
    tasks: names of lm-eval, a list or comma-separated; task_dir: local task files instead of the hub's. limit:
    documents of each task. seed: of the bootstrap. update_card: write the figures and their conditions into the model
    card of the folder `model`, between marks, and the card's hash into its manifest. progress: told windows
    done and in all.
    Perplexity is exp of the mean negative log-likelihood in nats over the predicted tokens; KL is KL(against || model)
    in nats; intervals are 95 % bootstraps over windows.
    Raises ConfigError (nothing to measure, models that cannot be compared), CheckpointError, CalibrationError,
    MissingExtra: exit code 2; NumericalError: 1.
    """
    if text is None and tasks is None:
        raise ConfigError("nothing to measure: give --text FILE_OR_DATASET, --tasks NAMES, or both")
    from crepe_deploy.exporting.frame import measured

    if update_card and not Path(model).is_dir():
        raise ConfigError(f"--update-card writes into a folder, and {model} is none")
    if update_card:
        measured.check_card(Path(model))
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks or ())
    if text is not None:
        perplexity.check_options(dtype, bos, seed, window, stride)
        check_calibration(text)
    found = None if tasks is None else find_tasks(names, None if task_dir is None else Path(task_dir))
    later = Later(say)
    step, place = later.step(progress), chosen(device, later)
    folder = find_model(model, say=say).folder
    reference = None if against is None else find_model(against, say=say).folder
    quality = answers = None
    if text is not None:
        quality = perplexity.evaluate(
            folder, text, field=text_field, window=window, stride=stride, max_tokens=max_tokens, dtype=dtype, bos=bos,
            against=reference, seed=seed, device=place, progress=step, say=later,
        )  # fmt: skip
    if found is not None:
        part(step, f"answering {', '.join(names)}")
        answers = zero_shot(folder, found, limit=limit, against=reference, device=place)
    evaluation = Evaluation(str(model), quality, answers)
    if update_card:
        measured.update_card(Path(model), evaluation.to_dict())
    return evaluation
