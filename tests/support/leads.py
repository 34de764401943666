"""The largest lead of a worker in an asynchronous run."""

from distplat.platform.apply_log import ApplyLog
from distplat.platform.ledger import IntervalSet


def largest_lead(log: ApplyLog, parts: int) -> int:
    """
    Return the largest number of steps that a task was ahead of the oldest missing task.

    Args:
        log: log of one shard, from the first step on.
        parts: number of tasks per step.
    """
    done, lead = IntervalSet(), 0
    for applied in log:
        lead = max(lead, applied.task // parts - done.low // parts)
        done.add(applied.task)
    return lead
