"""
From ids to slots, whole batches at a time.

Where ids have an end, an array with a number for each:

    id -> cell   [ 0  3  0  1  2 ]      1 + slot; 0: never added

Else a hash table with open addressing:

    id -> hash -> place -> cell   [ .  7:0  .  31:2  12:1  . ]    an id whose place is taken
                                       id:slot                    goes to the next that is free

No step of Python is made per id: all ids of a batch take one step together, those that have found
their place drop out, and few are left after two. Id and slot lie in one cell of 16 bytes, so that
an id costs one miss of the cache and not two.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distplat.strategies.algorithms.mixing import mix

_FREE = -1
_SMALLEST = 1 << 10
MOST_BY_ARRAY = 1 << 25
"""Ids that an array may have, 4 bytes each; of pages without an id that is here, none is used."""

Ids = NDArray[np.int64]
Slots = NDArray[np.int64]


class Index(Protocol):
    """Gives each id a slot, in the order in which they are added."""

    def __len__(self) -> int:
        """Number of ids."""

    @property
    def ids(self) -> Ids:
        """All ids by slot, shape [count]."""

    def find(self, ids: Ids) -> Slots:
        """Give the ids' slots, shape [n]; -1 for an id that was never added."""

    def add(self, ids: Ids) -> Slots:
        """
        Add ids, and give their slots.

        Args:
            ids: shape [n]; each once, none of them added before.
        """


def make_index(rows: int | None) -> Index:
    """Make the index of a table with ids below `rows`; None: any that is not negative."""
    return HashIndex() if rows is None or rows > MOST_BY_ARRAY else ArrayIndex(rows)


class _Listed:
    """The ids in the order of their slots."""

    def __init__(self) -> None:
        self._ids = np.empty(0, np.int64)  #: by slot
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> Ids:
        return self._ids[: self._count]

    def _append(self, ids: Ids) -> int:
        """Give the first one's slot."""
        first, self._count = self._count, self._count + len(ids)
        if self._count > len(self._ids):
            self._ids = np.resize(self._ids, max(_SMALLEST, self._count * 5 // 4))
        self._ids[first : self._count] = ids
        return first


class ArrayIndex(_Listed):
    """See `Index`: for ids below `rows`."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._slots = np.zeros(rows, np.int32)  #: by id: 1 + slot; zeros cost no memory

    def find(self, ids: Ids) -> Slots:
        """See `Index`."""
        found = self._slots[ids].astype(np.int64)
        found -= 1
        return found

    def add(self, ids: Ids) -> Slots:
        """See `Index`."""
        slots = np.arange(self._append(ids), self._count)
        self._slots[ids] = slots + 1
        return slots


class HashIndex(_Listed):
    """See `Index`: for any ids."""

    def __init__(self) -> None:
        super().__init__()
        self._make(_SMALLEST)

    def find(self, ids: Ids) -> Slots:
        """See `Index`."""
        places = self._first_places(ids)
        found, pending = self._look(ids, places)
        while len(pending):
            places[pending] = (places[pending] + 1) & self._mask
            slots, still = self._look(ids[pending], places[pending])
            found[pending] = slots
            pending = pending[still]
        return found

    def add(self, ids: Ids) -> Slots:
        """See `Index`."""
        first = self._append(ids)
        if 2 * self._count > self._mask + 1:
            size = self._mask + 1
            while 2 * self._count > size:
                size *= 2
            self._make(size)
            self._place(self.ids, 0)
        else:
            self._place(ids, first)
        return np.arange(first, self._count)

    def _make(self, size: int) -> None:
        self._mask = size - 1
        self._cells = np.full((size, 2), _FREE, np.int64)  #: (id, slot)
        self._whole_cells = self._cells.reshape(-1).view(np.complex128)  #: 16 bytes in one piece

    def _look(self, ids: Ids, places: NDArray[np.int64]) -> tuple[Slots, NDArray[np.int64]]:
        """Give the slots of ids that are at their places, else -1; and which must look further."""
        cells = np.take(self._whole_cells, places, mode="clip").view(np.int64).reshape(-1, 2)
        keys = cells[:, 0]
        hit = keys == ids
        return np.where(hit, cells[:, 1], -1), np.flatnonzero(~hit & (keys != _FREE))

    def _first_places(self, ids: Ids) -> NDArray[np.int64]:
        return (mix(ids.astype(np.uint64)) & np.uint64(self._mask)).astype(np.int64)

    def _place(self, ids: Ids, first_slot: int) -> None:
        slots, places = np.arange(first_slot, first_slot + len(ids)), self._first_places(ids)
        while len(ids):
            free = self._cells[places, 0] == _FREE
            self._cells[places[free], 0] = ids[free]  # where several come to one, the last stays
            here = self._cells[places, 0] == ids
            self._cells[places[here], 1] = slots[here]
            ids, slots = ids[~here], slots[~here]
            places = (places[~here] + 1) & self._mask
