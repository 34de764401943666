"""
How the workers of a run are told to stop: all after the same step, or at once if something failed.

    controller   RESIZE ─▶ each worker, at another moment
    worker-0     step 118: not told yet │ step 119: told ──▶ control record │
    worker-1     step 118: told ──▶ control record │ ◀── the sum says RESIZE: both stop after 118

Each worker puts what it was told into its control record of the next step. The sum of the records
has the same bits on all ranks, so they stop after the same step, whoever was told first; and what
reaches one of them reaches all. An attempt in which something failed is abandoned: nobody waits
for a step's end.
"""

from enum import IntEnum


class StopOrder(IntEnum):
    """What a worker is told about an attempt; a larger one replaces a smaller one."""

    NONE = 0
    """Go on."""
    RESIZE = 1
    """Stop after a step, and wait: the next attempt has another number of workers."""
    END = 2
    """Stop after a step: the run ends there, as after its last step."""
    SAVE = 3
    """Stop after a step, and take a checkpoint of it: the run was asked to stop, and ends there."""
    ABANDON = 4
    """Stop at once, wherever the worker waits."""
