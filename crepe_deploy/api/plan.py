"""`plan`: what a run will need and what it will gain, from configuration and headers alone; no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from crepe_deploy.device import described, resolve
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.inside import matrices
from crepe_deploy.moe.layers import layers_if_any
from crepe_deploy.packed.config import PackedConfig, Values
from crepe_deploy.packed.parts import parts
from crepe_deploy.pattern import NM, Pattern
from crepe_deploy.progress import Later, Say
from crepe_deploy.pruning.steps import build_steps
from crepe_deploy.pruning.steps.values import Int8
from crepe_deploy.selftext import sampling_bytes
from crepe_deploy.store.checkpoint import CheckpointReader

from .choices import Given, Target, choices_of, filled, packable
from .inputs import Granularity, outlined, pattern_of

# Per target: does it load, is it smaller, is it faster. Ratios are not repeated here: they depend on the machine.
TARGETS: dict[str, str] = {
    "dense: transformers, vLLM, any reader": "loads unchanged; no smaller, no faster: the zeros are stored",
    "packed: CPU, our kernels": "smaller as said; decoding is faster where weights are the bottleneck (any N:M alike)",
    "onnx: ONNX Runtime on CPU or CUDA": "loads there; no smaller, no faster for its zeros: they are stored",
}
UNMEASURED = "smaller on the device too; nothing was measured on a GPU here, so no speed is promised (docs/gpu.md)"
ADVICE = (
    "On a CPU every 50 % pattern costs the same bytes and runs at the same speed, and quality rises with M: "
    "choose 16:32. Choose 2:4 only for the sparse tensor cores of NVIDIA GPUs."
)
EXPERTS_ADVICE = (
    "This model is a mixture of experts: crepe-deploy experts removes whole experts, crepe-deploy prune writes zeros "
    "inside them; the dense folders of both load wherever the model does, and no other export takes them "
    "(docs/experts.md)."
)


class Plan(TypedDict):
    """What `plan` predicts, in bytes where a name says so. does_not_divide, not_packable: names of tensors.

    values: the step by which kept weights are quantised, where one was given.
    device: that a run would compute on. chosen: what `prune-and-export` chooses of what was left out, by option.

    experts: of a mixture of experts, in which only whole experts can be pruned, `moe.layers.ExpertLayers.record`.
    heal_memory_estimate_bytes: above the libraries, by the options of `heal` that save memory, where it was asked for.
    """

    model: str
    chosen: dict[str, Any]
    pattern: str
    values: NotRequired[str]
    device: str
    prunable_tensors: int
    does_not_divide: list[str]
    not_packable: list[str]
    checkpoint_bytes: int
    packed_checkpoint_bytes: int
    pruned_tensors_packed_over_dense: float
    peak_memory_estimate_bytes: int
    calib_self_memory_estimate_bytes: int
    disk_needed_bytes: int
    targets: dict[str, str]
    advice: str
    heal_memory_estimate_bytes: NotRequired[dict[str, int]]
    experts: NotRequired[dict[str, Any]]


def plan(
    model: str | Path, *, target: Target | None = None, sparsity: Pattern | str | float | None = None,
    granularity: Granularity = "row", values: str | None = None, calib_samples: int | None = None,
    calib_length: int | None = None, device: str = "auto", revision: str | None = None, heal: bool = False,
    say: Say | None = None,
) -> Plan:  # fmt: skip
    """What pruning `model` will need and what each target will gain; arguments as in `prune`. No weight is read,
    and of a GGUF file the header alone, which may be all that is there yet.

    What is left out is chosen as `prune_and_export` does where nothing else is given. heal: say what healing this
    folder, or what is pruned from it, will take too.

    Raises PatternError, CheckpointError, UnsupportedModel, ConfigError, MissingExtra (exit code 2).
    """
    if sparsity is not None:
        pattern_of(sparsity, granularity)
    step = build_steps({} if values is None else {"values": values}).values
    given = Given(target, sparsity, granularity, calib_samples=calib_samples, calib_length=calib_length)
    place = resolve(device)
    with outlined(model, revision, say) as (folder, shown):
        decoder = Decoder(folder, experts=True)
        later = Later(say)
        result = _plan(decoder, given, choices_of(given, decoder, later), step, shown, described(place), later)
        if values is not None:
            result["values"] = values
        if heal:
            result["heal_memory_estimate_bytes"] = heal_memory(folder)
        later.begin()
    return result


def _plan(
    decoder: Decoder, given: Given, chosen: dict[str, Any], step: Int8 | None, shown: str, device: str, say: Say
) -> Plan:  # fmt: skip
    layers = layers_if_any(decoder)
    options = filled(given.options, chosen)
    pattern = pattern_of(options["sparsity"], given.granularity)
    samples, length = options["calib_samples"], options["calib_length"]
    if (context := decoder.context_length) < length:
        say(f"calibration windows would be clipped to the model's context: {context} tokens instead of {length}")
        length = context
    reader = decoder.reader
    found = {spec.tensor: spec for index in range(len(decoder.blocks)) for spec in matrices(decoder, index)}
    misfits = [name for name, spec in found.items() if isinstance(pattern, NM) and spec.in_features % pattern.m]
    tensors = found.keys() - set(misfits)
    prunable = [spec for name, spec in found.items() if name in tensors and layers is None]  # experts are not packed
    total = sum(info.size_bytes for info in reader)
    dense = sum(reader.info(spec.key).size_bytes for spec in prunable)
    unpackable = [spec.key for spec in prunable if not packable(spec, pattern)]
    packed = sum(packed_bytes(reader, spec, pattern, step) for spec in prunable if packable(spec, pattern))
    kept = sum(reader.info(key).size_bytes for key in unpackable)
    plan: Plan = {
        "model": shown,
        "chosen": chosen,
        "pattern": str(pattern),
        "device": device,
        "prunable_tensors": len(tensors),
        "does_not_divide": misfits,
        "not_packable": unpackable,
        "checkpoint_bytes": total,
        "packed_checkpoint_bytes": total - dense + packed + kept,
        "pruned_tensors_packed_over_dense": (packed + kept) / dense if dense else 1.0,
        "peak_memory_estimate_bytes": peak_memory(decoder, samples * length),
        "calib_self_memory_estimate_bytes": sampling_bytes(
            decoder.config, total, decoder.dtype.itemsize, samples, length
        ),
        "disk_needed_bytes": 2 * total,
        "targets": TARGETS | {"packed: GPU": gpu_truth({(spec.out_features, spec.in_features) for spec in prunable})},
        "advice": ADVICE,
    }
    if layers is not None:
        plan |= {"targets": {}, "advice": EXPERTS_ADVICE, "experts": layers.record()}
    return plan


def heal_memory(folder: Path) -> dict[str, int]:
    """Peak memory of `heal` at its defaults, and with what makes it less."""
    from crepe_deploy.healing.config import HealConfig
    from crepe_deploy.healing.memory import peak_bytes

    configs = {
        "defaults": HealConfig(),
        "--accumulate 4": HealConfig(accumulate=4),
        "--checkpointing": HealConfig(checkpointing=True),
        "--lora 16 --checkpointing": HealConfig(lora=16, checkpointing=True),
    }
    return {options: peak_bytes(folder, config) for options, config in configs.items()}


def gpu_truth(shapes: set[tuple[int, int]]) -> str:
    """What a packed checkpoint of these layer shapes gains on this machine's GPU, as far as it was measured."""
    import torch

    if not torch.cuda.is_available():
        return UNMEASURED
    from crepe_deploy.packed.cuda import dispatch

    measured = [entry for entry in dispatch.describe() if tuple(entry["shape"]) in shapes and entry["gain_over_dense"]]
    return gpu_gains(measured) if measured else UNMEASURED


