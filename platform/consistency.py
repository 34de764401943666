"""When servers apply gradients: all of a step together, or each when it comes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Consistency:
    """When a shard applies gradients, and what it makes of old ones."""

    asynchronous: bool = False
    """Apply each gradient when it comes; else one update of all workers' gradients."""
    bound: int | None = None
    """Asynchronous: steps that a task may be ahead of the oldest that is not done; None: any."""
    staleness_lr: bool = False
    """Divide the learning rate by a gradient's staleness (Zhang et al., IJCAI 2016)."""
    delay_compensation: float = 0.0
    """Lambda of the correction for what changed since the pull (Zheng et al., ICML 2017)."""
    backup_workers: int = 0
    """Synchronous: a step goes on without so many of the gradients (Chen et al., 2016)."""

    @property
    def dealt(self) -> bool:
        """
        Whether tasks are leased to whoever asks (`task_scheduler.py`); else each worker has its
        part of every step. Where nobody waits for others, nobody is to have a part of its own.
        """
        return self.asynchronous

    @property
    def private(self) -> bool:
        """Whether workers compute on copies of their own: shards change while they do."""
        return self.asynchronous or self.backup_workers > 0


SYNCHRONOUS = Consistency()
"""One update for all workers' gradients of a step."""
