"""Healing a folder: everything that can be refused before any training, the training, and what is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crepe_deploy.device import CPU
from crepe_deploy.errors import CheckpointError, ConfigError, NoTokenizer, NumericalError, ParityError
from crepe_deploy.extras import require
from crepe_deploy.model.architecture import whole_model
from crepe_deploy.model.decoder import COMPUTE_DTYPES, Decoder
from crepe_deploy.progress import Say, Show, hidden, unsaid
from crepe_deploy.store.checkpoint import SINGLE_NAME
from crepe_deploy.store.files import require_disk
from crepe_deploy.store.folders import atomic_folder, check_output
from crepe_deploy.store.journal import Journal
from crepe_deploy.store.manifest import MANIFEST_NAME, Manifest, Source, ancestors, load_manifest, sha256_file, verify
from crepe_deploy.store.sources import Model, describe_source
from crepe_deploy.store.stock import check_ids
from crepe_deploy.store.values import AGAIN, VALUES_NAME
from crepe_deploy.store.work import begin, remove_work_folder, removed_once_written, work_folder
from crepe_deploy.store.writing import Planned
from crepe_deploy.texts import load_tokenizer

from .batches import Corpus, read_corpus
from .config import HealConfig
from .lora import check_lora
from .student import Student, Trained, choose, compute_dtype
from .teacher import Teacher, kept_windows
from .train import State, Trainer
from .write import write_folder

Seal = Callable[[Path, Manifest], Manifest]  # renews what the core cannot: the greedy prompt and the card
PARITY = 0.02  # of the held-out KL at the start: how far the reloaded folder's may be from the one in memory


@dataclass(frozen=True)
class Job:
    """A run's fixed parts, checked. source: of the dense model, hashed."""

    folder: Path
    manifest: Manifest
    dense: Model
    source: Source
    config: HealConfig
    decoder: Decoder
    trained: Trained
    corpus: Corpus


