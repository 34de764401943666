"""Rows of a server: their index by id, their memory, and the initial values of a row."""

import mmap
import zlib
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from distplat.platform.shard_map import TableSpec
from distplat.strategies.algorithms.seeds import GOLDEN, mix

_BLOCK = 1 << 15
"""Number of elements generated at a time, so that intermediate values stay in the cache."""
_LOW = np.uint64(0x0000FFFF0000FFFF)
_MEAN = 2 * 65535
_SIGMA = 2 * ((65536**2 - 1) / 12) ** 0.5


def initial_rows(table: TableSpec, seed: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """
    Return the initial values of rows.

    Each value is a sum of four uniform numbers, which approximates a normal distribution with
    standard deviation `table.std`, truncated at 3.5 standard deviations.

    Args:
        table: its name, width and std determine the values.
        seed: of the job.
        ids: shape [n].

    Returns:
        Shape [n, width].
    """
    rows = np.zeros((len(ids), table.width), np.float32)
    if table.std == 0.0:
        return rows
    key = np.array([seed, zlib.crc32(table.name.encode())], np.uint64)
    start = mix(mix(key[:1] + GOLDEN) + key[1:])
    columns = np.arange(1, table.width + 1, dtype=np.uint64) * GOLDEN
    block = max(1, _BLOCK // table.width)
    for first in range(0, len(ids), block):
        part = slice(first, first + block)
        bits = mix(mix(ids[part].astype(np.uint64) + start)[:, None] + columns)
        pairs = (bits & _LOW) + ((bits >> np.uint64(16)) & _LOW)
        sums = (pairs & np.uint64(0xFFFFFFFF)) + (pairs >> np.uint64(32))
        rows[part] = sums.astype(np.float32)
    rows -= np.float32(_MEAN)
    rows *= np.float32(table.std / _SIGMA)
    return rows


_PAGE = mmap.PAGESIZE
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Rows:
    """
    An array of shape [count, width] that grows by `mremap`, without copying.

    Memory reserved in advance is not allocated before the first write.

    Args:
        width: elements of a row.
        fill: value of a new row's elements.
    """

    def __init__(self, width: int, fill: float = 0.0) -> None:
        self.width, self._fill = width, fill
        self._row = np.dtype((np.void, 4 * width))
        self._memory = mmap.mmap(-1, _PAGE, flags=_PRIVATE)
        self._count = 0
        self._map_array()

    @property
    def array(self) -> NDArray[np.float32]:
        """The rows, shape [count, width]; keep no reference to it over a `grow`."""
        return self._array[: self._count]

    def put(self, slots: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """
        Set rows.

        Args:
            slots: shape [n].
            values: shape [n, width].
        """
        # With a row as one element, numpy copies whole rows instead of single floats.
        rows = np.ascontiguousarray(values).reshape(-1).view(self._row)
        self.array.reshape(-1).view(self._row)[slots] = rows

    def grow(self, count: int) -> None:
        """Grow to `count` rows, at least as many as before."""
        before, self._count = self._count, count
        if count > len(self._array):
            del self._array  # resize() fails while a view of the memory exists
            rows = count + count // 4
            self._memory.resize(-(-rows * self.width * 4 // _PAGE) * _PAGE)
            self._map_array()
        if self._fill:
            self._array[before:count] = self._fill

    def _map_array(self) -> None:
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # row accesses are random
        elements = len(self._memory) // 4
        rows = elements // self.width
        flat = np.frombuffer(self._memory, np.float32, count=rows * self.width)
        self._array = flat.reshape(rows, self.width)


_FREE = -1
_SMALLEST = 1 << 10
MOST_BY_ARRAY = 1 << 25
"""Maximum `rows` of an `ArrayIndex`, 4 bytes each; pages without a stored id are not allocated."""

Ids = NDArray[np.int64]
Slots = NDArray[np.int64]


class RowIndex(ABC):
    """Maps ids to slots, which are numbered in the order of insertion."""

    def __init__(self) -> None:
        self._ids = np.empty(0, np.int64)  #: by slot
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> Ids:
        """All ids by slot, shape [count]."""
        return self._ids[: self._count]

    @abstractmethod
    def find(self, ids: Ids) -> Slots:
        """Return the ids' slots, shape [n]; -1 for an unknown id."""

    @abstractmethod
    def add(self, ids: Ids) -> Slots:
        """
        Add ids, and return their slots.

        Args:
            ids: shape [n]; unique, and not added before.
        """

    def _append(self, ids: Ids) -> int:
        """Append ids, and return the slot of the first."""
        first, self._count = self._count, self._count + len(ids)
        if self._count > len(self._ids):
            self._ids = np.resize(self._ids, max(_SMALLEST, self._count * 5 // 4))
        self._ids[first : self._count] = ids
        return first


def build_index(rows: int | None) -> RowIndex:
    """Build the index of a table with ids below `rows`; None: any non-negative id."""
    return HashIndex() if rows is None or rows > MOST_BY_ARRAY else ArrayIndex(rows)


class ArrayIndex(RowIndex):
    """Index for ids below `rows`: an array."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._slots = np.zeros(rows, np.int32)  #: by id: 1 + slot; zeros cost no memory

    @override
    def find(self, ids: Ids) -> Slots:
        slots = self._slots[ids].astype(np.int64)
        slots -= 1
        return slots

    @override
    def add(self, ids: Ids) -> Slots:
        slots = np.arange(self._append(ids), self._count)
        self._slots[ids] = slots + 1
        return slots


class HashIndex(RowIndex):
    """Index for any ids: a hash table with open addressing."""

    def __init__(self) -> None:
        super().__init__()
        self._allocate(_SMALLEST)

    @override
    def find(self, ids: Ids) -> Slots:
        positions = self._first_positions(ids)
        slots_of_ids, pending = self._probe(ids, positions)
        while len(pending):
            positions[pending] = (positions[pending] + 1) & self._mask
            slots, collisions = self._probe(ids[pending], positions[pending])
            slots_of_ids[pending] = slots
            pending = pending[collisions]
        return slots_of_ids

    @override
    def add(self, ids: Ids) -> Slots:
        first = self._append(ids)
        if 2 * self._count > self._mask + 1:
            size = self._mask + 1
            while 2 * self._count > size:
                size *= 2
            self._allocate(size)
            self._insert(self.ids, 0)
        else:
            self._insert(ids, first)
        return np.arange(first, self._count)

    def _allocate(self, size: int) -> None:
        self._mask = size - 1
        self._cells = np.full((size, 2), _FREE, np.int64)  #: (id, slot)
        self._cell_view = self._cells.reshape(-1).view(
            np.complex128
        )  #: a cell as one 16-byte element

    def _probe(self, ids: Ids, positions: NDArray[np.int64]) -> tuple[Slots, NDArray[np.int64]]:
        """Return the slots of ids at these positions, else -1; and the indices of collisions."""
        cells = np.take(self._cell_view, positions, mode="clip").view(np.int64).reshape(-1, 2)
        keys = cells[:, 0]
        hit = keys == ids
        return np.where(hit, cells[:, 1], -1), np.flatnonzero(~hit & (keys != _FREE))

    def _first_positions(self, ids: Ids) -> NDArray[np.int64]:
        return (mix(ids.astype(np.uint64)) & np.uint64(self._mask)).astype(np.int64)

    def _insert(self, ids: Ids, first_slot: int) -> None:
        slots, positions = np.arange(first_slot, first_slot + len(ids)), self._first_positions(ids)
        while len(ids):
            free = self._cells[positions, 0] == _FREE
            self._cells[positions[free], 0] = ids[free]  # of several ids for a cell, the last wins
            stored = self._cells[positions, 0] == ids
            self._cells[positions[stored], 1] = slots[stored]
            ids, slots = ids[~stored], slots[~stored]
            positions = (positions[~stored] + 1) & self._mask
