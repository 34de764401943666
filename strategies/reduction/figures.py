"""What the collective port has counted between two steps, as figures of a step."""

from dataclasses import replace

from distplat.strategies.base import Collective


class Meter:
    """
    Gives the growth of a group's `Traffic` since it was last asked.

    Args:
        collective: the group.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._last = replace(collective.traffic)

    def lap(self) -> dict[str, float]:
        """Give the figures since the last lap, or since the meter was made."""
        now, last = self._collective.traffic, self._last
        self._last = replace(now)
        return {
            "sent_bytes": float(now.sent_bytes - last.sent_bytes),
            "received_bytes": float(now.received_bytes - last.received_bytes),
            "waiting_s": now.waiting_s - last.waiting_s,
            "working_s": now.working_s - last.working_s,
        }