def heal(
    folder: Path, dense: Model, out: Path, config: HealConfig, texts: Sequence[str | Path], field: str, *,
    resume: bool, overwrite: bool, show: Show, say: Say, seal: Seal, device: torch.device = CPU,
) -> Manifest:  # fmt: skip
    """Train the pruned checkpoint `folder` towards `dense` and write `out`, which appears whole or not at all.

    Several processes do this together where `accelerate launch` or torchrun started them. device: that computes; of
    several processes each takes a GPU of its own, unless that is the CPU. Raises what `prepare` raises,
    and NumericalError where training made nothing better; then nothing is written, and nothing left.
    """
    config.check()
    check_extras(config)
    check_output(out, overwrite=overwrite, inputs=(folder, dense.folder))
    accelerator = accelerator_on(device)
    if (kind := accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ConfigError(
            f"healing runs in processes that each hold the whole model: configure accelerate without {kind}"
        )
    main = accelerator.is_main_process
    job = prepare(folder, dense, config, texts, field, accelerator.num_processes)
    accelerator.wait_for_everyone()
    journal = _open(job, out, accelerator.num_processes, resume=resume, overwrite=overwrite) if main else None
    trainer = _trainer(job, accelerator, work_folder(out), journal, say if main else unsaid)
    with contextlib.closing(trainer.dense):
        with (show if main else hidden)("healing") as step:
            state = trainer.run(step)
        if main:
            with removed_once_written(trainer.work, out):
                _write(job, trainer, state, out, overwrite, seal)
    accelerator.wait_for_everyone()
    return load_manifest(out)


def accelerator_on(device: torch.device) -> Any:
    """accelerate's `Accelerator`, which knows the processes and where each computes."""
    from accelerate import Accelerator

    if device.type == "cuda":
        torch.cuda.set_device(device)  # what one process takes; of several each sets its own
    accelerator = Accelerator(cpu=device.type != "cuda")
    if accelerator.device.type != device.type:  # it keeps what it was first told
        raise ConfigError(f"--device {device}: accelerate computes on {accelerator.device} in this process already")
    return accelerator


def check_extras(config: HealConfig) -> None:
    """Raise MissingExtra without what this training takes."""
    require("healing", "accelerate")
    if config.lora is not None:
        check_lora()


def prepare(
    folder: Path, dense: Model, config: HealConfig, texts: Sequence[str | Path], field: str, processes: int = 1
) -> Job:
    """Refuse what cannot be healed, and read the text. Raises InputError, VerifyError where the folder was changed."""
    if not texts:
        raise ConfigError("healing needs text to train on: give --text FILE_OR_DATASET")
    if config.windows % (processes * config.accumulate):
        raise ConfigError(
            f"a batch of {config.windows} windows of {config.window} tokens does not come out even in {processes} "
            f"processes and {config.accumulate} parts: change --batch-tokens, --window or --accumulate"
        )
    manifest = _pruned(folder)
    source = _parent(folder, manifest, dense)
    decoder, reference = Decoder(folder), Decoder(dense.folder)
    if decoder.vocab_size != reference.vocab_size:
        raise ConfigError(
            f"{folder} gives logits for {decoder.vocab_size} tokens and {dense.id} for {reference.vocab_size}: they "
            "cannot be compared"
        )
    if config.window > (context := min(decoder.context_length, reference.context_length)):
        raise ConfigError(f"--window {config.window} exceeds the model's context of {context} tokens")
    tokenizer = load_tokenizer(folder)
    with contextlib.suppress(NoTokenizer):
        if load_tokenizer(dense.folder).get_vocab() != tokenizer.get_vocab():
            raise ConfigError(f"{folder} and {dense.id} have different tokenizers: they cannot be compared by token")
    corpus = read_corpus(texts, tokenizer, config, field, processes)
    check_ids(tokenizer, torch.cat([corpus.training, corpus.held]).flatten().tolist(), decoder.vocab_size)
    trained = choose(decoder, manifest, config.train)
    return Job(folder, manifest, dense, source, config, decoder, trained, corpus)


def _pruned(folder: Path) -> Manifest:
    """The manifest of a folder that can be healed, every file compared with it."""
    manifest = load_manifest(folder)
    if manifest.format != "dense":
        raise ConfigError(
            f"{folder} is of format {manifest.format}, which is not trained: heal the pruned folder that it came from, "
            "or what `export --format dense` makes of it, and export the result"
        )
    if not manifest.tensors and "structural" not in manifest.config:
        raise ConfigError(f"{folder} was not pruned: there is nothing to heal")
    if (folder / VALUES_NAME).exists():
        raise ConfigError(
            f"{folder} has quantised values, which training would take off the grid of {VALUES_NAME}: heal the folder "
            f"before they are quantised, and quantise {AGAIN}"
        )
    return verify(folder)


def _parent(folder: Path, manifest: Manifest, dense: Model) -> Source:
    """The dense model as it lies there. Raises CheckpointError where `folder` did not come from it."""
    described = describe_source(dense)
    origins = [one.source for one in (manifest, *ancestors(folder, manifest))]
    if any(origin.files == described.files for origin in origins):
        return described
    differing = sorted(set(described.files.items()) ^ set(origins[-1].files.items()))
    raise CheckpointError(
        f"{dense.id} is not the model that {folder} came from: its manifest names {origins[-1].id}, whose "
        f"{differing[0][0]} is another; give that one as --dense"
    )


def _open(job: Job, out: Path, processes: int, *, resume: bool, overwrite: bool) -> Journal:
    """The journal of this run. Raises ConfigError, OutputError, DiskFullError."""
    work = work_folder(out)
    reader = job.decoder.reader
    infos = [reader.info(key) for key in job.trained.keys]
    state = 2 * sum(12 * info.size_bytes // info.dtype.itemsize + 2 * info.size_bytes for info in infos)
    kept = _kept_windows(job, processes) * _window_bytes(job)
    require_disk(work, state + kept + sum(info.size_bytes for info in reader))
    identity = {
        "what": "healing", "pruned": sha256_file(job.folder / MANIFEST_NAME), "dense": job.source.files,
        "texts": job.corpus.texts, "config": job.config.record(), "processes": processes,
    }  # fmt: skip
    return begin(work, identity, resume=resume, overwrite=overwrite)


def _trainer(job: Job, accelerator: Any, work: Path, journal: Journal | None, say: Say) -> Trainer:
    dtype = COMPUTE_DTYPES[compute_dtype(job.decoder, job.config)]
    infos = [job.decoder.reader.info(key) for key in job.trained.keys]
    dense = whole_model(job.dense.folder, dtype=dtype).requires_grad_(False).to(accelerator.device)
    return Trainer(
        accelerator=accelerator,
        student=Student(job.decoder, job.trained, job.config, accelerator.device),
        dense=Teacher(dense, work, _kept_windows(job, accelerator.num_processes)),
        corpus=job.corpus,
        config=job.config,
        plan={info.name: Planned(SINGLE_NAME, info.dtype, info.shape) for info in infos},
        work=work,
        journal=journal,
        say=say,
    )


def _kept_windows(job: Job, processes: int) -> int:
    """Of how many windows the dense model's states are kept; of none where several processes share them out anew."""
    windows = len(job.corpus.held) + len(job.corpus.training)
    return kept_windows(windows, len(job.corpus.held), _window_bytes(job)) if processes == 1 else 0


def _window_bytes(job: Job) -> int:
    dtype = COMPUTE_DTYPES[compute_dtype(job.decoder, job.config)]
    return int(job.config.window * job.decoder.config.hidden_size * dtype.itemsize)


def _write(job: Job, trainer: Trainer, state: State, out: Path, overwrite: bool, seal: Seal) -> None:
    if not state.best_step:
        remove_work_folder(trainer.work)
        why = f" ({state.stopped})" if state.stopped else ""
        raise NumericalError(
            f"healing made nothing better in {state.step} steps{why}: the held-out KL was {state.start:.4f} before and "
            f"never lower; nothing is written; try a lower --learning-rate, more steps or other text"
        )
    with atomic_folder(out, overwrite=overwrite) as folder:
        manifest = write_folder(
            job.folder, job.manifest, trainer.work / state.best_name, set(job.trained.keys), folder,
            _record(job, trainer, state),
        )  # fmt: skip
        dense = trainer.dense.model
        reloaded = trainer.held_out(whole_model(folder, dtype=dense.dtype).to(dense.device), (0, 1))
        if not abs(reloaded - state.best) <= PARITY * state.start:
            raise ParityError(
                f"the reloaded model's held-out KL is {reloaded:.4f}, and in training it was {state.best:.4f}"
            )
        seal(folder, manifest)


def _record(job: Job, trainer: Trainer, state: State) -> dict[str, Any]:
    """What the manifest says of the training."""
    config = job.config
    return {
        "what": "trained on text towards the dense model's logits (KL), zeros held",
        "dense": {"id": job.source.id, "files": job.source.files},
        "texts": job.corpus.texts,
        "steps": state.best_step,
        "steps_taken": state.step,
        "tokens": state.best_step * config.windows * config.window,
        "seconds": round(state.seconds, 1),
        "stopped": state.stopped,
        "processes": trainer.accelerator.num_processes,
        "trained_tensors": {"norms": len(job.trained.norms), "kept": len(job.trained.kept)},
        "adapters": "LoRA, merged outside the zeros" if config.lora is not None else None,
        "loss": state.loss,
        "held_out_kl": {"before": state.start, "after": state.best, "tokens": job.corpus.held.numel()},
        "config": config.record(),
    }
