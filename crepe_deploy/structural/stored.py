"""The plans of all layers, each read from a supernet when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from .levels import layer_plan
from .plan import LayerPlan
from .supernet import Store
from .units import Width


class StoredPlans(Sequence[LayerPlan]):
    """A plan for each of `widths`. Reading one raises VerifyError where its file is damaged."""

    def __init__(self, store: Store, widths: Sequence[Width]) -> None:
        self.store = store
        self.widths = tuple(widths)

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
        return layer_plan(attention, self.store.neurons(place, width.neurons))
