"""Rows of float32 that grow in place: memory by the row, and no copy when there are more."""

import mmap

import numpy as np
from numpy.typing import NDArray

_PAGE = mmap.PAGESIZE
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Rows:
    """
    An array of shape [count, width], which the kernel moves when it grows.

    Memory that was reserved ahead is not used before it is written to.

    Args:
        width: elements of a row.
        fill: value of a new row's elements.
    """

    def __init__(self, width: int, fill: float = 0.0) -> None:
        self.width, self._fill = width, fill
        self._row = np.dtype((np.void, 4 * width))
        self._memory = mmap.mmap(-1, _PAGE, flags=_PRIVATE)
        self._count = 0
        self._look()

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
        # A row in one piece: numpy then copies it in one go, not element by element.
        whole = np.ascontiguousarray(values).reshape(-1).view(self._row)
        self.array.reshape(-1).view(self._row)[slots] = whole

    def grow(self, count: int) -> None:
        """Have so many rows, not fewer than before."""
        before, self._count = self._count, count
        if count > len(self._array):
            del self._array  # the kernel may move the memory only while nobody looks at it
            rows = count + count // 4
            self._memory.resize(-(-rows * self.width * 4 // _PAGE) * _PAGE)
            self._look()
        if self._fill:
            self._array[before:count] = self._fill

    def _look(self) -> None:
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # rows are read here and there
        elements = len(self._memory) // 4
        rows = elements // self.width
        flat = np.frombuffer(self._memory, np.float32, count=rows * self.width)
        self._array = flat.reshape(rows, self.width)
