"""What ranks give to a checkpoint, and what of the whole model a rank has: values, no work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from distplat.platform.tensor_slices import TensorEntry, TensorSlice
from distplat.strategies.model.flat import FlatModel

ArrayRefs = list[tuple[Any, tuple[TensorEntry, ...]]]
"""Arrays that are kept elsewhere, and what is in them."""


@dataclass(frozen=True)
class CheckpointPart:
    """What one rank is responsible for."""

    tensors: tuple[Tensor, ...] = ()
    """Live, not copies; each contiguous or small."""
    entries: tuple[TensorEntry, ...] = ()
    """What is in them; `TensorEntry.array` counts `tensors`."""
    fetch: Callable[[], ArrayRefs | None] | None = None
    """Gives what servers have kept of this version; may wait. None: they have it no more."""
    may_skip: bool = False
    """Whether this rank goes on without a checkpoint rather than wait until its last part left."""

    def plus(self, other: CheckpointPart) -> CheckpointPart:
        """Put two parts of a rank together; `fetch` and `may_skip` are this one's."""
        shift = len(self.tensors)
        moved = tuple(replace(e, array=e.array + shift) for e in other.entries)
        return replace(self, tensors=self.tensors + other.tensors, entries=self.entries + moved)

    def also(self, more: Callable[[], ArrayRefs | None]) -> CheckpointPart:
        """Have what other servers keep of this version fetched, too."""
        first = self.fetch or (lambda: [])

        def both() -> ArrayRefs | None:
            own = first()
            rest = more() if own is not None else None
            return None if own is None or rest is None else [*own, *rest]

        return replace(self, fetch=both)


@dataclass(frozen=True)
class Holding:
    """What of the whole model a rank has."""

    slices: Mapping[str, TensorSlice] = field(default_factory=dict)
    """Where a tensor lies in the whole one, for those of which this rank has a slab."""
    others: Set[str] = frozenset()
    """Tensors that are here and that count for another rank, in checkpoints and in norms."""

    def duplicate_ranges(self, flat: FlatModel) -> tuple[tuple[int, int], ...]:
        """Give the runs of the flat vector that count for another rank."""
        slots = [slot for slot in flat.slots if slot.name in self.others]
        return tuple((slot.offset, slot.stop) for slot in slots)


ALL = Holding()
"""All of it."""

Take = Callable[[int, CheckpointPart, Mapping[str, Any]], object]
"""Takes a part, with its version and facts for `state.json`; copies it before it returns."""
