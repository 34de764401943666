"""
Chooses a version of the weights that every rank can return: one that no rank has passed yet.

`actors/weights.py` sends the requests to the ranks.
"""

from collections.abc import Mapping, Set


class CommonVersion:
    """
    State of one request for weights; reads no clock and does no I/O.

    Args:
        at_least: oldest acceptable version.
        total: steps of the run; every rank keeps the last version.
    """

    def __init__(self, at_least: int, total: int) -> None:
        self._at_least, self._total = at_least, total
        self._lead = 1
        self.target = 0  #: version to request from every rank; 0: first ask for positions

    @property
    def is_unreachable(self) -> bool:
        """Whether the run ends before such a version exists."""
        return self._at_least > self._total

    def observe(self, passed: Mapping[int, int], held: Set[int]) -> bool:
        """
        Process the answers of all ranks; return whether each has returned the target.

        Args:
            passed: by rank, the last version that it has passed.
            held: ranks that have returned their part of the target. If `target` changes in this
                call, all ranks must be asked again.
        """
        if self.target and held >= passed.keys():
            return True
        late = any(version >= self.target for rank, version in passed.items() if rank not in held)
        if late:
            ahead = min(max(passed.values()) + self._lead, self._total)
            self.target = max(self._at_least, ahead)
            self._lead *= 2
        return False
