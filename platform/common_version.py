"""
Which version of the weights all ranks are asked for: one that none has reached yet.

Decides only; who asks the ranks is `actors/weights.py`.
"""

from collections.abc import Mapping, Set


class CommonVersion:
    """
    State of one question for weights; reads no clock and talks to nobody.

    Args:
        at_least: no older version will do.
        total: steps of the run: that version is kept by every rank.
    """

    def __init__(self, at_least: int, total: int) -> None:
        self._at_least, self._total = at_least, total
        self._lead = 1
        self.target = 0  #: what every rank is to be asked for; 0: where they are, to begin with

    @property
    def is_unreachable(self) -> bool:
        """Whether the run ends before there is such a version."""
        return self._at_least > self._total

    def observe(self, passed: Mapping[int, int], held: Set[int]) -> bool:
        """
        Take what all ranks have answered; say whether each has the target.

        Args:
            passed: by rank, the last version that it has passed.
            held: ranks that have given their part of the target; `target` may be another after this
                call, and then they must be asked anew.
        """
        if self.target and held >= passed.keys():
            return True
        late = any(version >= self.target for rank, version in passed.items() if rank not in held)
        if late:
            ahead = min(max(passed.values()) + self._lead, self._total)
            self.target = max(self._at_least, ahead)
            self._lead *= 2
        return False
