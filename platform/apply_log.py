"""
The order in which a shard applied gradients, which makes an asynchronous run reproducible.

    index   rank  task  pulled     `pulled`: the version at which the gradient was computed
      0      1     0      0        update 0 takes the shard from version 0 to version 1
      1      0     1      0        staleness 1: one update between its pull and itself
      2      1     2      1        after its push of update 0 rank 1 pulled version 1: staleness 1
      ...

A task is one part of one step's batch: with N parts, task t is part t % N of step t // N. Samples,
dropout and learning rate follow from the job. The log takes 24 bytes of memory per update; at the
end of the run the logs of all shards are written to one safetensors file.
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
    """Task of the gradient."""
    pulled: int
    """Version of the shard at which the gradient was computed."""


class ApplyLog:
    """The updates of one shard, in the order of application."""

    def __init__(self, numbers: NDArray[np.int64] | None = None) -> None:
        flat = b"" if numbers is None else np.ascontiguousarray(numbers, np.int64).tobytes()
        self._numbers = array("q", flat)

    def add(self, applied: Applied) -> None:
        """Append an update."""
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
        """Copy the log to an array, shape [updates, 3]: rank, task, pulled."""
        return np.array(self._numbers, dtype=np.int64).reshape(-1, _WIDTH)


def staleness_counts(logs: Sequence[ApplyLog], world: int) -> list[Counter[int]]:
    """Return how often each staleness occurred, by rank (at least `world`), over all shards."""
    ranks = max([world, *(applied.rank + 1 for log in logs for applied in log)])
    counts: list[Counter[int]] = [Counter() for _ in range(ranks)]
    for log in logs:
        for index, applied in enumerate(log):
            counts[applied.rank][index - applied.pulled] += 1
    return counts


def log_flaws(log: ApplyLog, parts: int, steps: int) -> list[str]:
    """
    Check that a finished run applied every task exactly once.

    Args:
        log: of one shard.
        parts: tasks per step.
        steps: of the run.

    Returns:
        The first problem; []: none.
    """
    done, since = IntervalSet(), dict[int, int]()
    for index, (rank, task, pulled) in enumerate(log):
        if rank < 0 or not 0 <= task < parts * steps:
            return [f"update {index} is task {task} of rank {rank}: the run has {parts * steps}"]
        if not done.add(task):
            return [f"update {index} is task {task}, which was applied before"]
        if not since.get(rank, 0) <= pulled <= index:
            text = f"at version {pulled}, which rank {rank} did not have"
            return [f"update {index} was computed {text}"]
        since[rank] = index + 1
    missing = parts * steps - len(log)
    return [f"{missing} tasks are missing, the first is {done.low}"] if missing else []


def pack_log(logs: Sequence[NDArray[np.int64]], facts: Mapping[str, str]) -> bytes:
    """
    Serialize the logs of a run.

    Args:
        logs: by shard, shape [updates, 3] each.
        facts: metadata of the file.
    """
    arrays = {f"shard-{index}": numbers for index, numbers in enumerate(logs)}
    return save(arrays, {"columns": _COLUMNS, **facts})


def read_logs(path: str) -> tuple[list[ApplyLog], dict[str, str]]:
    """
    Read a file written by `pack_log`.

    Returns:
        Logs by shard, and the metadata.

    Raises:
        StorageError: the file is missing, or not a log.
    """
    check_whole_file(Path(path))
    try:
        with safe_open(path, "numpy") as file:
            facts = dict(file.metadata() or {})
            arrays = [file.get_tensor(f"shard-{i}") for i in range(len(file.keys()))]
    except Exception as error:  # safetensors raises its own error type, or OSError
        raise StorageError(f"cannot read {path}: {error}") from None
    if any(a.ndim != 2 or a.shape[1] != _WIDTH or a.dtype != np.int64 for a in arrays):
        raise StorageError(f"{path} is no log of updates")
    if facts.get("columns") != _COLUMNS:
        text = f"{path} has columns {facts.get('columns')}: another version of distplat wrote it"
        raise StorageError(text)
    return [ApplyLog(numbers) for numbers in arrays], facts
