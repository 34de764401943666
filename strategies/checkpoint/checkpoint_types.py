"""Types of checkpoints: the part that a rank saves, and the part of the model that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from distplat.platform.tensor_slices import TensorEntry, TensorSlice
from distplat.strategies.model.flat import FlatModel

ArrayRefs = list[tuple[Any, tuple[TensorEntry, ...]]]
"""References to arrays outside this process, each with its entries."""


@dataclass(frozen=True)
class CheckpointPart:
    """The tensors that one rank saves in a checkpoint."""

    tensors: tuple[Tensor, ...] = ()
    """The live tensors, not copies; each is contiguous or small."""
    entries: tuple[TensorEntry, ...] = ()
    """Content of `tensors`; `TensorEntry.array` is an index of `tensors`."""
    fetch: Callable[[], ArrayRefs | None] | None = None
    """Fetches the servers' copies of this version; may block. Returns None if they are gone."""
    may_skip: bool = False
    """Whether to skip this checkpoint instead of waiting until the previous part was sent."""

    def plus(self, other: CheckpointPart) -> CheckpointPart:
        """Return both parts merged; `fetch` and `may_skip` are those of `self`."""
        shift = len(self.tensors)
        moved = tuple(replace(e, array=e.array + shift) for e in other.entries)
        return replace(self, tensors=self.tensors + other.tensors, entries=self.entries + moved)

    def also(self, more: Callable[[], ArrayRefs | None]) -> CheckpointPart:
        """Return the part with a second fetch, of other servers' copies of this version."""
        first = self.fetch or (lambda: [])

        def both() -> ArrayRefs | None:
            arrays = first()
            others = more() if arrays is not None else None
            return None if arrays is None or others is None else [*arrays, *others]

        return replace(self, fetch=both)


@dataclass(frozen=True)
class Holding:
    """The part of the whole model that a rank holds."""

    slices: Mapping[str, TensorSlice] = field(default_factory=dict)
    """Slice of the whole tensor that this rank holds, by name; other tensors are held whole."""
    others: Set[str] = frozenset()
    """Names of tensors that another rank counts in norms and saves in checkpoints."""

    def duplicate_ranges(self, flat: FlatModel) -> tuple[tuple[int, int], ...]:
        """Return the ranges of the flat vector that another rank counts in norms."""
        slots = [slot for slot in flat.slots if slot.name in self.others]
        return tuple((slot.offset, slot.stop) for slot in slots)


ALL = Holding()
"""The whole model."""

Take = Callable[[int, CheckpointPart, Mapping[str, Any]], object]
"""Receives a part, its version and facts for `state.json`; copies the part before it returns."""
