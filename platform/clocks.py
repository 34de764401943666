"""
How far workers may run apart: clocks, and the bound of stale synchronous parallel training.

A worker's clock counts its gradients that a shard has applied. A worker whose clock is more than
`bound` steps ahead of the slowest one waits (Ho et al., NIPS 2013); without a bound nobody does.

    bound 2      clock   0    1    2    3    4
    worker-0     ========|                        the slowest: never waits
    worker-1     ==================|              3 - 1 = 2: goes on
    worker-2     =======================|         4 - 1 = 3: waits until worker-0 is at 2

Every shard keeps clocks of its own. They cannot deadlock: the slowest worker waits at no shard.
Where tasks are leased, a worker has no clock: there the scheduler keeps the bound, by the tasks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Consistency:
    """When a shard applies gradients, and what it makes of old ones."""

    asynchronous: bool = False
    """Apply each worker's gradient when it comes; else one update of all workers' gradients."""
    bound: int | None = None
    """Asynchronous: steps that a worker may be ahead of the slowest; None: any number."""
    staleness_lr: bool = False
    """Divide the learning rate by a gradient's staleness (Zhang et al., IJCAI 2016)."""
    delay_compensation: float = 0.0
    """Lambda of the correction for what changed since the pull (Zheng et al., ICML 2017)."""
    backup_workers: int = 0
    """Synchronous: a step goes on without so many of the gradients (Chen et al., 2016)."""
    dealt: bool = False
    """Asynchronous: tasks are leased to whoever asks (`task_scheduler.py`), who keeps the bound;
    else each worker has its part of every step, and shards keep it."""

    @property
    def private(self) -> bool:
        """Whether workers compute on copies of their own: shards change while they do."""
        return self.asynchronous or self.backup_workers > 0


SYNCHRONOUS = Consistency()
"""One update for all workers' gradients of a step."""


class Clocks:
    """
    The workers' clocks at one shard.

    Args:
        world: number of workers.
        bound: see `Consistency`.
    """

    def __init__(self, world: int, bound: int | None = None) -> None:
        self.bound = bound
        self.done = [0] * world  #: by rank: gradients applied

    def tick(self, rank: int) -> None:
        """Count one more gradient of a rank."""
        self.done[rank] += 1

    def waits_for(self, rank: int) -> list[int]:
        """Give the ranks that hold `rank` up: further behind it than the bound allows."""
        if self.bound is None:
            return []
        return [
            other for other, done in enumerate(self.done) if self.done[rank] - done > self.bound
        ]

    def unfinished(self, steps: int) -> list[int]:
        """Give the ranks that have not made so many steps."""
        return [rank for rank, done in enumerate(self.done) if done < steps]
