"""How the workers of a run are stopped: between two steps if nothing failed, at once if it did."""

from enum import IntEnum


class Stop(IntEnum):
    """How an attempt is called off; a later one goes further."""

    REST = 0
    """Each worker stops before its next step."""
    HALT = 1
    """One has stopped: whoever has made as many steps waits for it in vain, and stops, too."""
    ABANDON = 2
    """Everybody stops, wherever they wait."""


def how_to_stop(failed: bool, halted: int | None) -> Stop:
    """
    Say how those that are still at work are to be stopped.

    Args:
        failed: whether something did.
        halted: steps of the first worker that has stopped; None: nobody has.
    """
    if failed:
        return Stop.ABANDON
    return Stop.REST if halted is None else Stop.HALT
