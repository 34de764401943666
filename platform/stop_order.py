"""
How the workers of a run stop: all after the same step, or at once after a failure.

    controller   RESIZE ─▶ each worker, at different times
    worker-0     step 118: no order yet   │ step 119: order ──▶ control record │
    worker-1     step 118: order ──▶ control record │ ◀── the sum says RESIZE: both stop after 118

Each worker writes its order into its control record of the next step. The sum of the records has
the same bits on all ranks, so all ranks stop after the same step, and an order that reaches one
rank reaches all. After a failure an attempt is abandoned: no rank waits for the end of a step.
"""

from enum import IntEnum


class StopOrder(IntEnum):
    """Order to stop an attempt; a larger value replaces a smaller one."""

    NONE = 0
    """Continue."""
    RESIZE = 1
    """Stop after a step and wait: the next attempt has another number of workers."""
    END = 2
    """Stop after a step, which becomes the last step of the run."""
    SAVE = 3
    """Stop after a step, save a checkpoint of it, and end the run: the user asked to stop."""
    ABANDON = 4
    """Stop at once, also inside a wait."""
