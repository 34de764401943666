"""
In what order a shard applied gradients: what makes an asynchronous run repeatable.

    index   rank  task  pulled     `pulled`: the version at which the gradient was computed
      0      1     0      0        update 0 takes the shard from version 0 to version 1
      1      0     1      0        staleness 1: one update between its pull and itself
      2      1     2      1        after its push of update 0 rank 1 pulled version 1: staleness 1
      ...

A task is one part of one step's batch: of N parts, part t % N of step t // N. The rest of a run
follows from the job: which samples, which dropout, which learning rate. Kept in
memory, 24 bytes an update; at the end all shards' logs go into one safetensors file.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from distplat.platform.errors import StorageError
from distplat.platform.ledger import IntervalSet
from distplat.platform.total_memory import check_whole_file

FILE_NAME = "apply_log.safetensors"
_WIDTH = 3
_COLUMNS = "rank,task,pulled"


class Applied(NamedTuple):
    """One update of a shard."""

    rank: int
    task: int
    """What the gradient was of."""
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

    def __getitem__(self, index: int) -> Applied:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Applied(*self._numbers[index * _WIDTH : (index + 1) * _WIDTH])

    def __iter__(self) -> Iterator[Applied]:
        return (self[index] for index in range(len(self)))

    def numbers(self) -> NDArray[np.int64]:
        """Copy it as an array, shape [updates, 3]: rank, task, pulled."""
        return np.array(self._numbers, dtype=np.int64).reshape(-1, _WIDTH)


def staleness_counts(logs: Sequence[ApplyLog], world: int) -> list[Counter[int]]:
    """Count by rank how often a gradient had which staleness, over all shards; at least `world`."""
    ranks = max([world, *(applied.rank + 1 for log in logs for applied in log)])
    counts: list[Counter[int]] = [Counter() for _ in range(ranks)]
    for log in logs:
        for index, applied in enumerate(log):
            counts[applied.rank][index - applied.pulled] += 1
    return counts


def log_flaws(log: ApplyLog, parts: int, steps: int) -> list[str]:
    """
    Say what is wrong with a finished run's log; empty: every task was applied exactly once.

    Args:
        log: of one shard.
        parts: tasks of a step.
        steps: of the run.
    """
    done, since = IntervalSet(), dict[int, int]()
    for index, (rank, task, pulled) in enumerate(log):
        if rank < 0 or not 0 <= task < parts * steps:
            return [f"update {index} is task {task} of rank {rank}: the run has {parts * steps}"]
        if not done.add(task):
            return [f"update {index} is task {task}, which was made before"]
        if not since.get(rank, 0) <= pulled <= index:
            return [f"update {index} was computed at version {pulled}, which rank {rank} had not"]
        since[rank] = index + 1
    missing = parts * steps - len(log)
    return [f"{missing} tasks are missing, the first is {done.low}"] if missing else []


def pack_log(logs: Sequence[NDArray[np.int64]], facts: Mapping[str, str]) -> bytes:
    """
    Give the file of a run.

    Args:
        logs: by shard, shape [updates, 3] each.
        facts: what else is to be known, as text.
    """
    arrays = {f"shard-{index}": numbers for index, numbers in enumerate(logs)}
    return save(arrays, {"columns": _COLUMNS, **facts})


def read_logs(path: str) -> tuple[list[ApplyLog], dict[str, str]]:
    """
    Read what `pack_log` gave.

    Returns:
        Logs by shard, and the facts.

    Raises:
        StorageError: there is no such file, or it is not one of ours.
    """
    check_whole_file(Path(path))
    try:
        with safe_open(path, "numpy") as file:
            facts = dict(file.metadata() or {})
            arrays = [file.get_tensor(f"shard-{i}") for i in range(len(file.keys()))]
    except Exception as error:  # safetensors has an error of its own, and raises OSError
        raise StorageError(f"cannot read {path}: {error}") from None
    if any(a.ndim != 2 or a.shape[1] != _WIDTH or a.dtype != np.int64 for a in arrays):
        raise StorageError(f"{path} is no log of updates")
    if facts.get("columns") != _COLUMNS:
        text = f"{path} has columns {facts.get('columns')}: another version of distplat wrote it"
        raise StorageError(text)
    return [ApplyLog(numbers) for numbers in arrays], facts
