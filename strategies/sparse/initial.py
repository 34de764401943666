"""
First values of a row: a pure function of seed, table, id and column.

So a row needs not exist before it is trained, and comes out the same whoever asks first, on however
many servers. Made of integers alone, up to one multiplication: the same bits on every machine.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from distplat.platform.table_plan import TableSpec
from distplat.strategies.algorithms.mixing import GOLDEN, mix

_BLOCK = 1 << 15
"""Elements made at a time: the numbers between stay in the cache."""
_LOW = np.uint64(0x0000FFFF0000FFFF)
_MEAN = 2 * 65535
_SIGMA = 2 * ((65536**2 - 1) / 12) ** 0.5


def initial_rows(table: TableSpec, seed: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """
    Give the first values of rows.

    Each is the sum of four uniform numbers: like a normal one of `table.std` that never goes
    beyond 3.5 of it.

    Args:
        table: name, width and std count.
        seed: the job's.
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
