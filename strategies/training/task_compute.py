"""Forward and backward for leased tasks: any part of any step, as the lease says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.training.batches import make_loader
from distplat.strategies.training.compute import Share, Stopwatch, Sums, WholeModel, step_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from distplat.strategies.base import Strategy
    from distplat.strategies.training.session import Prepared


class TaskModel(WholeModel):
    """
    `WholeModel` for tasks: task t is part t % parts of step t // parts.

    Args:
        prepared: model and data; its sampler's world is the number of parts.
        strategy: told when the last backward of a task begins.
        alive: called after each micro-batch.
    """

    def __init__(
        self, prepared: Prepared, strategy: Strategy[Any], alive: Callable[[], None]
    ) -> None:
        super().__init__(prepared, strategy, 0, alive)
        self._reading = _Reading(self.job, self.data, self.sampler)
        self._task = 0  #: whose gradient is being made

    def read(self, tasks: range) -> None:
        """Begin to read the data of these tasks; all those before have been made."""
        if tasks:
            self._batches = self._reading.begin(tasks)

    def close(self) -> None:
        """End the loader's processes: they would outlive this one if it is killed."""
        self._batches = iter(())
        self._reading.close()

    def gradients(self, step: int, clock: Stopwatch) -> Share:
        """See `Compute`; `step` is the number of a task."""
        self._task = step
        step, self.rank = divmod(step, self.sampler.world)
        return super().gradients(step, clock)

    def evaluate_part(self, data: Dataset[Any], part: int) -> Sums:
        """Evaluate one of as many parts of the data as a step has."""
        self.rank = part
        return self.evaluate(data)

    def _last_backward(self, step: int) -> None:
        self.strategy.last_backward(self._task)


class _Reading:
    """One loader for all leases; its processes, if it has some, live as long as it does."""

    def __init__(self, job: Job, data: Dataset[Any], sampler: Sampler) -> None:
        self._job, self._data, self._sampler = job, data, sampler
        self._loader: DataLoader[Any] | None = None
        self._tasks = range(0)

    def begin(self, tasks: range) -> Iterator[Any]:
        """Give the micro-batches of some tasks, collated."""
        self._tasks = tasks
        if self._loader is None:
            data: Dataset[Any] = self._data
            if self._job.data.num_loaders:
                data = _Seeded(self._data)
            self._loader = make_loader(self._job, data, self, persistent=True)
        return iter(self._loader)

    def close(self) -> None:
        """Let go of the loader; its processes end with it."""
        self._loader = None

    def __iter__(self) -> Iterator[list[int]]:
        """Be a torch `batch_sampler`; for loader processes a batch begins with its seed."""
        accumulation, seeded = self._job.gradient_accumulation, self._job.data.num_loaders > 0
        for task in self._tasks:
            step, part = divmod(task, self._sampler.world)
            for number, ids in enumerate(self._sampler.micro_batches(step, part, accumulation)):
                seed = step_seed(self._job.seed, step, part) + number
                yield [seed, *ids.tolist()] if seeded else ids.tolist()


class _Seeded(Dataset[Any]):
    """
    The user's data in a loader process: its random numbers depend on the batch alone.

    Which process reads a batch, and what it read before, is a matter of who got which lease.
    """

    def __init__(self, data: Dataset[Any]) -> None:
        self._data = data

    def __getitems__(self, batch: Sequence[int]) -> list[Any]:
        """Give the samples of a batch, of which the first number is the seed."""
        assert get_worker_info() is not None, "in the worker itself the step's own seed counts"
        torch.manual_seed(batch[0])
        many = getattr(self._data, "__getitems__", None)
        if many is not None:
            found: list[Any] = many(list(batch[1:]))
            return found
        return [self._data[index] for index in batch[1:]]