def gpu_gains(measured: list[dict[str, Any]]) -> str:
    """The measured gains over dense in one sentence: for each batch the range over kinds and shapes."""
    gains: dict[int, list[float]] = {}
    for entry in measured:
        gains.setdefault(int(entry["batch"]), []).append(float(entry["gain_over_dense"]))
    ranges = (f"batch {batch}: {min(all_):.2f}x to {max(all_):.2f}x" for batch, all_ in sorted(gains.items()))
    return f"smaller on the device too; layers measured here, over dense: {', '.join(ranges)}"


def packed_bytes(reader: CheckpointReader, spec: LinearSpec, pattern: Pattern, step: Int8 | None) -> int:
    """Bytes of the packed parts of one tensor, whose kept values are quantised by `step`."""
    dtype = reader.info(spec.key).dtype
    grid = None if step is None else step.grid(dtype)
    config = PackedConfig(pattern, values=None if grid is None else Values(grid.bits, grid.group))
    return sum(part.size_bytes for part in parts(config, dtype, spec.out_features, spec.in_features).values())


def peak_memory(decoder: Decoder, tokens: int) -> int:
    """Upper estimate above the libraries: embeddings + 4 x the largest block + 2 x the calibration activations."""
    blocks = [decoder.block_keys(index) for index in range(len(decoder.blocks))]
    largest = max(sum(decoder.reader.info(key).size_bytes for key in keys) for keys in blocks)
    in_blocks = {key for keys in blocks for key in keys}
    outside = sum(info.size_bytes for info in decoder.reader if info.name not in in_blocks)
    activations = tokens * int(decoder.config.hidden_size) * decoder.dtype.itemsize
    return outside + 4 * largest + 2 * activations
