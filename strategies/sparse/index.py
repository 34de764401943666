"""
From ids to slots: a hash table with open addressing, whole batches at a time.

    id -> hash -> place ->  keys  [ .  7  . 31 12  . ]      an id whose place is taken
                            slots [ .  0  .  2  1  . ]      goes to the next that is free

No step of Python is made per id: all ids of a batch take one step together, those that have found
their place drop out, and few are left after two.
"""

import numpy as np
from numpy.typing import NDArray

from distplat.strategies.algorithms.mixing import mix

_FREE = -1
_SMALLEST = 1 << 10

Ids = NDArray[np.int64]
Slots = NDArray[np.int64]


class RowIndex:
    """Gives each id a slot, in the order in which they are added."""

    def __init__(self) -> None:
        self._ids = np.empty(0, np.int64)  #: by slot
        self._count = 0
        self._make(_SMALLEST)

    def __len__(self) -> int:
        """Number of ids."""
        return self._count

    @property
    def ids(self) -> Ids:
        """All ids by slot, shape [count]."""
        return self._ids[: self._count]

    def find(self, ids: Ids) -> Slots:
        """Give the ids' slots, shape [n]; -1 for an id that was never added."""
        found = np.full(len(ids), -1, np.int64)
        pending, places = np.arange(len(ids)), self._first_places(ids)
        while len(pending):
            keys = self._keys[places]
            hit = keys == ids[pending]
            found[pending[hit]] = self._slots[places[hit]]
            on = ~hit & (keys != _FREE)
            pending, places = pending[on], (places[on] + 1) & self._mask
        return found

    def add(self, ids: Ids) -> Slots:
        """
        Add ids, and give their slots.

        Args:
            ids: shape [n]; each once, none of them added before.
        """
        first, self._count = self._count, self._count + len(ids)
        if self._count > len(self._ids):
            self._ids = np.resize(self._ids, max(_SMALLEST, self._count * 5 // 4))
        self._ids[first : self._count] = ids
        if 2 * self._count > len(self._keys):
            size = len(self._keys)
            while 2 * self._count > size:
                size *= 2
            self._make(size)
            self._place(self.ids, 0)
        else:
            self._place(ids, first)
        return np.arange(first, self._count)

    def _make(self, size: int) -> None:
        self._mask = size - 1
        self._keys = np.full(size, _FREE, np.int64)
        self._slots = np.empty(size, np.int64)

    def _first_places(self, ids: Ids) -> NDArray[np.int64]:
        return (mix(ids.astype(np.uint64)) & np.uint64(self._mask)).astype(np.int64)

    def _place(self, ids: Ids, first_slot: int) -> None:
        slots, places = np.arange(first_slot, first_slot + len(ids)), self._first_places(ids)
        while len(ids):
            free = self._keys[places] == _FREE
            self._keys[places[free]] = ids[free]  # where several come to one place, the last stays
            here = self._keys[places] == ids
            self._slots[places[here]] = slots[here]
            ids, slots = ids[~here], slots[~here]
            places = (places[~here] + 1) & self._mask
