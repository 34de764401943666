"""
In what order a shard applied gradients: what makes an asynchronous run repeatable.

    place   rank  seq  pulled      `pulled`: the version at which the gradient was computed
      0      1     0     0         place 0 takes the shard from version 0 to version 1
      1      0     0     0         staleness 1: one update between its pull and its place
      2      1     1     1         after its push of place 0 rank 1 pulled version 1: staleness 1
      ...

The rest of a run follows from the job: which samples, which dropout, which learning rate. Kept in
memory, 24 bytes an update; at the end all shards' logs go into one safetensors file.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from distplat.platform.errors import StorageError

FILE_NAME = "apply_log.safetensors"
_WIDTH = 3


class Applied(NamedTuple):
    """One update of a shard."""

    rank: int
    seq: int
    """Number of the rank's push: its step."""
    pulled: int
    """Version of the shard at which the gradient was computed."""


class ApplyLog:
    """The updates of one shard, in the order in which they were applied."""

    def __init__(self, numbers: NDArray[np.int64] | None = None) -> None:
        flat = b"" if numbers is None else np.ascontiguousarray(numbers, np.int64).tobytes()
        self._numbers = array("q", flat)

    def add(self, applied: Applied) -> None:
        """Note one more update."""
        self._numbers.extend(applied)

    def __len__(self) -> int:
        return len(self._numbers) // _WIDTH

    def __getitem__(self, place: int) -> Applied:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return Applied(*self._numbers[place * _WIDTH : (place + 1) * _WIDTH])

    def __iter__(self) -> Iterator[Applied]:
        return (self[place] for place in range(len(self)))

    def numbers(self) -> NDArray[np.int64]:
        """Copy it as an array, shape [updates, 3]: rank, seq, pulled."""
        return np.array(self._numbers, dtype=np.int64).reshape(-1, _WIDTH)


def staleness_counts(logs: Sequence[ApplyLog], world: int) -> list[Counter[int]]:
    """Count by rank how often a gradient had which staleness, over all shards."""
    counts: list[Counter[int]] = [Counter() for _ in range(world)]
    for log in logs:
        for place, applied in enumerate(log):
            counts[applied.rank][place - applied.pulled] += 1
    return counts


def largest_lead(log: ApplyLog, world: int) -> int:
    """Give the most steps that a rank was ahead of the slowest when a gradient of it came."""
    done, lead = [0] * world, 0
    for applied in log:
        lead = max(lead, applied.seq - min(done))
        done[applied.rank] += 1
    return lead


def flaws(log: ApplyLog, world: int, steps: int) -> list[str]:
    """
    Say what is wrong with a finished run's log; empty: every gradient was applied exactly once.

    Args:
        log: of one shard.
        world: number of ranks.
        steps: of each rank.
    """
    following, since = [0] * world, [0] * world
    for place, (rank, seq, pulled) in enumerate(log):
        if not 0 <= rank < world:
            return [f"update {place} is of rank {rank}, the world has {world}"]
        if seq != following[rank]:
            return [f"update {place} is push {seq} of rank {rank}, expected {following[rank]}"]
        if not since[rank] <= pulled <= place:
            return [f"update {place} was computed at version {pulled}, which rank {rank} had not"]
        following[rank], since[rank] = seq + 1, place + 1
    return [
        f"rank {rank} made {made} updates of {steps}"
        for rank, made in enumerate(following)
        if made != steps
    ]


def pack(logs: Sequence[NDArray[np.int64]], facts: Mapping[str, str]) -> bytes:
    """
    Give the file of a run.

    Args:
        logs: by shard, shape [updates, 3] each.
        facts: what else is to be known, as text.
    """
    arrays = {f"shard-{index}": numbers for index, numbers in enumerate(logs)}
    return save(arrays, {"columns": "rank,seq,pulled", **facts})


def read_logs(path: str) -> tuple[list[ApplyLog], dict[str, str]]:
    """
    Read what `pack` gave.

    Returns:
        Logs by shard, and the facts.

    Raises:
        StorageError: there is no such file, or it is not one of ours.
    """
    try:
        with safe_open(path, "numpy") as file:
            facts = dict(file.metadata() or {})
            arrays = [file.get_tensor(f"shard-{i}") for i in range(len(file.keys()))]
    except Exception as error:  # safetensors has an error of its own, and raises OSError
        raise StorageError(f"cannot read {path}: {error}") from None
    if any(a.ndim != 2 or a.shape[1] != _WIDTH or a.dtype != np.int64 for a in arrays):
        raise StorageError(f"{path} is no log of updates")
    return [ApplyLog(numbers) for numbers in arrays], facts
