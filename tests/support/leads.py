"""How far the workers of an asynchronous run were apart, by the log of a shard."""

from distplat.platform.apply_log import ApplyLog
from distplat.platform.ledger import IntervalSet


def largest_lead(log: ApplyLog, parts: int) -> int:
    """
    Give the most steps that a task was ahead of the oldest missing one when its gradient came.

    Args:
        log: of one shard, from the first step on.
        parts: tasks of a step.
    """
    done, lead = IntervalSet(), 0
    for applied in log:
        lead = max(lead, applied.task // parts - done.low // parts)
        done.add(applied.task)
    return lead
