"""Repair of narrowed layers: on the pruned stream each is tuned to put out what the dense one does on its own.

The dense model and the narrowed one walk side by side. A layer is made as narrow as its plan says, its matrices and
norms are tuned as `--repair block` of `prune` does it, and what it then puts out is what the next layer reads.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from crepe_deploy.errors import NumericalError
from crepe_deploy.model.calibrate import embed
from crepe_deploy.progress import Meter
from crepe_deploy.pruning.steps.repair import BlockRepair, Lessons, Repaired, tunable

from .narrow import narrowed
from .prepare import Run
from .stored import StoredPlans
from .tuned import TunedLayers


def repair_plans(run: Run, plans: StoredPlans, repair: BlockRepair, meter: Meter) -> tuple[StoredPlans, list[Repaired]]:
    """`plans` with tuned tensors, and each layer's error on the held-out windows; layers that are done are not redone.

    meter: of layers. Raises NumericalError, DiskFullError.
    """
    layers = TunedLayers(run.work / "repaired", run.journal)
    repaired = StoredPlans(plans.store, plans.widths, layers)
    dense = embed(run.decoder, [run.pruning_tokens, run.held_tokens])
    pruned = [stream.twin() for stream in dense]
    results = []
    for index in range(len(plans)):
        result = layers.find(index)
        plan = plans[index] if result is None else repaired[index]
        with run.decoder.block(index) as (block, weights):
            for stream in dense:
                stream.run(block, index, advance=True)
            with narrowed(block, plan, run.geometry):
                if result is None:
                    tuned = _tuned(run, index, block, weights)
                    learnt, held = (
                        Lessons(*sides, index, run.decoder.device) for sides in zip(pruned, dense, strict=True)
                    )
                    result = repair(block, tuned, learnt, held, meter.add)
                    if not math.isfinite(result.before):
                        raise NumericalError(f"what layer {index} puts out once narrowed is not finite")
                    layers.write(index, tuned, result)
                else:
                    meter.add(1, before=True)
                for stream in pruned:
                    stream.run(block, index, advance=True)
        results.append(result)
    return repaired, results


def _tuned(run: Run, index: int, block: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices and norms of a narrowed block by name, in the file's dtype, and apart from the dense block's."""
    linear = [spec.path for spec in run.decoder.linears[index]]
    tuned = {}
    for name in tunable(block, linear, linear):
        parameter = block.get_parameter(name)
        parameter.data = parameter.data.clone()
        stored = weights[run.decoder.key(f"{run.decoder.blocks_path}.{index}.{name}")]
        tuned[name] = parameter.data.to(stored.dtype, copy=True)
    return tuned
