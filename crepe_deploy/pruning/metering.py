"""How much of a pruning run is done, in weights: of a block in time, not only when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crepe_deploy.model.decoder import LinearSpec
from crepe_deploy.model.inside import matrices
from crepe_deploy.progress import Meter, Progress

from .run_plan import RunPlan

REPAIR = 2  # times the weights of a block; a pass for statistics counts them once, and so does pruning them


class RunMeter:
    """The work of one run; `step` is told of it. Each block's is counted in the order in which it is done."""

    def __init__(self, plan: RunPlan, step: Progress) -> None:
        self._all = [_size(matrices(plan.decoder, index)) for index in range(len(plan.decoder.blocks))]
        self._targets = [_size(block) for block in plan.targets]
        self._reads = plan.calibration is not None
        repair = REPAIR if plan.config.steps.repair is not None else 0
        self._ends = [0 if plan.config.steps.allocate is None else sum(self._all)]
        for size, targets in zip(self._all, self._targets, strict=True):
            self._ends.append(self._ends[-1] + (self._reads + repair) * size + targets)
        self._meter = Meter(step, self._ends[-1])

    def allocation(self) -> Progress:
        """What the walk over the dense blocks is told."""
        return self._meter.share(self._ends[0])

    def allocated(self) -> None:
        """What the walk finds was found before this start."""
        self._meter.reach(self._ends[0], before=True)

    def statistics(self, index: int, specs: Sequence[LinearSpec]) -> Callable[[float], None]:
        """What is told the share done of a pass of block `index` for the inputs of these of its targets."""
        units = self._all[index] * _size(specs) / self._targets[index] if specs else 0.0
        return lambda share: self._meter.add(share * units)

    def repair(self, index: int) -> Callable[[float], None]:
        """What is told the share done of the repair of block `index`."""
        return lambda share: self._meter.add(share * REPAIR * self._all[index])

    def layer(self, spec: LinearSpec) -> None:
        """One layer is pruned."""
        self._meter.add(_size([spec]))

    def block(self, index: int) -> None:
        """All of block `index` is done, what was left out included."""
        self._meter.reach(self._ends[index + 1])

    def kept(self, index: int) -> None:
        """Block `index` was done before this start."""
        self._meter.reach(self._ends[index + 1], before=True)


def _size(specs: Sequence[LinearSpec]) -> int:
    return sum(spec.out_features * spec.in_features for spec in specs)
