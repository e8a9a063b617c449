"""The plans of all layers, each read from a supernet when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from .levels import layer_plan
from .plan import LayerPlan
from .supernet import Store
from .tuned import TunedLayers
from .units import Width


class StoredPlans(Sequence[LayerPlan]):
    """A plan for each of `widths`, repaired where `tuned` is given.

    Reading one raises VerifyError where a file of it is damaged.
    """

    def __init__(self, store: Store, widths: Sequence[Width], tuned: TunedLayers | None = None) -> None:
        self.store = store
        self.widths = tuple(widths)
        self.tuned = tuned

    def __len__(self) -> int:
        return len(self.widths)

    @overload
    def __getitem__(self, index: int) -> LayerPlan: ...

    @overload
    def __getitem__(self, index: slice) -> list[LayerPlan]: ...

    def __getitem__(self, index: int | slice) -> LayerPlan | list[LayerPlan]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        width = self.widths[place]
        attention = self.store.attention(place, (width.groups, width.queries))
        plan = layer_plan(attention, self.store.neurons(place, width.neurons))
        return plan if self.tuned is None else replace(plan, tuned=self.tuned.load(place))
