"""Types of checkpoints: the part that a rank gives, the part of the model that it holds."""

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
    """The tensors that one rank gives to a checkpoint."""

    tensors: tuple[Tensor, ...] = ()
    """The live tensors, not copies; each is contiguous or small."""
    entries: tuple[TensorEntry, ...] = ()
    """Content of `tensors`; `TensorEntry.array` is an index of `tensors`."""
    fetch: Callable[[], ArrayRefs | None] | None = None
    """Fetches the servers' copies of this version; may wait. It gives None if they are gone."""
    may_skip: bool = False
    """Whether this rank goes on without a checkpoint rather than wait until its last part left."""

    def plus(self, other: CheckpointPart) -> CheckpointPart:
        """Put two parts of a rank together; `fetch` and `may_skip` are this one's."""
        shift = len(self.tensors)
        moved = tuple(replace(e, array=e.array + shift) for e in other.entries)
        return replace(self, tensors=self.tensors + other.tensors, entries=self.entries + moved)

    def also(self, more: Callable[[], ArrayRefs | None]) -> CheckpointPart:
        """Fetch other servers' copies of this version, too."""
        first = self.fetch or (lambda: [])

        def both() -> ArrayRefs | None:
            own = first()
            rest = more() if own is not None else None
            return None if own is None or rest is None else [*own, *rest]

        return replace(self, fetch=both)


@dataclass(frozen=True)
class Holding:
    """The part of the whole model that a rank holds."""

    slices: Mapping[str, TensorSlice] = field(default_factory=dict)
    """By name: the position of this rank's slice in the whole tensor; others are held whole."""
    others: Set[str] = frozenset()
    """Names of tensors that another rank counts in norms and gives to checkpoints."""

    def duplicate_ranges(self, flat: FlatModel) -> tuple[tuple[int, int], ...]:
        """Give the ranges of the flat vector that another rank counts."""
        slots = [slot for slot in flat.slots if slot.name in self.others]
        return tuple((slot.offset, slot.stop) for slot in slots)


ALL = Holding()
"""All of it."""

Take = Callable[[int, CheckpointPart, Mapping[str, Any]], object]
"""Takes a part, with its version and facts for `state.json`; copies it before it returns."""
