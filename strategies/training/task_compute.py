"""Forward and backward for leased tasks: any part of any step, as the lease says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.training.batches import Loader, Run, batches_by, runs
from distplat.strategies.training.compute import Share, Stopwatch, Sums, WholeModel
from distplat.strategies.training.prepared import Prepared


class TaskModel(WholeModel):
    """
    `WholeModel` for tasks: task t is part t % parts of step t // parts.

    Args:
        prepared: model and data; its sampler's world is the number of parts.
        last_backward: called when the last backward of a task begins.
        alive: called after each micro-batch.
    """

    def __init__(
        self, prepared: Prepared, last_backward: Callable[[], None], alive: Callable[[], None]
    ) -> None:
        super().__init__(prepared, last_backward, 0, alive)
        self._reading = _Reading(self.job, batches_by(self.task, self.data), self.sampler)

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
        step, self.rank = divmod(step, self.sampler.world)
        return super().gradients(step, clock)

    def evaluate_part(self, data: Dataset[Any], part: int) -> Sums:
        """Evaluate one of as many parts of the data as a step has."""
        self.rank = part
        return self.evaluate(data)


class _Reading:
    """One loader for all leases; its processes, if it has some, live as long as it does."""

    def __init__(self, job: Job, data: Dataset[Any], sampler: Sampler) -> None:
        self._job, self._data, self._sampler = job, data, sampler
        self._loader: Loader | None = None
        self._tasks = range(0)

    def begin(self, tasks: range) -> Iterator[Any]:
        """Give the micro-batches of some tasks, collated."""
        self._tasks = tasks
        if self._loader is None:
            self._loader = Loader(self._job, self._data, self, persistent=True)
        return iter(self._loader)

    def close(self) -> None:
        """Let go of the loader; its processes end with it."""
        self._loader = None

    def __iter__(self) -> Iterator[Run]:
        """Be a torch `batch_sampler`."""
        for task in self._tasks:
            step, part = divmod(task, self._sampler.world)
            yield from runs(self._sampler, step, part, self._job.gradient_accumulation)
